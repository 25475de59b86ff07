"""Draw `decode-gpu.json`: tokens a second over sparsity, beside what the memory would allow and gpt-fast.

python benchmarks/plot_decode.py [--results benchmarks/results/decode-gpu.json] [--out docs/decode-gpu.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"limit": "#666666", "ours": "#0b7285", "gpt-fast": "#c2410c"}


def main() -> None:
    """One picture of the first run in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/decode-gpu.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/decode-gpu.png"))
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    first = results["runs"][0]
    runs = sorted(first["runs"], key=lambda run: run["realised_sparsity"])
    sparsity = [run["realised_sparsity"] for run in runs]
    speed = [run["tokens_per_second"] for run in runs]
    median = [spread["median"] for spread in speed]

    figure, axes = plt.subplots(figsize=(7.5, 4.4), dpi=160)
    axes.plot(
        sparsity,
        [run["limit_tokens_per_second"] for run in runs],
        "--",
        color=COLOURS["limit"],
        label=f"all bytes at {first['reading_gb_s']:,.0f} GB/s, nothing else",
    )
    axes.errorbar(
        sparsity,
        median,
        yerr=[
            [spread["median"] - spread["min"] for spread in speed],
            [spread["max"] - spread["median"] for spread in speed],
        ],
        fmt="o-",
        capsize=3,
        color=COLOURS["ours"],
        label="teal",
    )
    for x, y in zip(sparsity, median, strict=True):
        axes.annotate(f"{y:.0f}", (x, y), textcoords="offset points", xytext=(4, -13), color=COLOURS["ours"])
    beside = arguments.results.with_name(f"{arguments.results.stem}-beside-gpt-fast.json")
    if beside.is_file():
        dense = json.loads(beside.read_text(encoding="utf-8"))["gpt_fast"]["median"]
        axes.axhline(dense, color=COLOURS["gpt-fast"], linewidth=1, linestyle=":")
        axes.annotate(
            f"gpt-fast, dense: {dense:.0f}",
            (1.0, dense),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(-4, 4),
            ha="right",
            color=COLOURS["gpt-fast"],
        )
    axes.set_xlabel("realised sparsity of the projections' inputs")
    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{first['model']}, {first['dtype']}, batch {first['batch']}\n{first['device']}", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
