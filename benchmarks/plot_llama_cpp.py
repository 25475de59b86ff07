"""Draw `decode-cpu-llama.json`: tokens a second beside llama.cpp's at each width.

python benchmarks/plot_llama_cpp.py [--cell 'smollm2-135m/{}/t2/c64'] [--out docs/decode-cpu.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

WIDTHS = ("float32", "bfloat16", "int8", "int4:32")
LLAMA, OURS = "#c2410c", ("#94c3cc", "#4a9aa8", "#0b7285", "#084c5a")
"""Colours: llama.cpp's, and ours from dense on."""


def bars_of(cell: dict[str, Any]) -> list[tuple[str, dict[str, float], float | None]]:
    """Label, speed and ratio over llama.cpp: llama.cpp first, then ours, dense first."""
    theirs = [("llama.cpp", cell["llama_cpp"]["tokens_per_second"], None)]
    return theirs + [
        (
            "teal, dense" if run["sparsity"] == 0 else f"teal, {run['sparsity']:.0%}",
            run["tokens_per_second"],
            run["over_llama_cpp"]["median"],
        )
        for run in cell["runs"]
    ]


def main() -> None:
    """One picture: a group of bars for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/decode-cpu-llama.json"))
    parser.add_argument("--cell", default="smollm2-135m/{}/t2/c64", help="name of the cells, {} for the width")
    parser.add_argument("--out", type=Path, default=Path("docs/decode-cpu.png"))
    arguments = parser.parse_args()
    cells = json.loads(arguments.results.read_text(encoding="utf-8"))["cells"]
    found = {width: cells[name] for width in WIDTHS if (name := arguments.cell.format(width)) in cells}
    if not found:
        raise SystemExit(f"no cell {arguments.cell} in {arguments.results}")
    figure, axes = plt.subplots(figsize=(8.5, 4.4), dpi=160)
    places = []
    for group, (width, cell) in enumerate(found.items()):
        bars = bars_of(cell)
        step = 0.86 / len(bars)
        for index, (label, speed, ratio) in enumerate(bars):
            x = group + (index - (len(bars) - 1) / 2) * step
            colour = LLAMA if ratio is None else OURS[min(index - 1, len(OURS) - 1)]
            spread = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
            axes.bar(
                x, speed["median"], step * 0.94, color=colour, yerr=spread, capsize=2, label=None if group else label
            )
            text = f"{speed['median']:.0f}" if ratio is None else f"{ratio:.1f}x"
            axes.annotate(
                text,
                (x, speed["max"]),
                textcoords="offset points",
                xytext=(0, 3),
                ha="center",
                fontsize=7,
                color=colour,
            )
        places.append(f"{width}\n{cell['llama_cpp']['weights']}")
    first = next(iter(found.values()))
    axes.set_xticks(range(len(places)), places)
    axes.set_ylabel("tokens a second")
    axes.set_title(
        f"{first['model']}, {first['new_tokens']} tokens after {first['prompt_tokens']}\n{first['device']}", fontsize=10
    )
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
