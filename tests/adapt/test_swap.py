"""Recipes relu, prosparse and drelu: surgery, the dense model inside it, their losses, and runs from end to end."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, build_family, save_tiny
from torch import Tensor

from teal_cli.adapt.multiplier import staged
from teal_cli.adapt.recipe import Batch, Progress, Recipe, Setting
from teal_cli.adapt.recipes import recipe_class
from teal_cli.cli import run as teal
from teal_cli.config.recipes import options_of
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_loading import load_model
from teal_cli.models.layers import Experts
from teal_cli.steps import adapt as step


def _ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def _recipe(name: str, **options: object) -> Recipe:
    return recipe_class(name)(Setting(options_of(name)(**options), 0, None, 0))


def _operated(model: Any, recipe: Recipe) -> Any:
    recipe.check(model)
    recipe.operate_(model, recipe.measure(model, _ids()))
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize(
    ("name", "options"), [("relu", {}), ("prosparse", {}), ("drelu", {}), ("drelu", {"flips": False})], ids=str
)
def test_surgery_is_the_formula_and_can_be_undone(name: str, options: dict[str, object], family: str) -> None:
    """Inside `as_dense` the model gives the dense one's logits bit for bit, signs flipped or not."""
    model = build_family(family)
    dense = model(_ids()).logits
    recipe = _recipe(name, **options)
    _operated(model, recipe)
    trained = model(_ids()).logits
    assert not torch.allclose(trained, dense, rtol=0.01)
    mlp, x = model.model.layers[1].mlp, torch.randn(3, 64)
    if isinstance(getattr(mlp, "experts", None), Experts):
        both = torch.randn(5, 200)
        gate, up = both.chunk(2, dim=-1)
        found = mlp.experts.neurons(both)
    else:
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1) if family == "phi3" else (mlp.gate_proj(x), mlp.up_proj(x))
        found = mlp(x)
    hidden = gate.clamp(min=0) * (up.clamp(min=0) if name == "drelu" else up)
    expected = hidden if found.shape == hidden.shape else mlp.down_proj(hidden)
    torch.testing.assert_close(found, expected)
    inside = recipe.as_dense(model)
    assert inside is not None
    with inside:
        assert torch.equal(model(_ids()).logits, dense)
    assert torch.equal(model(_ids()).logits, trained)


@torch.no_grad()
def test_flips_begin_nearer_to_the_dense_model() -> None:
    """That is what they are for."""
    dense = build_family("llama")(_ids()).logits.log_softmax(-1)
    losses = []
    for flips in (True, False):
        model = _operated(build_family("llama"), _recipe("drelu", flips=flips))
        found = model(_ids()).logits.log_softmax(-1)
        losses.append(float(torch.nn.functional.kl_div(found, dense, log_target=True, reduction="sum")))
    assert losses[0] < 0.9 * losses[1]


def _pass(model: Any, recipe: Recipe) -> float:
    ids = _ids()
    with recipe.student_pass(model, Batch(ids, torch.zeros(2, dtype=torch.int64))):
        model(ids)
    found = recipe.realised_sparsity()
    assert found is not None
    return found


def test_the_extra_loss_is_its_weight_times_the_size_of_neurons() -> None:
    """By the step, in units of the dense model; looks at the held-out text steer nothing."""
    model, recipe = build_family("llama"), _recipe("prosparse", l1=2.0)
    _operated(model, recipe)
    found = {}
    for number in (0, 10, 40, 100):
        zeros = _pass(model, recipe)
        loss = recipe.extra_loss(Progress("prosparse", number, 100, zeros))
        assert loss is not None
        found[number] = float(loss.detach())
        figures = recipe.figures(Progress("prosparse", number, 100, zeros))
        assert figures["hidden_zeros"] == zeros
        assert 0.3 < figures["gate_zeros"] <= zeros
    assert found[0] == 0.0
    assert found[10] == 0.0
    assert found[40] == pytest.approx(0.3 * found[100])
    assert 0.3 < found[100] / 2.0 < 1.5  # about as large as the dense model's neurons
    fixed = _recipe("prosparse", l1=2.0, growth="fixed")
    _operated(build_family("llama"), fixed)
    assert _recipe("relu").extra_loss(Progress("relu", 1, 2, None)) is None


def test_a_steered_weight_is_resumed() -> None:
    recipe = _recipe("prosparse", l1=0.5, zeros=0.9)
    first = _operated(build_family("llama"), recipe)
    for number in (0, 10, 30):
        zeros = _pass(first, recipe)
        recipe.extra_loss(Progress("prosparse", number, 100, zeros))
    weight = recipe.figures(Progress("prosparse", 30, 100, None))["l1_weight"]
    assert weight > 0.5  # zeros are too few
    with torch.no_grad():
        recipe.extra_loss(Progress("prosparse", 90, 100, _pass(first, recipe)))
    assert recipe.figures(Progress("prosparse", 30, 100, None))["l1_weight"] == weight
    resumed = _recipe("prosparse", l1=0.5, zeros=0.9)
    model = _operated(build_family("llama"), resumed)
    resumed.load_state(recipe.state())
    figures = []
    for each, its in ((recipe, first), (resumed, model)):
        each.extra_loss(Progress("prosparse", 31, 100, _pass(its, each)))
        figures.append(each.figures(Progress("prosparse", 31, 100, None)))
    assert figures[0] == figures[1]
    assert figures[0]["l1_weight"] != weight


def test_steering_knows_how_many_passes_a_step_has() -> None:
    """As many looks at the same share of zeros in the same part of the run add up to the same."""
    totals = []
    for accumulate in (1, 4):
        recipe = _recipe("prosparse", l1=0.5, zeros=0.9)
        model = _operated(build_family("llama"), recipe)
        for number in range(3):
            for _ in range(accumulate):
                zeros = _pass(model, recipe)
                recipe.extra_loss(Progress("prosparse", 50 + number, 100, zeros, accumulate))
        totals.append(float(recipe.state()["steering"][1]))
    assert totals[0] > 0
    assert totals[1] == pytest.approx(totals[0])


def test_only_the_first_stages_are_a_warm_up() -> None:
    stages = [(0.2, 0.0), (0.4, 0.5), (0.6, 0.0), (1.0, 1.0)]
    assert staged(0.3, stages) == 0.5
    assert staged(0.61, stages) < 0.01
    assert staged(0.8, stages) == pytest.approx(0.5)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="give l1"):
        _recipe("prosparse", l1=0.0, zeros=0.5).check(build_family("llama"))
    with pytest.raises(ArtefactError, match="drelu needs MLPs that are only gated"):
        _recipe("drelu").check(build_family("gpt2"))
    for stages in ([[0.5, 1.0]], [[0.5, 1.0], [0.5, 2.0], [1.0, 2.0]], [[1.0, -1.0]]):
        with pytest.raises(ValueError, match="stages"):
            _recipe("prosparse", stages=stages)


@pytest.mark.parametrize(
    ("name", "options", "flags"),
    [
        ("prosparse", "l1=0.5,zeros=0.8,live_dropped=0.2", ()),
        ("drelu", "l1=0.2", ("--lora", 2) if find_spec("peft") else ()),
    ],
    ids=["prosparse", "drelu"],
)
def test_a_run_leaves_an_ordinary_folder(
    tmp_path: Path,
    corpus: Path,
    name: str,
    options: str,
    flags: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its logits are those of the model that was trained, and the command that is named next measures it."""
    source = save_tiny(tmp_path / "tiny")
    trained: list[Tensor] = []
    write = step.write_adapted

    def keep(source: Path, out: Path, model: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            trained.append(model(_ids()).logits)
        write(source, out, model, *args, **kwargs)

    monkeypatch.setattr(step, "write_adapted", keep)
    sizes = ("--tokens", 512, "--seq-len", 32, "--batch-size", 2, "--held-out-tokens", 64, "--learning-rate", 1e-3)
    own = ("--options", options) if options else ()
    places = ("--model", source, "--dataset", corpus, "--out", "out")
    arguments = [*map(str, ("adapt", "--recipe", name, *places, *sizes, *own, *flags))]
    assert teal(arguments) == 0
    loaded = load_model(Path("out"), device="cpu", dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(_ids()).logits, trained[0])
        dense = load_model(source, device="cpu", dtype="auto")(_ids()).logits
    assert not torch.allclose(trained[0], dense, rtol=0.01)
    config, record = (json.loads(Path("out", file).read_text()) for file in ("config.json", "adapt.json"))
    assert config["hidden_act"] == {"relu": "relu", "prosparse": "fatrelu", "drelu": "drelu"}[name]
    zeros = record["notes"]["zeros"]
    assert all(0.3 < share < 1.0 for share in (*zeros["gate"], *zeros["hidden"]))
    if name == "prosparse":
        assert len(config["hidden_act_param"]) == 2
        assert zeros["gate"] > record["notes"]["zeros_with_relu"]["gate"]
        assert {"l1_weight", "gate_zeros", "hidden_zeros"} <= record["curve"][1].keys()
    if name == "drelu":
        assert 0.2 < record["notes"]["flipped"] < 0.8
        return
    onward = shlex.split(capsys.readouterr().err.split("next: teal ")[1].splitlines()[0])
    text = ("--text", corpus, "--tokens", 64, "--seq-len", 32, "--json", "e.json")
    assert teal([*onward, *map(str, text)]) == 0
    assert json.loads(Path("e.json").read_text())["sparse"]["neuron_sparsity"] > 0.3
