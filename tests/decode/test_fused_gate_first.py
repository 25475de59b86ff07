"""Models that are sparse by their activation on the fused path, in the interpreter, against transformers' forward."""

from pathlib import Path

import pytest
import torch
from covering import covering
from fused_pair import LIMIT, Pair, error_of, random_tokens, session_of, use_small_tiles
from intrinsic_models import KINDS, save_kind
from native_models import check_steps, tiny

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Rule, Threshold, Zeros
from teal_cli.decode import choice
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.native import NativePath
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import UsageError
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import control_of, make_intrinsic_, sparsify_
from teal_cli.sparse.gate_first import GateFirstMLP

THRESHOLDS = {"attention_input": 0.5, "attention_output": 0.2}
STEPS = 4


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


def _pair(tmp_path: Path, kind: str, thresholds: bool = False) -> Pair:
    model = load_model(save_kind(tmp_path / kind, kind), device="cpu", dtype="float32")
    elsewhere = None
    if thresholds:
        sites = {p.name: p.site.rpartition(".")[2] for p in find_projections(model)}
        rules: dict[str, Rule] = {
            name: Threshold(THRESHOLDS[site], 0.5) for name, site in sites.items() if site in THRESHOLDS
        }
        elsewhere = SparsityPlan("uniform", 0.5, rules)
    make_intrinsic_(model, elsewhere)
    return Pair(model, control_of(model))


@covering(2, kind=list(KINDS), rows=[1, 2, 4], thresholds=[False, True])
def test_logits_and_counts_equal_the_reference(tmp_path: Path, kind: str, rows: int, thresholds: bool) -> None:
    pair = _pair(tmp_path, kind, thresholds)
    control, caches = pair.control, pair.caches(rows)
    tokens = random_tokens(rows, STEPS, seed=1)
    logits, counted = {}, {}
    for engine, cache, backend in ((pair.plain, caches[0], "reference"), (pair.fused, caches[1], "triton")):
        control.backend = backend
        with control.counting() as counter:
            logits[backend] = [engine.step(tokens[:, i : i + 1], cache) for i in range(STEPS)]
            counted[backend] = counter.by_projection()
    for got, expected in zip(logits["triton"], logits["reference"], strict=True):
        assert error_of(got, expected) < LIMIT
    assert counted["triton"] == counted["reference"]
    for block in range(2):
        shares = {name: counted["triton"][f"model.layers.{block}.mlp.{name}"] for name in ("gate_proj", "up_proj")}
        assert shares["gate_proj"] == 0.0
        assert 0.3 < shares["up_proj"] < 0.9
        assert (counted["triton"][f"model.layers.{block}.self_attn.q_proj"] > 0.2) == thresholds


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fatrelu", "relu2", "bamboo"])
def test_rows_of_different_lengths(tmp_path: Path, kind: str) -> None:
    """Each row gives what it gives alone, in one pass over its text."""
    engine = _pair(tmp_path, kind, thresholds=True).fused
    lengths = [3, 9, 6]
    ids, tokens = random_tokens(3, max(lengths)), random_tokens(3, STEPS, seed=1)
    cache = engine.new_cache(max(lengths) + STEPS)
    engine.prefill(ids, cache, torch.tensor(lengths))
    got = [engine.step(tokens[:, i : i + 1], cache) for i in range(STEPS)]
    for row, length in enumerate(lengths):
        expected = engine.without_cache(ids[row : row + 1, :length], tokens[row : row + 1])[0]
        for step in range(STEPS):
            assert error_of(got[step][row], expected[step]) < LIMIT


@pytest.mark.parametrize("kind", ["fatrelu", "relu2", "bamboo", "relu-bias"])
@pytest.mark.parametrize("rows", [1, 3])
def test_dense_steps_compute_every_neuron(tmp_path: Path, kind: str, rows: int) -> None:
    """Switched off, and as prompts do; nothing is counted, and sparse steps go on after them."""
    pair = _pair(tmp_path, kind, thresholds=True)
    caches = pair.caches(rows)
    for position, dense in enumerate((pair.control.switched_off, pair.control.dense)):
        with dense(), pair.control.counting() as counter:
            pair.step(random_tokens(rows, 1, position), caches)
            assert not session_of(pair, caches[1]).enabled
        assert counter.model_wide() is None
    pair.step(random_tokens(rows, 1, 2), caches)
    assert session_of(pair, caches[1]).enabled


def test_rows_of_dead_neurons_are_not_read(tmp_path: Path) -> None:
    """An infinity in them would show in a dense step."""
    pair = _pair(tmp_path, "relu-bias")
    for block in pair.model.model.layers:
        dead = slice(0, 7)
        block.mlp.gate_proj.weight.data[dead] = 0.0
        block.mlp.gate_proj.bias.data[dead] = -1.0
    cache = pair.caches(1)[1]
    pair.control.backend = "triton"
    expected = pair.fused.step(random_tokens(1, 1), cache)
    for block in pair.model.model.layers:
        block.mlp.up_proj.weight.data[dead] = torch.inf
    cache.shorten([cache.length - 1])
    assert torch.equal(pair.fused.step(random_tokens(1, 1), cache), expected)


def test_generate_checks_itself_and_measures_which_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the engine takes the path by itself. Nobody knows how many neurons are dead, so both ways are timed."""
    monkeypatch.setattr(FusedPath, "devices", ("cpu",))
    monkeypatch.setattr(NativePath, "devices", ())
    monkeypatch.setattr(choice, "LEAST_BYTES", 0)
    pair = _pair(tmp_path, "fatrelu")
    engine = Engine(pair.model, never_worse=True)
    assert (engine.path.name, engine.general_because) == ("fused", None)
    prompt = random_tokens(1, 9)
    found = list(engine.generate(prompt, max_new_tokens=5, sampling=SamplingConfig()))
    pair.control.backend = "reference"
    assert found == list(pair.plain.generate(prompt, max_new_tokens=5, sampling=SamplingConfig()))
    assert engine.choose(prompt).sparse_seconds is not None


def test_a_gate_that_does_not_lie_row_by_row_is_refused(tmp_path: Path) -> None:
    model = _pair(tmp_path, "relu").model
    gate = model.model.layers[1].mlp.gate_proj
    gate.weight.data = gate.weight.data.t().contiguous().t()
    reason = "gate and up of model.layers.1.mlp that do not lie row by row"
    assert FusedPath.unsupported(model, control_of(model)) == reason
    with pytest.raises(UsageError, match=reason):
        Engine(model, path="fused")


def test_zeros_before_down_of_an_mlp_that_is_not_gate_first(tmp_path: Path) -> None:
    """With a plan for gate and up, the MLP stays as it is: a gated product, and zeros behind it."""
    model = load_model(save_kind(tmp_path / "relu", "relu"), device="cpu", dtype="float32")
    rules: dict[str, Rule] = {p.name: Dense() for p in find_projections(model)}
    for name in (name for name in rules if ".mlp." in name):
        rules[name] = Zeros() if name.endswith("down_proj") else Threshold(0.3, 0.3)
    pair = Pair(model, sparsify_(model, SparsityPlan("uniform", 0.3, rules)))
    caches = pair.caches(1)
    with pair.control.counting() as counter:
        pair.step(random_tokens(1, 1), caches)
    found = counter.by_projection()
    assert 0.3 < found["model.layers.0.mlp.down_proj"] < 0.7
    assert 0.1 < found["model.layers.0.mlp.up_proj"] < 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes", "gate_first"),
    [
        ("gemma2", {"hidden_activation": "relu"}, True),  # norms before and after, which add to the stream
        ("olmo2", {"hidden_act": "relu2"}, True),
        ("cohere2", {"hidden_act": "relu"}, True),  # a layer norm, and an MLP beside the attention
        ("granite", {"hidden_act": "relu"}, True),
        ("glm4", {"hidden_act": "relu2"}, False),  # gate and up are one projection: only zeros are skipped
        ("opt", {}, False),  # MLPs without a gate
        ("nemotron", {}, False),
    ],
)
@pytest.mark.parametrize("lengths", [[12], [12, 5]], ids=str)
def test_other_families(family: str, changes: dict[str, str], gate_first: bool, lengths: list[int]) -> None:
    """Counts too."""
    model = tiny(family, **changes)
    make_intrinsic_(model)
    assert any(isinstance(module, GateFirstMLP) for module in model.modules()) == gate_first
    check_steps(model, lengths, 2, path="fused")
