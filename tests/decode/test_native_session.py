"""The native path: what it takes, gate first, its cache, how long sessions last, what they count."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, export_tiny, save_tiny
from fused_pair import error_of, half_plan, random_tokens
from intrinsic_models import KINDS, save_kind
from native_models import LIMIT, NO_LIBRARY, OTHERS, Exact, check_steps, plan_for, sparse, tiny, use_threads
from torch.multiprocessing.reductions import StorageWeakRef

from teal_cli.cli import run
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.native_cache import NativeCache
from teal_cli.decode.paths.native import NativePath
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, MachineError
from teal_cli.model_loading import load_model
from teal_cli.sparse import apply_plan_, control_of, make_intrinsic_, set_thresholds_, sparse_layers

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
GREEDY = SamplingConfig()


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, 2)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [3, 9, 6]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gate_first(kind: str, lengths: list[int], tmp_path: Path) -> None:
    """Counts too: dead neurons, as the eager layers count them."""
    model = load_model(save_kind(tmp_path / kind, kind), device="cpu", dtype="float32")
    make_intrinsic_(model)
    check_steps(model, lengths)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_other_activations_of_gated_mlps(activation: str) -> None:
    model = tiny("llama", hidden_act=activation)
    check_steps(sparse(model), [7, 4])


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bamboo", *OTHERS])
def test_a_dense_model(family: str) -> None:
    """Its weights move and are not copied; the logits are the plain model's, and nothing is dropped."""
    model = tiny(family)
    plain = copy.deepcopy(model).double()
    size = sum(parameter.nbytes for parameter in model.parameters())
    engine = Engine(model)
    assert (engine.path.name, engine.general_because, engine.control) == ("native", None, None)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == size
    cache, ids = engine.new_cache(21), random_tokens(2, 21)
    engine.prefill(ids[:, :20], cache)
    expected = plain(input_ids=ids).logits[:, -1]
    assert error_of(engine.step(ids[:, 20:], cache), expected) < 1e-5


@needs_library
@torch.no_grad()
def test_weights_that_were_not_laid_out_and_a_model_that_moved() -> None:
    """Plans that were only set; and a cast, after which the layout is forgotten."""
    model = sparse(tiny("llama"))
    set_thresholds_(model, plan_for(model, "apart"))
    check_steps(model, [9])
    check_steps(model.to(torch.bfloat16), [9])


@needs_library
@torch.no_grad()
def test_greedy_text_is_that_of_transformers_forward() -> None:
    model = sparse(tiny("llama"))
    texts = [
        list(Engine(model, path=path).generate(random_tokens(1, 12), max_new_tokens=48, sampling=GREEDY))
        for path in ("general", "native")
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_hundred_runs_have_the_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, threads)
    engine = Engine(sparse(tiny("llama"), scheme="int8"))
    found = set()
    for _ in range(100):
        cache = engine.new_cache(22)
        engine.prefill(random_tokens(2, 20), cache)
        steps = [engine.step(random_tokens(2, 1, seed), cache) for seed in range(2)]
        found.add(torch.cat(steps).numpy().tobytes())
    assert len(found) == 1


@needs_library
@torch.no_grad()
def test_the_loop_of_steps_samples_and_counts_as_the_general_path_does() -> None:
    model = sparse(tiny("llama"))
    control, found = control_of(model), {}
    for path in ("general", "native"):
        engine = Engine(model, path=path)
        for temperature in (0.0, 1.0):
            cache, sampler = engine.new_cache(30), Sampler(SamplingConfig(temperature, 20, seed=3), engine.device)
            token = sampler.next_token(engine.prefill(random_tokens(2, 20), cache))
            with control.counting() as counter:
                loop = TokenLoop(engine, cache, token, sampler)
                tokens = [loop.advance().tolist() for _ in range(6)]
            found[path, temperature] = tokens, counter.by_projection()
            assert not loop.captures
    for temperature in (0.0, 1.0):
        assert found["native", temperature] == found["general", temperature]


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", ["plan", "switched off", "dense", "second prefill", "reset"])
def test_what_makes_a_session_stale(change: str) -> None:
    """And the steps after it are right, within the change and after it."""
    model = sparse(tiny("mistral"))
    engine, control = Engine(model), control_of(model)
    cache = engine.new_cache(40)
    engine.prefill(random_tokens(1, 20), cache)
    engine.step(random_tokens(1, 1), cache)
    session = engine.open(cache)
    assert not session.stale
    assert engine.open(cache) is session
    context: Any = nullcontext()
    if change == "plan":
        apply_plan_(model, half_plan(model, 1.5))
    elif change == "switched off":
        context = control.switched_off()
    elif change == "dense":
        context = control.dense()
    else:
        if change == "reset":
            cache.reset()
        engine.prefill(random_tokens(1, 5, 7), cache)
    exact = Exact(model)
    with context, exact.control.dense() if change in ("switched off", "dense") else nullcontext():
        assert session.stale
        expected = exact.step(random_tokens(1, 1, 1), cache)
        assert error_of(engine.step(random_tokens(1, 1, 1), cache), expected) < 1e-5
        assert engine.open(cache) is not session
    expected = exact.step(random_tokens(1, 1, 2), cache)
    assert error_of(engine.step(random_tokens(1, 1, 2), cache), expected) < 1e-5


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, None) for family in ("llama", "qwen2", "qwen3", "gpt2", "bamboo")),
        ("llama", "int8"),
        ("qwen2", "int8"),
    ],
)
def test_weights_that_are_loaded_between_tokens(family: str, dtype: torch.dtype, scheme: str | None) -> None:
    """Norms, biases and scales too, of which the library may read copies."""
    model = sparse(tiny(family).to(dtype), scheme=scheme)
    engine = Engine(model)
    cache = _after_a_step(engine)
    generator = torch.Generator().manual_seed(1)
    loaded = {}
    for name, table in model.state_dict().items():
        loaded[name] = table
        if table.is_floating_point() and not name.endswith("zeros"):
            loaded[name] = table * (0.8 + 0.4 * torch.rand(table.shape, generator=generator)).to(table.dtype)
    model.load_state_dict(loaded)
    assert _usual_error(engine, cache) < LIMIT[dtype]
    assert not engine.open(cache).stale


def _usual_error(engine: Engine, cache: Any) -> float:
    """Of the middle one of three tokens: in one, a key may become another number of 16 bits."""
    errors, exact = [], Exact(engine.model)
    for seed in range(1, 4):
        expected = exact.step(random_tokens(1, 1, seed), cache)
        errors.append(error_of(engine.step(random_tokens(1, 1, seed), cache), expected))
    return sorted(errors)[1]


def _after_a_step(engine: Engine) -> Any:
    """A cache of 40 positions, on which a session is open."""
    cache = engine.new_cache(40)
    engine.prefill(random_tokens(1, 20), cache)
    engine.step(random_tokens(1, 1), cache)
    return cache


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "scheme", "name"),
    [
        ("llama", None, "model.layers.1.post_attention_layernorm.weight"),
        ("llama", None, "model.norm.weight"),
        ("llama", None, "model.rotary_emb.inv_freq"),
        ("qwen2", None, "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", None, "model.layers.1.self_attn.k_norm.weight"),
        ("llama", "int8", "model.layers.0.mlp.down_proj.scales"),
        ("llama", "int4:32", "model.layers.1.self_attn.q_proj.zeros"),
        ("gpt2", None, "transformer.h.0.mlp.c_fc.bias"),
        ("gpt2", None, "transformer.ln_f.bias"),
        ("gemma3_text", None, "model.layers.1.post_feedforward_layernorm.weight"),
        ("gemma3_text", None, "model.layers.0.self_attn.q_norm.weight"),
        ("gpt_neox", None, "gpt_neox.layers.1.post_attention_layernorm.bias"),
        ("stablelm-2-12b", None, "model.layers.1.self_attn.q_layernorm.norms.2.weight"),
        ("persimmon", None, "model.layers.0.self_attn.k_layernorm.bias"),
        ("bitnet", None, "model.layers.1.mlp.ffn_sub_norm.weight"),
        ("granite_swa", None, "model.layers.1.self_attn.sinks"),
        ("apertus", None, "model.layers.0.mlp.act_fn.alpha_n"),
        ("bloom", None, "transformer.word_embeddings_layernorm.bias"),
    ],
)
def test_a_small_tensor_that_is_written_between_tokens(family: str, scheme: str | None, name: str) -> None:
    model = sparse(tiny(family).to(torch.bfloat16), scheme=scheme)
    engine = Engine(model)
    cache = _after_a_step(engine)
    path, _, last = name.rpartition(".")
    getattr(model.get_submodule(path), last).mul_(4)
    assert _usual_error(engine, cache) < LIMIT[torch.bfloat16]


@needs_library
@torch.no_grad()
def test_a_session_does_not_keep_weights_that_a_plan_moves() -> None:
    """One table for a site, then one for each projection: the first must go before the others come."""
    model = sparse(tiny("llama"))
    engine, control = Engine(model), control_of(model)
    cache = engine.new_cache(30)
    engine.prefill(random_tokens(1, 20), cache)
    with control.counting() as counter:
        engine.step(random_tokens(1, 1), cache)
        counted = counter.by_projection()
        session = engine.open(cache)
        memory = StorageWeakRef(model.model.layers[0].self_attn.q_proj.merged.table.untyped_storage())
        assert not memory.expired()
        apply_plan_(model, plan_for(model, "apart"))
        assert memory.expired()
        assert session.stale
        assert counter.by_projection() == counted


@needs_library
@torch.no_grad()
def test_counting_begins_and_ends_with_its_block() -> None:
    """Steps before and between two countings are in neither, and a second cache adds its own."""
    model = sparse(tiny("llama"))
    control, found = control_of(model), {}
    for path in ("general", "native"):
        engine, into = Engine(model, path=path), found.setdefault(path, [])
        cache, other = engine.new_cache(30), engine.new_cache(8)
        engine.prefill(random_tokens(1, 20), cache)
        engine.prefill(random_tokens(1, 4, 5), other)
        engine.step(random_tokens(1, 1), cache)
        for seed in (1, 3):
            with control.counting() as counter:
                engine.step(random_tokens(1, 1, seed), cache)
                into.append(counter.by_projection())
                engine.step(random_tokens(1, 1, 4), other)
            into.append(counter.by_projection())
            with control.switched_off():
                engine.step(random_tokens(1, 1, seed + 1), cache)
            into.append(counter.by_projection())
    assert found["native"] == found["general"]
    assert set(found["native"][0]) == set(sparse_layers(model))


@needs_library
@torch.no_grad()
def test_a_cache_is_filled_to_its_last_position_and_not_beyond() -> None:
    engine = Engine(build_model("llama"))
    cache = engine.new_cache(5)
    engine.prefill(random_tokens(2, 4), cache)
    engine.step(random_tokens(2, 1), cache)
    with pytest.raises(ArtefactError, match="cache is full: it was made for 5 positions"):
        engine.step(random_tokens(2, 1), cache)


@pytest.mark.parametrize("chunks", [[20, 12], [16, 16, 1], [1, 14, 2, 31], [3] * 7, [40]], ids=str)
def test_the_cache_has_what_a_fixed_one_has(chunks: list[int]) -> None:
    ours, plain = NativeCache(1, 55), FixedCache(1, 55)
    generator = torch.Generator().manual_seed(0)
    for count in chunks:
        keys, values = (torch.randn(2, 3, count, 8, generator=generator, dtype=torch.bfloat16) for _ in range(2))
        first = ours.length == 0
        got, expected = (cache.update(keys, values, 0) for cache in (ours, plain))
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        assert (got[0] is keys) == first
    layer = ours.layers[0]
    assert (layer.keys.shape, layer.values.shape) == ((2, 3, 4, 8, 16), (2, 3, 64, 8))
    assert layer.keys.dtype == torch.bfloat16
    positions = torch.arange(64)
    by_position = layer.keys[:, :, positions // 16, :, positions % 16].permute(1, 2, 0, 3)
    assert torch.equal(by_position[:, :, :55], plain.layers[0].keys)
    assert not by_position[:, :, sum(chunks) :].any()
    ours.advance()
    assert (ours.length, ours.row_lengths(), ours.layers[0].get_max_length()) == (
        sum(chunks) + 1,
        [sum(chunks) + 1] * 2,
        55,
    )


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("family", "model type codegen"),
        ("backend", "backend reference"),
        ("dtype", "dtype float64"),
        ("activation", "activation tanh"),
        ("rope", "rope type spiral"),
        ("devices", "weights on several devices"),
        ("elsewhere", "weights on meta"),
        ("hook", "weights on several devices"),
        ("width", "embeddings of another width than the hidden states"),
        ("last norm", "no norm in front of the output layer"),
        ("no library", "several times slower: switched off by TEAL_NATIVE=off"),
    ],
)
def test_unsupported(what: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build_model("opt") if what == "width" else sparse(tiny("opt" if what == "last norm" else "llama"))
    config = model.config
    if what == "family":
        config.model_type = "codegen"  # whose blocks are not alike
        model.model.layers[0].more = torch.nn.Linear(2, 2)
    elif what == "backend":
        control_of(model).backend = "reference"
    elif what == "dtype":
        model.double()
    elif what == "activation":
        config.hidden_act = "tanh"
    elif what == "rope":
        config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    elif what == "devices":
        model.lm_head.to("meta")
    elif what == "elsewhere":
        model.to("meta")
    elif what == "hook":
        model.model.layers[1]._hf_hook = object()
    elif what == "last norm":
        model.model.decoder.final_layer_norm = None
    elif what == "no library":
        monkeypatch.setenv("TEAL_NATIVE", "off")
    control = None if what == "width" else control_of(model)
    assert NativePath.unsupported(model, control) == reason
    if what == "no library":
        assert (Engine(model).path.name, Engine(model).general_because) == ("general", reason)


def test_a_machine_without_the_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, which says what it costs."""
    monkeypatch.setenv("TEAL_NATIVE", "off")
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    said = ["--prompt", "the stars", "--max-new-tokens", "3", "--device", "cpu"]
    assert run(["generate", "--model", str(out), *said]) == 0
    lines = [line for line in " ".join(capsys.readouterr().err.split()).split(")") if "transformers' forward" in line]
    assert len(lines) == 1
    assert "not our own (several times slower: switched off by TEAL_NATIVE=off" in lines[0]


@needs_library
def test_a_variant_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_NATIVE", "abacus")
    with pytest.raises(MachineError, match="TEAL_NATIVE=abacus cannot run here"):
        Engine(build_model("llama"))


@needs_library
@torch.no_grad()
def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build_model("llama"))
    engine.check(random_tokens(1, 12))
    monkeypatch.setattr(engine.path, "blocks", engine.path.blocks[::-1])
    engine._checked.clear()
    engine.check(random_tokens(1, 12))
    assert (engine.path.name, engine.general_because) == ("general", "the native path gives other logits")
    engine = Engine(build_model("llama"), path="native")
    monkeypatch.setattr(engine.path, "blocks", engine.path.blocks[::-1])
    with pytest.raises(ArtefactError, match=r"\(native path, dense\) does not give .* use --backend reference"):
        engine.check(random_tokens(1, 12))
