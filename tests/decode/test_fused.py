"""The fused decode path in Triton's interpreter, against transformers' forward with the reference backend."""

import pytest
import torch
from conftest import TINY_CONFIGS, VOCABULARY, build_model
from fused_pair import LIMIT, PROMPT, Pair, error_of, half_plan, random_tokens, use_small_tiles
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Threshold
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.native import NativePath
from teal_cli.errors import UsageError
from teal_cli.sparse import apply_plan_, sparse_layers, sparsify_

STEPS = 8


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.fixture
def pair() -> Pair:
    return Pair(build_model("llama"))


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_and_counts_equal_the_reference(family: str, rows: int) -> None:
    pair = Pair(build_model(family))
    control = pair.control
    caches = pair.caches(rows)
    tokens = random_tokens(rows, STEPS, seed=1)
    control.backend = "reference"
    with control.counting() as expected_counter:
        expected = [pair.plain.step(tokens[:, i : i + 1], caches[0]) for i in range(STEPS)]
    control.backend = "triton"
    with control.counting() as counter:
        got = [pair.fused.step(tokens[:, i : i + 1], caches[1]) for i in range(STEPS)]
    for step in range(STEPS):
        assert got[step].shape == (rows, VOCABULARY)
        assert error_of(got[step], expected[step]) < LIMIT
    assert counter.by_projection() == expected_counter.by_projection()
    assert set(counter.by_projection()) == set(sparse_layers(pair.model))
    realised = counter.model_wide()
    assert realised == pytest.approx(expected_counter.model_wide(), abs=1e-12)
    assert realised is not None
    assert 0.3 < realised < 0.7


def test_layers_with_and_without_a_window() -> None:
    """Qwen2 may have both kinds of layer; the window is smaller than the prompt."""
    shape = {**TINY_CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    pair = Pair(AutoModelForCausalLM.from_config(config).eval())
    caches = pair.caches(1)
    for position in range(3):
        pair.step(random_tokens(1, 1, position), caches)


def test_dense_equals_dense_eager() -> None:
    """With sparsity switched off, and for a plan that drops nothing."""
    model = build_model("llama-bias")
    pair = Pair(build_model("llama-bias"))
    cache, fused_cache = DynamicCache(config=model.config), pair.caches(2)[1]
    with torch.no_grad():
        model(input_ids=random_tokens(2, PROMPT), past_key_values=cache)
        with pair.control.switched_off(), pair.control.counting() as counter:
            for position in range(3):
                token = random_tokens(2, 1, position)
                expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
                assert error_of(pair.fused.step(token, fused_cache), expected) < LIMIT
        assert counter.model_wide() is None
        nothing = {name: Dense() for name in sparse_layers(pair.model)}
        apply_plan_(pair.model, SparsityPlan("uniform", 0.0, nothing))
        token = random_tokens(2, 1, 9)
        expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
        assert error_of(pair.fused.step(token, fused_cache), expected) < LIMIT


def test_a_projection_without_sparsity_keeps_everything() -> None:
    """Its threshold is not looked at, and it counts as dense."""
    model = build_model("llama")
    plan = half_plan(model)
    for name in plan.projections:
        if name.endswith(("o_proj", "down_proj")):
            plan.projections[name] = Dense()
    pair = Pair(model, sparsify_(model, plan))
    caches = pair.caches(1)
    with pair.control.counting() as counter:
        pair.step(random_tokens(1, 1), caches)
    realised = counter.by_projection()
    assert set(realised) == set(plan.projections)
    for name, share in realised.items():
        assert (share == 0.0) == name.endswith(("o_proj", "down_proj"))


def test_a_dense_model_is_laid_out_for_the_fused_path() -> None:
    """What an engine does on a GPU: layers of sparsity zero, no second copy of the weights, the same logits."""
    model = build_model("qwen3")
    cache = DynamicCache(config=model.config)
    token = random_tokens(1, 1)
    with torch.no_grad():
        model(input_ids=random_tokens(1, PROMPT), past_key_values=cache)
        expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
    size = sum(parameter.nbytes for parameter in model.parameters())
    engine = Engine(model, path="fused")
    assert engine.general_because is None
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == size
    fixed = engine.new_cache(PROMPT + 1)
    engine.prefill(random_tokens(1, PROMPT), fixed)
    assert error_of(engine.step(token, fixed), expected) < LIMIT


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPath, "devices", ("cpu",))
    monkeypatch.setattr(NativePath, "devices", ())


def test_an_unknown_model_takes_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        "codegen", vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=8
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    _as_on_a_gpu(monkeypatch)
    engine = Engine(model)
    assert (engine.path.name, engine.general_because) == ("general", "model type codegen")
    with pytest.raises(UsageError, match="decode path fused cannot decode this model: model type codegen"):
        Engine(model, path="fused")


def test_a_dense_model_that_cannot_take_the_fused_path_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    model.config.hidden_act = "mish"
    _as_on_a_gpu(monkeypatch)
    assert Engine(model).general_because == "activation mish"
    assert not sparse_layers(model)


def test_different_thresholds_of_one_site_are_not_side_by_side_on_the_cpu() -> None:
    model = build_model("llama")
    plan = half_plan(model)
    plan.projections["model.layers.1.self_attn.k_proj"] = Threshold(0.7, 0.5)
    assert FusedPath.unsupported(model, sparsify_(model, plan)) == "projections that are not side by side"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("family", "model type codegen"),
        ("no GPU", "no GPU"),
        ("backend", "backend reference"),
        ("dtype", "the triton backend takes float16, bfloat16 and float32, not torch.float64"),
        ("activation", "activation mish"),
        ("rope", "rope type dynamic"),
        ("devices", "weights on several devices"),
        ("hook", "weights on several devices"),
        ("moved", "projections that are not side by side"),
    ],
)
def test_unsupported(pair: Pair, what: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = pair.model, pair.model.config
    if what == "family":
        config.model_type = "codegen"  # whose blocks are not alike
        model.model.layers[0].more = torch.nn.Linear(2, 2)
    elif what == "no GPU":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    elif what == "backend":
        pair.control.backend = "reference"
    elif what == "dtype":
        model.double()
    elif what == "activation":
        config.hidden_act = "mish"
    elif what == "rope":
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    elif what == "devices":
        model.lm_head.to("meta")
    elif what == "hook":
        model.model.layers[1]._hf_hook = object()
    else:
        model.to(torch.bfloat16)
    assert FusedPath.unsupported(model, pair.control) == reason
