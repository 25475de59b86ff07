"""Our decoding on a CPU beside llama.cpp's at the same width, in turn: a grid of models, widths, threads and contexts.

    python benchmarks/compare_llama_cpp.py --llama-bench PATH --llama-models FOLDER [--only 'smollm2-135m/*/t2/c64']

FOLDER holds MODEL.KIND.gguf, such as smollm2-135m.Q4_0.gguf, made by llama.cpp's llama-quantize: of the packaged file
of SmolLM2-135M (`--allow-requantize`), and of what `random_gguf.py` writes for the other shapes.

Each cell of the grid is one `teal bench --compare-llama-cpp` in a process of its own, whose result is kept whole. The
file is written after each. Cells that are in it are left out next time, but for those that --only names. Ours and
llama.cpp's of a cell always come from one run. Calibrations, quantised weights and thresholds of SmolLM2 stay in runs/:
where a machine is busy, make them beforehand, one thread each (`teal calibrate`, `teal export`, with the cell's flags).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.versions import device_description, library_versions

PACKAGED, SHAPES = "smollm2-135m", ("llama-3.2-1b", "qwen2.5-0.5b")
"""With trained weights, and with random ones."""
SPARSITIES = "0.4,0.5,0.65"
WIDTHS = {
    "float32": ("F32", ["--dtype", "float32"]),
    "bfloat16": ("BF16", ["--dtype", "bfloat16"]),
    "int8": ("Q8_0", ["--dtype", "bfloat16", "--quantise", "int8", "--quantise-output"]),
    "int4:32": ("Q4_0", ["--dtype", "bfloat16", "--quantise", "int4:32", "--quantise-output"]),
}
"""Ours, llama.cpp's type, and our flags. The KV cache has the dtype; llama.cpp's has 16 bits whatever the weights."""
CONDITIONS = ((2, 64), (1, 64), (4, 64), (2, 2048), (2, 8000))
"""Threads, and tokens in the cache before the first that is timed."""


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    model: str
    width: str
    threads: int
    context: int

    @property
    def name(self) -> str:
        """As --only names it."""
        return f"{self.model}/{self.width}/t{self.threads}/c{self.context}"

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Of `teal bench`."""
        kind, width = WIDTHS[self.width]
        weights = ["--allocation", options.allocation] if self.model == PACKAGED else ["--random-weights"]
        counts = {
            **{"--threads": self.threads, "--prompt-tokens": self.context},
            **{"--new-tokens": options.new_tokens, "--repeats": options.repeats},
        }
        return [
            *("bench", "--model", self.model, "--device", "cpu", "--sparsity", SPARSITIES, *width, *weights),
            *(word for flag, count in counts.items() for word in (flag, str(count))),
            *("--compare-llama-cpp", str(options.llama_bench)),
            *("--llama-model", str(options.llama_models / f"{self.model}.{kind}.gguf")),
        ]


def grid() -> Iterator[Cell]:
    """All cells, those that the docs quote first."""
    for threads, context in CONDITIONS:
        for model in (PACKAGED, *SHAPES):
            for width in WIDTHS:
                yield Cell(model, width, threads, context)


def measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """What `teal bench` found, with nothing of it left out."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "teal_cli", *cell.arguments(options), "--json", str(file)]
        subprocess.run(command, check=True)  # noqa: S603 (this very package)
        text = file.read_text(encoding="utf-8")
    for path in (options.llama_models, options.llama_bench.parent, Path(folder)):  # where they lie says nothing
        text = text.replace(f"{path}/", "")
    found: dict[str, Any] = json.loads(text)
    return {"threads": cell.threads, "context": cell.context, "width": cell.width, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--llama-models", type=Path, required=True)
    parser.add_argument("--only", default=None, help="names of cells, with * and ?; they are measured again")
    parser.add_argument("--list", action="store_true", help="print the names of cells, and measure nothing")
    parser.add_argument(
        "--allocation", default="fisher-site", help="of trained weights; the one for small models on a CPU"
    )
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-cpu-llama.json"))
    options = parser.parse_args()
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    cells: dict[str, Any] = before.get("cells", {})
    for cell in grid():
        if not fnmatch(cell.name, options.only or "*") or (options.only is None and cell.name in cells):
            continue
        print(cell.name, flush=True)
        if options.list:
            continue
        cells[cell.name] = measured(cell, options)
        result = {
            "command": "python benchmarks/compare_llama_cpp.py --llama-bench PATH --llama-models FOLDER",
            "device": device_description(torch.device("cpu")),
            "versions": library_versions(),
            "cells": {each.name: cells[each.name] for each in grid() if each.name in cells},
        }
        write_json(options.out, result)


if __name__ == "__main__":
    main()
