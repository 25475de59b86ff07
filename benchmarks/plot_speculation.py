"""Draw what `teal bench --speculate --json FILE` measured: the speedup of each kind of drafts, and over acceptance.

python benchmarks/plot_speculation.py [--results benchmarks/results/speculation-smollm2-135m-cpu.json] [--out FILE.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLOUR, PALE = "#0b7285", "#94c3cc"


def label_of(run: dict[str, Any]) -> str:
    """Drafts, with their sparsity where they have one."""
    return f"{run['drafts']} {run['sparsity']:.0%}" if run["sparsity"] else str(run["drafts"])


def draw_speedups(axes: Any, runs: list[dict[str, Any]]) -> None:
    """A bar for each kind, and its acceptance."""
    for at, run in enumerate(runs):
        spread = run["speedup"]
        errors = [[spread["median"] - spread["min"]], [spread["max"] - spread["median"]]]
        axes.barh(at, spread["median"], 0.7, color=COLOUR, xerr=errors, ecolor=PALE, capsize=2)
        text = f"{spread['median']:.2f}x"
        text += "" if run["acceptance"] is None else f", acceptance {run['acceptance']:.2f}"
        axes.annotate(text, (spread["max"], at), textcoords="offset points", xytext=(4, 0), va="center", fontsize=7)
    axes.set_yticks(range(len(runs)), [label_of(run) for run in runs])
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlim(0, 1.45 * max(run["speedup"]["max"] for run in runs))
    axes.set_xlabel("tokens a second over dense decoding, prompts measured")


def draw_expected(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Lines over acceptance, from the times of passes."""
    for run in runs:
        shares = sorted(run["expected_speedups"], key=float)
        gains = [run["expected_speedups"][share]["speedup"] for share in shares]
        axes.plot([float(share) for share in shares], gains, marker="o", ms=3, lw=1.2, label=label_of(run))
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("acceptance of a drafted token")
    axes.set_ylabel("speedup, computed from measured passes")
    axes.legend(frameon=False, fontsize=7)


def main() -> None:
    """One picture; of random weights the second half alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/speculation-smollm2-135m-cpu.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/speculation.png"))
    arguments = parser.parse_args()
    result = json.loads(arguments.results.read_text(encoding="utf-8"))
    runs = result["speculation"]
    if not runs:
        raise SystemExit(f"{arguments.results} has no drafts: run teal bench with --speculate")
    written = [run for run in runs if run["speedup"] is not None]
    figure, panels = plt.subplots(1, 2 if written else 1, figsize=(11 if written else 6, 4.2), dpi=160, squeeze=False)
    if written:
        draw_speedups(panels[0, 0], written)
    draw_expected(panels[0, -1], runs)
    for axes in panels[0]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}, {result['dtype']}, {result['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
