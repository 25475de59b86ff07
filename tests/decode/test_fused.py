"""The fused decode path in Triton's interpreter, against transformers' forward with the reference backend."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS, VOCABULARY, build_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from teal_cli.checkpoint.plan import ProjectionPlan, SparsityPlan
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine, TokenLoop
from teal_cli.decode.paths.fused import FusedDecoder, Session, unsupported_reason
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparsityControl, apply_plan_, sparse_layers, sparsify_
from teal_kernels import triton_decode
from teal_kernels.triton_gemv import MAX_ROWS, TileConfig
from teal_kernels.tuning_entries import Entry, Provenance
from teal_kernels.tuning_files import keep_entries

LIMIT = 1e-5  # relative; float32 sums in another order give 1e-6
THRESHOLDS = {"attention_input": 0.5, "attention_output": 0.2, "mlp_input": 0.6, "mlp_intermediate": 0.3}
PROMPT = 20
STEPS = 8


@pytest.fixture(autouse=True)
def _cuts_for_the_interpreter(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, which is what the interpreter pays for; two stretches of inputs and two blocks of outputs stay."""
    cuts = {0.0: TileConfig(64, 64, 1, 64, 1, dense=True), 0.5: TileConfig(64, 64, 1, 64, 1)}
    entries = [Entry(64, (64,), "float32", 1, "plain", s, 10.0 - 10.0 * s, cut) for s, cut in cuts.items()]
    keep_entries(entries, "cpu", Provenance())
    monkeypatch.setattr(triton_decode, "_ATTENTION_PROGRAMS", 2)
    monkeypatch.setattr(triton_decode, "_ATTENTION_BLOCK", 128)
    monkeypatch.setattr(triton_decode, "_OUTPUT_BLOCK", 256)
    monkeypatch.setattr(triton_decode, "_BATCH_OUTPUT_BLOCK", 256)


def _plan(model: nn.Module, factor: float = 1.0) -> SparsityPlan:
    """About half of the inputs; `factor` moves the thresholds."""
    thresholds = {p.name: factor * THRESHOLDS[p.site.rpartition(".")[2]] for p in find_projections(model)}
    return SparsityPlan("uniform", 0.5, {name: ProjectionPlan(0.5, value) for name, value in thresholds.items()})


def _tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class Pair:
    """One sparse model, decoded by the reference backend and by the fused path."""

    def __init__(self, model: Any, control: SparsityControl | None = None) -> None:
        self.model = model
        self.control = control or sparsify_(model, _plan(model))
        self.plain = Engine(model)
        self.compact = Engine(model)
        assert unsupported_reason(model, self.control) is None
        self.compact.decoder = FusedDecoder(model, self.control)

    def caches(self, rows: int, positions: int = 60, prompt: int = PROMPT) -> tuple[Any, FixedCache]:
        """Both caches, after the same prompt."""
        ids = _tokens(rows, prompt)
        caches = self.plain.new_cache(positions), self.compact.new_cache(positions)
        assert isinstance(caches[1], FixedCache)
        expected, got = self.plain.prefill(ids, caches[0]), self.compact.prefill(ids, caches[1])
        assert torch.equal(got, expected)
        return caches

    def step(self, token: Tensor, caches: tuple[Any, FixedCache]) -> Tensor:
        """One step of both, compared; the logits."""
        self.control.backend = "reference"
        expected = self.plain.step(token, caches[0])
        self.control.backend = "triton"
        got = self.compact.step(token, caches[1])
        assert _error(got, expected) < LIMIT
        assert caches[1].length == caches[0].get_seq_length()
        return got


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _session(pair: Pair, cache: FixedCache) -> Session:
    session = pair.compact.open(cache)
    assert session is not None
    return session


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_and_counts_equal_the_reference(family: str, rows: int) -> None:
    pair = Pair(build_model(family))
    control = pair.control
    caches = pair.caches(rows)
    tokens = _tokens(rows, STEPS, seed=1)
    control.backend = "reference"
    with control.counting() as expected_counter:
        expected = [pair.plain.step(tokens[:, i : i + 1], caches[0]) for i in range(STEPS)]
    control.backend = "triton"
    with control.counting() as counter:
        got = [pair.compact.step(tokens[:, i : i + 1], caches[1]) for i in range(STEPS)]
    for step in range(STEPS):
        assert got[step].shape == (rows, VOCABULARY)
        assert _error(got[step], expected[step]) < LIMIT
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
        pair.step(_tokens(1, 1, position), caches)


def test_dense_equals_dense_eager() -> None:
    """With sparsity switched off, and for a plan that drops nothing."""
    model = build_model("llama-bias")
    pair = Pair(build_model("llama-bias"))
    cache, compact_cache = DynamicCache(config=model.config), pair.caches(2)[1]
    with torch.no_grad():
        model(input_ids=_tokens(2, PROMPT), past_key_values=cache)
        with pair.control.switched_off(), pair.control.counting() as counter:
            for position in range(3):
                token = _tokens(2, 1, position)
                expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
                assert _error(pair.compact.step(token, compact_cache), expected) < LIMIT
        assert counter.model_wide() is None
        nothing = {name: ProjectionPlan(0.0, 0.0) for name in sparse_layers(pair.model)}
        apply_plan_(pair.model, SparsityPlan("uniform", 0.0, nothing))
        token = _tokens(2, 1, 9)
        expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
        assert _error(pair.compact.step(token, compact_cache), expected) < LIMIT


def test_a_projection_without_sparsity_keeps_everything() -> None:
    """Its threshold is not looked at, and it counts as dense."""
    model = build_model("llama")
    plan = _plan(model)
    for name in plan.projections:
        if name.endswith(("o_proj", "down_proj")):
            plan.projections[name] = ProjectionPlan(0.0, 9.0)
    pair = Pair(model, sparsify_(model, plan))
    caches = pair.caches(1)
    with pair.control.counting() as counter:
        pair.step(_tokens(1, 1), caches)
    realised = counter.by_projection()
    assert set(realised) == set(plan.projections)
    for name, share in realised.items():
        assert (share == 0.0) == name.endswith(("o_proj", "down_proj"))


@pytest.fixture
def pair() -> Pair:
    return Pair(build_model("llama"))


def test_a_session_lasts_while_nothing_changes(pair: Pair) -> None:
    caches = pair.caches(1)
    pair.control.backend = "triton"
    session = _session(pair, caches[1])
    for position in range(2):
        pair.step(_tokens(1, 1, position), caches)
    assert not session.stale
    assert _session(pair, caches[1]) is session


@pytest.mark.parametrize("change", ["plan", "switched off", "dense", "second prefill"])
def test_what_makes_a_session_stale(pair: Pair, change: str) -> None:
    """And the steps after it are right, within the change and after it."""
    control, caches = pair.control, pair.caches(1)
    control.backend = "triton"
    pair.step(_tokens(1, 1), caches)
    session = _session(pair, caches[1])
    assert not session.stale
    context: Any = nullcontext()
    if change == "plan":
        apply_plan_(pair.model, _plan(pair.model, 1.5))
    elif change == "switched off":
        context = control.switched_off()
    elif change == "dense":
        context = control.dense()
    else:
        for engine, cache in zip((pair.plain, pair.compact), caches, strict=True):
            engine.prefill(_tokens(1, 5, 7), cache)
    with context:
        assert session.stale
        pair.step(_tokens(1, 1, 1), caches)
        assert _session(pair, caches[1]) is not session
    pair.step(_tokens(1, 1, 2), caches)


def test_two_caches_at_once(pair: Pair) -> None:
    """Sessions of one decoder share nothing that one step leaves for the next."""
    first, second = pair.caches(1), pair.caches(2, prompt=7)
    for position in range(2):
        pair.step(_tokens(1, 1, position), first)
        pair.step(_tokens(2, 1, position), second)


def test_a_cache_is_filled_to_its_last_position_and_not_beyond(pair: Pair) -> None:
    caches = pair.caches(1, positions=PROMPT + 1)
    pair.step(_tokens(1, 1), caches)
    with pytest.raises(ArtefactError, match=f"cache is full: it was made for {PROMPT + 1} positions"):
        pair.compact.step(_tokens(1, 1), caches[1])


def test_a_cache_that_was_reset(pair: Pair) -> None:
    caches = pair.caches(1)
    pair.step(_tokens(1, 1), caches)
    caches[1].reset()
    fresh = pair.plain.new_cache(60)
    for engine, cache in ((pair.plain, fresh), (pair.compact, caches[1])):
        engine.prefill(_tokens(1, 6, 8), cache)
    pair.step(_tokens(1, 1, 1), (fresh, caches[1]))


def test_a_prompt_of_one_token(pair: Pair) -> None:
    caches = pair.caches(2, prompt=1)
    pair.step(_tokens(2, 1), caches)


def test_logits_of_a_step_are_not_overwritten_by_the_next(pair: Pair) -> None:
    cache = pair.caches(1)[1]
    first = pair.compact.step(_tokens(1, 1), cache)
    kept = first.clone()
    pair.compact.step(_tokens(1, 1, 1), cache)
    assert torch.equal(first, kept)


def test_a_batch_of_nine_is_refused(pair: Pair) -> None:
    cache = pair.compact.new_cache(8)
    pair.compact.prefill(_tokens(MAX_ROWS + 1, 4), cache)
    with pytest.raises(UsageError, match=r"a batch of 9 is more than .* \(8\)"):
        pair.compact.step(_tokens(MAX_ROWS + 1, 1), cache)


def test_counting_begins_and_ends_with_its_block(pair: Pair) -> None:
    """Steps before and between two countings are in neither, and a second cache adds its own."""
    caches, control = pair.caches(1), pair.control
    control.backend = "triton"
    realised = []
    reference = []
    for engine, cache, into in ((pair.plain, caches[0], reference), (pair.compact, caches[1], realised)):
        control.backend = "reference" if engine is pair.plain else "triton"
        engine.step(_tokens(1, 1), cache)
        with control.counting() as counter:
            engine.step(_tokens(1, 1, 1), cache)
            into.append(counter.by_projection())
        engine.step(_tokens(1, 1, 2), cache)
        with control.counting() as counter:
            engine.step(_tokens(1, 1, 3), cache)
            into.append(counter.by_projection())
            other = engine.new_cache(8)
            engine.prefill(_tokens(1, 4, 5), other)
            engine.step(_tokens(1, 1, 4), other)
            into.append(counter.by_projection())
    assert realised == reference
    assert realised[0] != realised[1] != realised[2]


def test_a_counter_stays_as_it_was_when_its_block_ended(pair: Pair) -> None:
    cache = pair.caches(1)[1]
    with pair.control.counting() as counter:
        pair.compact.step(_tokens(1, 1), cache)
        at_the_end = counter.by_projection()
    pair.compact.step(_tokens(1, 1, 1), cache)
    assert counter.by_projection() == at_the_end


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_token_loop_equals_stepping_by_hand(pair: Pair, temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=20, seed=3)
    plain_cache, cache = pair.caches(2)
    by_hand = Sampler(sampling, pair.plain.device)
    token, expected = _tokens(2, 1), []
    pair.control.backend = "reference"
    for _ in range(5):
        token = by_hand.next_token(pair.plain.step(token, plain_cache))
        expected.append(token.tolist())
    pair.control.backend = "triton"
    loop = TokenLoop(pair.compact, cache, _tokens(2, 1), Sampler(sampling, pair.compact.device))
    assert [loop.advance().tolist() for _ in range(5)] == expected
    assert len({str(tokens) for tokens in expected}) > 1
    assert cache.length == PROMPT + 5


def test_token_loop_follows_a_change_of_plan(pair: Pair) -> None:
    """And goes on with the token that it had chosen."""
    plain_cache, cache = pair.caches(1)
    greedy = Sampler(SamplingConfig(), pair.plain.device)
    plans = [_plan(pair.model), _plan(pair.model, 2.0)]
    token, expected = _tokens(1, 1), []
    for step in range(4):
        apply_plan_(pair.model, plans[step // 2])
        with pair.control.switched_off() if step == 3 else nullcontext():
            token = greedy.next_token(pair.plain.step(token, plain_cache))
        expected.append(int(token))
    apply_plan_(pair.model, plans[0])
    loop = TokenLoop(pair.compact, cache, _tokens(1, 1), greedy)
    got = []
    for step in range(4):
        if step == 2:
            apply_plan_(pair.model, plans[1])
        with pair.control.switched_off() if step == 3 else nullcontext():
            got.append(int(loop.advance()))
    assert got == expected


def test_generate(pair: Pair) -> None:
    """The same tokens as without the fused path, and the same counts."""
    found = {}
    for engine, backend in ((pair.plain, "reference"), (pair.compact, "triton")):
        pair.control.backend = backend
        with pair.control.counting() as counter:
            tokens = list(engine.generate(_tokens(1, 9), max_new_tokens=5, sampling=SamplingConfig()))
            found[backend] = tokens, counter.by_projection()
    assert found["triton"] == found["reference"]
    assert len(found["triton"][0]) == 5


def test_a_dense_model_is_laid_out_for_the_compact_path() -> None:
    """What an engine does on a GPU: layers of sparsity zero, no second copy of the weights, the same logits."""
    model = build_model("qwen3")
    cache = DynamicCache(config=model.config)
    token = _tokens(1, 1)
    with torch.no_grad():
        model(input_ids=_tokens(1, PROMPT), past_key_values=cache)
        expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
    size = sum(parameter.nbytes for parameter in model.parameters())
    engine = Engine(model)
    engine.decoder = engine._compact_decoder()
    assert engine.general_because is None
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == size
    fixed = engine.new_cache(PROMPT + 1)
    engine.prefill(_tokens(1, PROMPT), fixed)
    assert _error(engine.step(token, fixed), expected) < LIMIT


def test_an_unknown_model_takes_the_general_path() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    engine = Engine(AutoModelForCausalLM.from_config(config).eval())
    assert engine._compact_decoder() is None
    assert engine.general_because == "model type gpt2"


def test_a_dense_model_that_cannot_take_the_compact_path_is_left_alone() -> None:
    model = build_model("llama")
    model.config.hidden_act = "gelu"
    engine = Engine(model)
    assert engine._compact_decoder() is None
    assert engine.general_because == "activation gelu"
    assert not sparse_layers(model)


def test_different_thresholds_of_one_site_are_not_side_by_side_on_the_cpu() -> None:
    model = build_model("llama")
    plan = _plan(model)
    plan.projections["model.layers.1.self_attn.k_proj"] = ProjectionPlan(0.5, 0.7)
    assert unsupported_reason(model, sparsify_(model, plan)) == "projections that are not side by side"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("family", "model type gemma"),
        ("no GPU", "no GPU"),
        ("backend", "backend reference"),
        ("dtype", "the triton backend takes float16, bfloat16 and float32, not torch.float64"),
        ("activation", "activation gelu"),
        ("rope", "rope type dynamic"),
        ("devices", "weights on several devices"),
        ("hook", "weights on several devices"),
        ("moved", "projections that are not side by side"),
    ],
)
def test_unsupported_reason(pair: Pair, what: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = pair.model, pair.model.config
    if what == "family":
        config.model_type = "gemma"
    elif what == "no GPU":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    elif what == "backend":
        pair.control.backend = "reference"
    elif what == "dtype":
        model.double()
    elif what == "activation":
        config.hidden_act = "gelu"
    elif what == "rope":
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    elif what == "devices":
        model.lm_head.to("meta")
    elif what == "hook":
        model.model.layers[1]._hf_hook = object()
    else:
        model.to(torch.bfloat16)
    assert unsupported_reason(model, pair.control) == reason


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(20, 12), (20, 1), (1, 20), (5, 5)], ids=str)
@pytest.mark.parametrize("of", ["llama", "mistral", "qwen2-window"])
def test_a_fixed_cache_behaves_as_a_dynamic_one(of: str, chunks: tuple[int, int]) -> None:
    """In a prefill of two chunks; the windows are shorter than the prompt."""
    shape = dict(TINY_CONFIGS[of.removesuffix("-window")])
    if of == "qwen2-window":
        shape |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2)
    dynamic, fixed = DynamicCache(config=model.config), FixedCache(model.config.num_hidden_layers, 40)
    ids = _tokens(2, sum(chunks))
    for chunk in ids.split(list(chunks), dim=1):
        expected, got = (model(input_ids=chunk, past_key_values=cache).logits for cache in (dynamic, fixed))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert fixed.get_seq_length() == dynamic.get_seq_length() == fixed.length == sum(chunks)
    everything = model(input_ids=ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(got[:, -1], everything, rtol=1e-4, atol=1e-5)


def test_a_fixed_cache_keeps_its_memory() -> None:
    cache = FixedCache(1, 10)
    layer = cache.layers[0]
    assert (cache.length, layer.get_max_length(), layer.get_max_cache_shape()) == (0, 10, 10)
    states = torch.randn(2, 3, 4, 8)
    keys, values = layer.update(states, states * 2)
    assert torch.equal(keys, states)
    assert torch.equal(values, states * 2)
    address = layer.keys.data_ptr()
    assert layer.get_mask_sizes(5) == (9, 0)
    keys, _ = layer.update(states[:, :, :1] + 1, states[:, :, :1])
    assert torch.equal(keys, torch.cat([states, states[:, :, :1] + 1], dim=2))
    cache.advance()
    assert (cache.length, layer.keys.data_ptr(), layer.keys.shape) == (6, address, (2, 3, 10, 8))
    assert not layer.keys[:, :, 5:].any()  # a masked read of them must not find NaN
    cache.reset()
    assert (cache.length, layer.keys.data_ptr()) == (0, address)
