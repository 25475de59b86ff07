"""What `teal adapt` did, as plots: how the loss fell, and quality over bytes before and after."""

from collections.abc import Callable
from typing import Any

from teal_cli.checkpoint.adapted import Record
from teal_cli.report.drawing import GRID, MUTED, Plot, label, name_of, series
from teal_cli.report.inputs import Adapted, Material

_WIDER = 1.25
"""Of the room around the points, so that their names fit."""


def training_plots(material: Material) -> list[Plot]:
    """Of each adapted model its curve; then all of them in one plot of quality over bytes."""
    plots = [_curve(adapted) for adapted in material.adapted if adapted.record.curve]
    measured = [adapted for adapted in material.adapted if adapted.record.after is not None]
    return [*plots, _quality(measured)] if measured else plots


def _points(record: Record, key: str, beside: str | None = None) -> tuple[list[float], list[float]]:
    """Steps of the whole run and what was logged there under a key; a stage's steps come after the stages' before.

    Args:
        record: of the run.
        key: of a figure.
        beside: another one, without which it does not count: what it is of.
    """
    xs, ys = [], []
    before, stage, last = 0.0, 0.0, 0.0
    for figures in record.curve:
        if figures["stage"] != stage:
            before, stage = before + last, figures["stage"]
        last = figures["step"]
        if key in figures and (beside is None or beside in figures):
            xs.append(before + last)
            ys.append(figures[key])
    return xs, ys


def _curve(adapted: Adapted) -> Plot:
    """Loss and held-out loss over steps, with the sparsity beneath."""
    record = adapted.record
    keys = {"training": "loss", "held out": "held_out_loss"}
    losses = {name: _points(record, key) for name, key in keys.items()}
    sparsities = {name: _points(record, "sparsity", key) for name, key in keys.items()}  # of different texts
    others = any(record.settings.get(key) for key in ("text_weight", "hidden_weight"))
    title = f"{adapted.name}: loss over steps"
    said = "; ".join(f"{name} from {ys[0]:.4f} to {ys[-1]:.4f}" for name, (_, ys) in losses.items() if ys)
    alt = f"{title}: {said}."
    if of_steps := "; ".join(f"{name} from {ys[0]:.1%} to {ys[-1]:.1%}" for name, (_, ys) in sparsities.items() if ys):
        alt += f" Sparsity: {of_steps}."

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        for index, name in enumerate(keys):
            look = {**series(index), "marker": "o" if name == "held out" else ""}
            above.plot(*losses[name], label=name, **look)
            steps, shares = sparsities[name]
            below.plot(steps, [100 * share for share in shares], **look)
        above.set_ylabel("loss, nats a token" if others else "KL to dense, nats a token")
        above.legend()
        below.set_ylabel("sparsity, %")
        below.set_xlabel("steps")
        for axes in (above, below):
            axes.grid(color=GRID, linewidth=0.6)

    return Plot(name_of("training", adapted.name), title, alt, 4.0, draw)


def _quality(measured: list[Adapted]) -> Plot:
    """Perplexity over dense against megabytes a token, each model's arrow from before to after."""
    title = "Quality over bytes, before and after, on the held-out slice"
    said = []
    for adapted in measured:
        for word, found in (("before", adapted.record.before), ("after", adapted.record.after)):
            if found is not None:
                said.append(
                    f"{adapted.name} {word}: {found.perplexity_ratio:.3f} at {found.bytes_per_token / 1e6:,.0f} MB"
                )
    return Plot("training-quality", title, f"{title}. {'; '.join(said)}.", 3.4, _arrows(measured))


def _arrows(measured: list[Adapted]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, adapted in enumerate(measured):
            look = series(index)
            points = [
                (found.bytes_per_token / 1e6, found.perplexity_ratio)
                for found in (adapted.record.before, adapted.record.after)
                if found is not None
            ]
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, **look)
            at = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 9}
            axes.annotate(label(adapted.name), points[-1], color=look["color"], **at)
            dense = adapted.record.after.dense_bytes_per_token / 1e6 if adapted.record.after else 0.0
            axes.plot([dense], [1.0], marker="*", color=MUTED, markersize=9)
        axes.annotate("dense", (dense, 1.0), color=MUTED, textcoords="offset points", xytext=(-34, 5), fontsize=9)
        axes.set_xlabel("MB of weights read a token")
        axes.set_ylabel("perplexity over dense")
        axes.grid(color=GRID, linewidth=0.6)
        axes.margins(x=_WIDER - 1.0, y=_WIDER - 1.0)

    return draw
