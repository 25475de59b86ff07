"""Rows of different lengths in one batch: each gives what it gives alone, by the definition (one masked pass)."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, TINY_CONFIGS, VOCABULARY, build_family, build_model
from fused_pair import THRESHOLDS, error_of, random_tokens, use_small_tiles
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import architecture_of, find_projections
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import SparsityControl, sparsify_

LENGTHS = [3, 20, 11]
STEPS = 4
LIMIT = 2e-5  # relative; the products of a batch and of one row sum in another order
REFUSED = {
    "mistral": "mistral sees a window",
    "gemma2": "gemma2 sees a window",
    "gemma3_text": "gemma3_text sees a window",
    "gemma3": "gemma3 sees a window",
    "phi3": "phi3 sees a window",
    "starcoder2": "starcoder2 sees a window",
    "exaone4": "exaone4 sees a window",
    "olmo3": "olmo3 sees a window",
    "gpt_oss": "gpt_oss sees a window",
    "cohere2": "cohere2 sees a window",
    "ministral": "ministral sees a window",
    "gemma4_text": "gemma4_text sees a window",
    "cwm": "cwm sees a window",
    "vaultgemma": "vaultgemma sees a window",
    "granite_swa": "granite_swa sees a window",
    "gpt_neo": "gpt_neo sees a window",
    "falcon-bias": "falcon counts distances with padding",
    "bloom": "model type bloom ",
    "mpt": "model type mpt ",
    "mpt-clip": "model type mpt ",
    "t5": "an encoder would read the padding",
    "t5-gated": "an encoder would read the padding",
}
"""What the general path cannot do; the fused one does windows."""
GENERAL = [name for name in FAMILIES if architecture_of(FAMILIES[name]["model_type"]).kind != "encoder"]


def _sparsify(model: Any) -> SparsityControl:
    projections = find_projections(model)
    thresholds = {p.name: THRESHOLDS.get(p.site.rpartition(".")[2], 0.4) for p in projections}
    rules = {name: Threshold(value, 0.5) for name, value in thresholds.items()}
    return sparsify_(model, SparsityPlan("uniform", 0.5, rules))


def _prompts(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right with tokens that are no padding token, and their lengths."""
    return random_tokens(len(lengths), max(lengths)), torch.tensor(lengths)


def _check(engine: Engine, lengths: list[int] = LENGTHS) -> None:
    """Logits after the prompts and after each step, against each row alone."""
    ids, of_rows = _prompts(lengths)
    tokens = random_tokens(len(lengths), STEPS, seed=1)
    cache = engine.new_cache(max(lengths) + STEPS)
    got = [engine.prefill(ids, cache, of_rows)]
    got += [engine.step(tokens[:, i : i + 1], cache) for i in range(STEPS)]
    _check_each_alone(engine, got, [ids[row : row + 1, :length] for row, length in enumerate(lengths)], tokens)


def _check_each_alone(engine: Engine, got: list[Tensor], prompts: list[Tensor], tokens: Tensor) -> None:
    """(rows, vocabulary) logits after the prompts, and after each of (rows, STEPS) tokens, against each row alone."""
    for row, prompt in enumerate(prompts):
        with engine.control.dense() if engine.control else torch.no_grad():
            first = engine.model(input_ids=prompt).logits[:, -1]
        expected = [first, *engine.without_cache(prompt, tokens[row : row + 1]).unbind(1)]
        for step in range(STEPS + 1):
            assert error_of(got[step][row], expected[step][0]) < LIMIT, (row, step)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("family", GENERAL)
def test_general_path(family: str, kind: str) -> None:
    model = build_family(family)
    if kind == "sparse":
        _sparsify(model)
    engine = Engine(model, path="encoder-decoder" if family.startswith("t5") else "general")
    if family not in REFUSED:
        _check(engine)
        return
    ids, lengths = _prompts()
    with pytest.raises(UsageError, match=f"different lengths cannot be decoded together here: .*{REFUSED[family]}"):
        engine.prefill(ids, engine.new_cache(30), lengths)
    engine.prefill(ids, engine.new_cache(30), torch.full((3,), 20))  # of one length they can


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "shape"), [("bloom", {"n_layer": 1, "n_head": 4}), ("openai-gpt", {"n_layer": 1, "n_head": 4})]
)
def test_models_without_positions_are_refused(kind: str, shape: dict[str, int]) -> None:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, n_embd=32, hidden_size=32, n_positions=64, **shape)
    engine = Engine(AutoModelForCausalLM.from_config(config).eval(), path="general")
    ids, lengths = _prompts()
    with pytest.raises(UsageError, match=f"model type {kind} "):
        engine.prefill(ids, engine.new_cache(30), lengths)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "why", "shape"),
    [
        (
            "gpt_neo",
            "sees a window of 8 positions",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        ),
        ("roberta", "counts positions from its padding token on", {"is_decoder": True, "num_attention_heads": 4}),
    ],
)
def test_windows_and_positions_that_only_the_model_counts_are_refused(
    kind: str, why: str, shape: dict[str, Any]
) -> None:
    """GPT-Neo's cache is not a sliding one, and RoBERTa's first position is not 0: both gave other text in silence."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 64, **shape}
    engine = Engine(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval(), path="general")
    ids, lengths = _prompts()
    with pytest.raises(UsageError, match=f"model type {kind} {why}"):
        engine.prefill(ids, engine.new_cache(30), lengths)


def _fused_model(of: str) -> Any:
    if of != "qwen2-window":
        return build_model(of)
    shape = {**TINY_CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("of", ["llama-bias", "mistral", "qwen2-window", "qwen3"])
def test_fused_path(of: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)
    model = _fused_model(of)
    if kind == "sparse":
        _sparsify(model).backend = "triton"
    _check(Engine(model, path="fused"))


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
def test_fused_path_of_quantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)
    model = build_model("llama")
    packs = quantise_(model, Scheme.parse("int8"))
    control = _sparsify(model)
    pack_(model, packs)
    control.backend = "triton"
    _check(Engine(model, path="fused"))


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("path", ["fused", "general"])
def test_the_loop_of_steps(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of a batch are those of each row alone, and the counts are the sum of theirs."""
    use_small_tiles(monkeypatch)
    model = build_model("llama")
    control = _sparsify(model)
    control.backend = "triton" if path == "fused" else "cpu"
    engine = Engine(model, path=path)
    ids, lengths = _prompts()

    def write(prompt: Tensor, of_rows: Tensor | None) -> list[list[int]]:
        cache = engine.new_cache(30)
        sampler = Sampler(SamplingConfig(), engine.device)
        token = sampler.next_token(engine.prefill(prompt, cache, of_rows))
        loop = TokenLoop(engine, cache, token, sampler)
        found = [token, *(loop.advance().clone() for _ in range(STEPS))]
        return torch.cat(found, dim=1).tolist()

    with control.counting() as together:
        got = write(ids, lengths)
    alone = []
    with control.counting() as apart:
        for row, length in enumerate(LENGTHS):
            alone += write(ids[row : row + 1, :length], None)
    assert got == alone
    assert len({str(tokens) for tokens in got}) == 3
    assert together.by_projection() == apart.by_projection()


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("path", ["fused", "general"])
def test_prompts_of_different_lengths_behind_a_common_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before them in the cache is kept, and their positions go on behind it."""
    use_small_tiles(monkeypatch)
    engine = Engine(build_model("llama"), path=path)
    common, (ids, lengths), tokens = random_tokens(1, 5, seed=2), _prompts([4, 2]), random_tokens(2, STEPS, seed=1)
    cache = engine.new_cache(20)
    engine.prefill(common.expand(2, -1), cache)
    got = [engine.prefill(ids, cache, lengths)]
    got += [engine.step(tokens[:, i : i + 1], cache) for i in range(STEPS)]
    prompts = [torch.cat([common, ids[row : row + 1, :length]], dim=1) for row, length in enumerate(lengths.tolist())]
    _check_each_alone(engine, got, prompts, tokens)


@torch.no_grad()
@pytest.mark.parametrize("path", ["fused", "general"])
def test_lengths_that_cannot_be(path: str) -> None:
    engine = Engine(build_model("llama"), path=path)
    ids = random_tokens(2, 6)
    for wrong in ([6, 7], [0, 6], [6], [6, 6, 6]):
        with pytest.raises(UsageError, match="do not fit 2 prompts of at most 6 tokens"):
            engine.prefill(ids, engine.new_cache(9), torch.tensor(wrong))
    cache = engine.new_cache(20)
    engine.prefill(ids, cache, torch.tensor([6, 4]))
    with pytest.raises(UsageError, match="cannot be given another prompt"):
        engine.prefill(ids, cache)


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("path", ["fused", "general"])
def test_rows_of_different_lengths_do_not_outgrow_their_cache(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would pad the mask, and hide the new tokens from themselves."""
    use_small_tiles(monkeypatch)
    engine = Engine(build_model("llama"), path=path)
    cache, token = engine.new_cache(7), random_tokens(2, 1)
    engine.prefill(random_tokens(2, 6), cache, torch.tensor([6, 4]))
    engine.step(token, cache)
    with pytest.raises(ArtefactError, match="the KV cache is full: it was made for 7 positions"):
        engine.step(token, cache)


def test_lengths_of_a_fixed_cache() -> None:
    cache = FixedCache(2, 10)
    for layer in cache.layers:
        layer.update(torch.ones(3, 1, 6, 4), torch.ones(3, 1, 6, 4))
    assert (cache.length, cache.row_lengths()) == (6, [6, 6, 6])
    cache.shorten([2, 5, 4])  # nobody has 6: the padding went further than any prompt
    assert (cache.length, cache.row_lengths()) == (5, [2, 5, 4])
    cache.advance()
    assert (cache.length, cache.row_lengths()) == (6, [3, 6, 5])
    cache.reset()
    assert (cache.length, cache.row_lengths()) == (0, [0, 0, 0])
