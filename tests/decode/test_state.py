"""What a model carries from token to token: as transformers' generate does, or a line and no reply."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, build_family, build_model, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from teal_cli.bench.decode import bench_decode
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.decode import probe
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused_session import FusedSession as Session
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Architecture, find_projections
from teal_cli.sparse import SparsityControl, sparsify_
from teal_cli.steps.generate import Generator

GREEDY = SamplingConfig()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},  # cache_params
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "rwkv": {"attention_hidden_size": 32},  # state
    "openai-gpt": {"n_positions": 64},  # none
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},  # positions that start anew
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},  # a cache of its own
}


def _build(kind: str, **shape: Any) -> Any:
    """A random model whose tokens differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_SMALL, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


def _prompt(rows: int = 1, length: int = 16) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SHAPES)
def test_text_is_that_of_transformers(kind: str) -> None:
    model, ids = _build(kind, **SHAPES[kind]), _prompt()
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert list(Engine(model).generate(ids, max_new_tokens=8, sampling=GREEDY)) == written[0, 16:].tolist()


def test_a_model_without_a_state_drops_the_inputs_that_a_cached_one_would() -> None:
    """GPT-1: every step runs all tokens, those of the prompt dense; a speed of that says nothing."""
    model = _build("openai-gpt", **SHAPES["openai-gpt"])
    model.teal_architecture = Architecture(
        blocks=("transformer.h",), sites={"mlp_input": ("mlp.c_fc",)}, dense=("attn.*", "mlp.c_proj")
    )
    names = [f"transformer.h.{layer}.mlp.c_fc" for layer in range(2)]
    plan = SparsityPlan("uniform", 0.5, dict.fromkeys(names, Threshold(0.7, 0.5)))
    control, ids = sparsify_(model, plan), _prompt()
    engine = Engine(model)
    with control.counting() as counter:
        got = list(engine.generate(ids, max_new_tokens=8, sampling=GREEDY))
    assert 0.2 < (counter.model_wide() or 0.0) < 0.8
    with torch.no_grad(), control.masked(16):
        logits = model(input_ids=torch.cat([ids, torch.tensor([got])], dim=1)).logits[0, 15:-1]
    assert logits.argmax(-1).tolist() == got
    with pytest.raises(ArtefactError, match="openai-gpt has no cache"):
        bench_decode(engine, [plan], ids, new_tokens=2, repeats=1)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}, "xlnet keeps a state .* does not know"),
        ("roberta", {}, "roberta .dense. does not give the logits of a pass over the whole text"),  # reads ahead
        ("granitemoehybrid", {**_MAMBA, "layer_types": ["mamba"] * 2}, "granitemoehybrid cannot be decoded"),
    ],
)
def test_what_cannot_be_decoded_is_refused(kind: str, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        list(Engine(_build(kind, **shape)).generate(_prompt(), max_new_tokens=2, sampling=GREEDY))


def test_bart_is_told_its_first_token() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bart", vocab_size=VOCABULARY, **_BART, max_position_embeddings=32)
    config.encoder_attention_heads = config.decoder_attention_heads = 4
    model, ids = AutoModelForSeq2SeqLM.from_config(config).eval(), _prompt()
    model.generation_config.update(forced_bos_token_id=7, forced_eos_token_id=None, eos_token_id=None)
    written = model.generate(ids, max_new_tokens=9, do_sample=False, num_beams=1)
    engine = Engine(model)
    assert list(engine.generate(ids, max_new_tokens=8, sampling=GREEDY)) == written[0, 2:].tolist()
    with pytest.raises(ArtefactError, match="have 32 positions each"):
        list(engine.generate(ids, max_new_tokens=31, sampling=GREEDY))


# A state that gets lost, path by path.


def _forgetful(method: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose steps see nothing of what was before."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        if ids.shape[1] == 1:
            kwargs["past_key_values"] = None
        return method(*args, **kwargs)

    return forward


def _sparse(family: str, dtype: torch.dtype = torch.float32, path: str | None = None) -> Engine:
    model: Any = build_family(family).to(dtype)
    names = [projection.name for projection in find_projections(model)]
    sparsify_(model, SparsityPlan("uniform", 0.5, dict.fromkeys(names, Threshold(0.6, 0.5))))
    return Engine(model, path=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text", "falcon-bias", "t5"])
def test_models_that_keep_their_state_pass(family: str, dtype: torch.dtype) -> None:
    engine = _sparse(family, dtype)
    state = torch.get_rng_state()
    assert engine.control is not None
    with engine.control.counting() as counter:
        engine.check(_prompt(rows=2))
        assert counter.model_wide() is None
    assert torch.equal(torch.get_rng_state(), state)
    assert engine._checked == {(False, "", 2), (True, "auto", 2)}
    engine.check(torch.zeros(2, 0))  # once for a path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lost_state_is_noticed(dtype: torch.dtype) -> None:
    model: Any = build_model("llama").to(dtype)
    model.forward = _forgetful(model.forward)
    with pytest.raises(ArtefactError, match="model type llama .dense. does not give"):
        Engine(model, path="general").check(_prompt())


def test_a_wrong_sparse_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _sparse("llama", path="general")
    original = SparsityControl.masked
    monkeypatch.setattr(SparsityControl, "masked", lambda self, prefix: original(self, 0))  # the prompt sparse too
    with pytest.raises(ArtefactError, match="model type llama .sparse. does not give"):
        engine.check(_prompt())


def test_a_wrong_fused_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build_model("llama"), path="fused")
    engine.check(_prompt())
    launch = Session.launch

    def at_the_start(self: Session) -> torch.Tensor:
        self.positions.own.zero_()
        return launch(self)

    monkeypatch.setattr(Session, "launch", at_the_start)
    engine._checked.clear()
    with pytest.raises(ArtefactError, match=r"\(fused path, dense\) does not give .* use --backend reference"):
        engine.check(_prompt())


def test_short_contexts_and_prompts_are_checked_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build_model("llama"), path="general")
    engine.check(_prompt(length=1))
    engine._checked.clear()
    engine.model.config.max_position_embeddings = probe.STEPS
    engine.model.forward = _forgetful(engine.model.forward)
    engine.check(_prompt())
    engine.model.config.max_position_embeddings = probe.STEPS + 2
    engine._checked.clear()
    with pytest.raises(ArtefactError, match="does not give"):
        engine.check(_prompt())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_no_reply(tmp_path: Path, value: float) -> None:
    model: Any = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "broken")
    build_tokenizer().save_pretrained(tmp_path / "broken")
    generator = Generator(GenerateConfig(model=str(tmp_path / "broken"), sparsity=0.0, max_new_tokens=4), QUIET)
    with pytest.raises(ArtefactError, match="not numbers"):
        generator.reply([{"role": "user", "content": "the stars"}])


def test_how_far_logits_are_apart() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    assert probe.difference(logits + 5.0, logits).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert float(probe.difference(-logits[:1].nan_to_num(neginf=0.0), logits[:1])) == pytest.approx(2.0)


def test_a_state_that_layers_hold_is_cleared() -> None:
    """Of RecurrentGemma: one text would run into the next, as it does with transformers' generate."""
    shape = {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16}
    fresh, used = (Engine(_build("recurrent_gemma", **shape)) for _ in range(2))
    list(used.generate(_prompt(), max_new_tokens=4, sampling=GREEDY))
    texts = [list(engine.generate(_prompt(length=1), max_new_tokens=8, sampling=GREEDY)) for engine in (fresh, used)]
    assert texts[0] == texts[1]
