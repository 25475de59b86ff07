"""What the plots draw, against the numbers that they are of."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from teal_cli.calibration import histogram
from teal_cli.report.distributions import distribution_plots
from teal_cli.report.drawing import Plot, inline_svg
from teal_cli.report.inputs import Material, read_material
from teal_cli.report.maps import sparsity_plots
from teal_cli.report.plots import quality_plots, speed_plots
from teal_cli.report.training import training_plots


@pytest.fixture(scope="module")
def material(finished_run: Path) -> Material:
    return read_material(finished_run)


def _drawn(plot: Plot) -> Figure:
    figure = Figure()
    plot.draw(figure)
    return figure


def test_sparsity_of_batches_and_of_the_held_out_slice_are_two_lines() -> None:
    """Both are logged at a step where the slice is looked at: one line through both went up and down there."""
    curve = [
        {"stage": 0, "step": 0, "held_out_loss": 0.3, "sparsity": 0.50},
        {"stage": 0, "step": 5, "loss": 0.4, "sparsity": 0.40},
        {"stage": 0, "step": 5, "held_out_loss": 0.2, "sparsity": 0.48},
        {"stage": 1, "step": 5, "loss": 0.1, "sparsity": 0.44},
    ]
    adapted: Any = SimpleNamespace(name="recover", record=SimpleNamespace(curve=curve, after=None, settings={}))
    (plot,) = training_plots(SimpleNamespace(adapted=[adapted]))  # type: ignore[arg-type]
    assert plot.alt.endswith("Sparsity: training from 40.0% to 44.0%; held out from 50.0% to 48.0%.")
    _, below = _drawn(plot).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in below.lines]
    assert lines == [([5, 10], [40.0, 44.0]), ([0, 5], [50.0, 48.0])]


@pytest.mark.parametrize(("weight", "said"), [(0.0, "KL to dense"), (1.0, "loss")])
def test_a_loss_that_is_not_the_distillation_alone_is_not_called_so(weight: float, said: str) -> None:
    record = SimpleNamespace(curve=[{"stage": 0, "step": 0, "held_out_loss": 0.3}], after=None)
    record.settings = {"text_weight": weight, "hidden_weight": 0.0}
    (plot,) = training_plots(SimpleNamespace(adapted=[SimpleNamespace(name="lte", record=record)]))  # type: ignore[arg-type]
    assert _drawn(plot).axes[0].get_ylabel() == f"{said}, nats a token"


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_density_of_a_known_distribution(material: Material) -> None:
    """|x| spread evenly over a doubling, on a logarithmic axis: all of it there, and at the height that follows."""
    calibration = read_material(material.run).calibration
    site = calibration.projections[0].site
    values = 2.0 ** torch.linspace(0, 1, 200_001)[:-1]
    for name in calibration.histograms:
        calibration.histograms[name] = histogram.empty()
    calibration.histograms[site] = histogram.count(values)
    plot = next(plot for plot in distribution_plots(calibration, []) if plot.name == "distribution-attention-input")
    (axes,) = _drawn(plot).axes
    line = next(line for line in axes.lines if line.get_label() == "layer 0")
    x, density = torch.tensor(line.get_xdata()), torch.tensor(line.get_ydata())
    inside = (x > 1) & (x < 2)
    assert int(inside.sum()) == 8
    assert density[inside].numpy() == pytest.approx(100, rel=0.01)
    assert float(density[~inside].sum()) == 0


def test_thresholds_are_those_of_the_exports(material: Material) -> None:
    plots = {plot.name: plot for plot in distribution_plots(material.calibration, material.exports)}
    _, strip = _drawn(plots["distribution-mlp-intermediate"]).axes
    ticks = [sorted(line.get_xdata()) for line in strip.lines if line.get_marker() == "|"]
    assert ticks == [
        sorted(export.plan.projections[f"model.layers.{layer}.mlp.down_proj"].threshold for layer in (0, 1))
        for export in material.exports
    ]
    assert [label.get_text() for label in strip.get_yticklabels()] == [
        "fisher 0.30",
        "fisher 0.50",
        "uniform 0.30",
        "uniform 0.50",
    ]


def test_lines_of_quality_and_speed(material: Material, finished_run: Path) -> None:
    (plot,) = quality_plots(material)
    (axes,) = _drawn(plot).axes
    assert _texts(axes)[-2:] == sorted(_texts(axes)[-2:], key=lambda name: _last_ratio(finished_run, name))
    (plot,) = speed_plots(material)
    (axes,) = _drawn(plot).axes
    runs = json.loads((finished_run / "bench.json").read_text())["runs"]
    line = axes.lines[0]
    assert list(line.get_xdata()) == [100 * run["realised_sparsity"] for run in runs]
    assert list(line.get_ydata()) == [run["tokens_per_second"]["median"] for run in runs]
    assert [run["allocation"] for run in runs] == [None, "fisher", "fisher"]
    assert _texts(axes)[-1] == "fisher"


def _last_ratio(run: Path, allocation: str) -> float:
    runs = json.loads((run / "eval.json").read_text())["runs"]
    return [each["perplexity_ratio"] for each in runs if each["sparse"]["allocation"] == allocation][-1]


def test_one_allocation_looks_alike_everywhere(material: Material) -> None:
    (quality,), (speed,) = (_drawn(plots[0]).axes for plots in (quality_plots(material), speed_plots(material)))
    looks = [
        {text.get_text(): text.get_color() for text in axes.texts if text.get_text() in ("fisher", "uniform")}
        for axes in (quality, speed)
    ]
    assert looks[0]["fisher"] == looks[1]["fisher"] != looks[0]["uniform"]


def test_cells_of_a_heat_map(material: Material) -> None:
    export = material.exports[1]
    target, realised = sparsity_plots(export, material.realised(export))
    for plot, values in (
        (target, {name: entry.expected_sparsity for name, entry in export.plan.projections.items()}),
        (realised, material.realised(export).by_projection),
    ):
        (axes,) = _drawn(plot).axes
        names = [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in _PATHS]
        assert _texts(axes) == [f"{100 * values[name]:.0f}" for name in names]
    assert len(sparsity_plots(export, None)) == 1


_PATHS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def test_names_are_no_mathematics_and_no_commands(material: Material) -> None:
    export = material.exports[0]
    entries = export.plan.projections.items()
    plan = replace(export.plan, projections={name.replace("q_proj", "$\\x$\x1b"): entry for name, entry in entries})
    (plot,) = sparsity_plots(replace(export, plan=plan), None)
    assert r"$\x$\x1b" in inline_svg(plot)


def test_drawings_are_the_same_every_time(material: Material) -> None:
    first, second = (inline_svg(quality_plots(material)[0]) for _ in range(2))
    assert first == second


def test_descriptions_are_escaped() -> None:
    plot = Plot("p", "t", 'a "b" <c>', 2.0, lambda figure: figure.subplots().set_title("x"))
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in inline_svg(plot)
