"""The engine: prefill dense, decode sparse, sampling, stop tokens, limits."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, build_tokenizer, export_tiny, save_tiny
from transformers import DynamicCache, StaticCache

from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.decode.chat import encode_prompt, stop_ids, wants_chat
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, MachineError, UsageError
from teal_cli.model_loading import load_model
from teal_cli.sparse import use_backend
from teal_cli.steps.generate import Generator


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    return Engine(load_model(out, device="cpu", dtype="auto"))


def _prompt(length: int = 8) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(2, VOCABULARY, (1, length))


def test_prefill_is_dense_even_for_one_token(engine: Engine) -> None:
    assert engine.control is not None
    with engine.control.counting() as counter:
        engine.prefill(_prompt(1), engine.new_cache(4))
        assert counter.model_wide() is None
        cache = engine.new_cache(4)
        engine.prefill(_prompt(1), cache)
        engine.step(_prompt(1), cache)
        assert counter.model_wide() == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 9, 30])
def test_prefill_has_the_dense_bits(tmp_path: Path, length: int) -> None:
    folder = save_tiny(tmp_path / "dense")
    out, _ = export_tiny(folder, tmp_path / "sparse")
    dense, sparse = (Engine(load_model(path, device="cpu", dtype="auto")) for path in (folder, out))
    prompt = _prompt(length)
    assert torch.equal(sparse.prefill(prompt, sparse.new_cache(40)), dense.prefill(prompt, dense.new_cache(40)))


def test_generation_equals_token_by_token(engine: Engine) -> None:
    tokens = list(engine.generate(_prompt(), max_new_tokens=12, sampling=SamplingConfig()))
    cache = engine.new_cache(20)
    logits = engine.prefill(_prompt(), cache)
    for token in tokens:
        assert int(logits.argmax()) == token
        logits = engine.step(torch.tensor([[token]]), cache)
    assert len(tokens) == 12


def test_stop_token_ends_and_is_not_yielded(engine: Engine) -> None:
    free = list(engine.generate(_prompt(), max_new_tokens=12, sampling=SamplingConfig()))
    stop = free[5]
    stopped = list(engine.generate(_prompt(), max_new_tokens=12, sampling=SamplingConfig(), stop=frozenset({stop})))
    assert stopped == free[: free.index(stop)]


def test_context_limit_and_empty_prompt(engine: Engine) -> None:
    with pytest.raises(ArtefactError, match="exceed the model's context of 256"):
        list(engine.generate(_prompt(200), max_new_tokens=57, sampling=SamplingConfig()))
    assert len(list(engine.generate(_prompt(200), max_new_tokens=56, sampling=SamplingConfig()))) == 56
    with pytest.raises(ArtefactError, match="no tokens"):
        list(engine.generate(torch.empty(1, 0, dtype=torch.int64), max_new_tokens=4, sampling=SamplingConfig()))


def test_sampling_is_seeded_and_follows_the_distribution() -> None:
    device = torch.device("cpu")
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def draw(count: int, **options: float) -> list[int]:
        sampler = Sampler(SamplingConfig(**options), device)
        return [int(sampler.next_token(logits)) for _ in range(count)]

    assert draw(20, temperature=1.0, seed=1) == draw(20, temperature=1.0, seed=1)
    assert draw(50, temperature=1.0, seed=1) != draw(50, temperature=1.0, seed=2)
    assert set(draw(50, temperature=0.0)) == {0}
    assert set(draw(400, temperature=5.0, top_k=2)) == {0, 1}
    assert set(draw(400, temperature=1.0, top_p=0.6)) == {0}
    shares = Counter(draw(4000, temperature=1.0))
    for token, probability in enumerate(logits.softmax(-1)[0].tolist()):
        assert shares[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_chat_template_and_stop_ids(tmp_path: Path, engine: Engine) -> None:
    plain, chatty = build_tokenizer(), build_tokenizer()
    chatty.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    assert wants_chat(chatty, None)
    assert not wants_chat(plain, None)
    assert not wants_chat(chatty, False)
    with pytest.raises(UsageError, match="no chat template"):
        wants_chat(plain, True)
    messages = [{"role": "user", "content": "count the stars"}]
    text = chatty.decode(encode_prompt(chatty, messages, chat=True)[0])
    assert text == "<|user|>count the stars<|end|><|assistant|>"
    assert plain.decode(encode_prompt(plain, messages, chat=False)[0]) == "count the stars"
    assert stop_ids(engine.model, plain, ["<|end|>"]) == {1, 2}
    with pytest.raises(UsageError, match=r"'no token' is not one token .* but \d+"):
        stop_ids(engine.model, plain, ["no token"])


def test_a_model_on_any_device_of_torch_takes_transformers_forward() -> None:
    """Such as Apple's or Intel's GPUs, of which there is none here."""
    engine = Engine(build_model("llama").to("meta"))
    assert (engine.path.name, engine.general_because) == ("general", None)
    assert Engine(build_model("t5").to("meta")).path.name == "encoder-decoder"


def test_backend_by_name_runs_or_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.control is not None
    assert use_backend(engine.control, "auto", engine.device, torch.float32) == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MachineError, match="backend triton: .* needs a GPU"):
        use_backend(engine.control, "triton", engine.device, torch.float32)


def test_ctrl_c_ends_a_reply_and_keeps_what_came(tmp_path: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    generator = Generator(GenerateConfig(model=str(out), max_new_tokens=40), QUIET)
    generator.stop = frozenset()
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 1:
            raise KeyboardInterrupt

    message = [{"role": "user", "content": "the stars"}]
    reply = generator.reply(message, write=write)
    assert reply.interrupted
    assert 0 < reply.tokens < 40
    assert "".join(seen) == reply.text
    assert reply.realised_sparsity == pytest.approx(0.5, abs=0.15)
    again = generator.reply(message)  # the session goes on
    assert not again.interrupted
    assert again.tokens == 40


def test_alibi_takes_a_growing_cache(tmp_path: Path) -> None:
    """On a GPU too: transformers' Falcon makes its biases for as many positions as are written."""
    kinds = {}
    for family in ("falcon-bias", "gpt2"):
        engine = Engine(load_model(save_tiny(tmp_path / family, family), device="cpu", dtype="auto"), path="general")
        engine.path.device = torch.device("cuda")  # asks for memory only when it is written
        kinds[family] = type(engine.new_cache(20).state)
    assert kinds == {"falcon-bias": DynamicCache, "gpt2": StaticCache}
