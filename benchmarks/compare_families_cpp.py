"""Our native CPU path beside llama.cpp, in turn, on a small shape of each family that both have, with random weights.

    python benchmarks/compare_families_cpp.py --llama-source FOLDER --llama-programs FOLDER [--only 'gemma*/int8']

--llama-source is llama.cpp's source tree, whose converter writes a file of each shape (`random_gguf.py`);
--llama-programs holds its llama-bench and llama-quantize. The shapes are in `family_shapes.yaml`.

A cell is a family at a width: each round decodes with ours dense, with ours at 50 %, and with llama-bench. The file is
written after each. Cells that are in it are left out next time, but for those that --only names. The files of weights
lie in a temporary folder, one family at a time; of the largest family they take 4 GB.
"""

import argparse
import gc
import json
import subprocess
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from random_gguf import write_gguf

from teal_cli.atomic import write_json
from teal_cli.bench.llama_cpp import LlamaBench, LlamaFile
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.models.aliases import Alias
from teal_cli.models.loading import build_random_model, use_threads
from teal_cli.schemes import Scheme
from teal_cli.steps.bench import measure
from teal_cli.steps.prepared import prepare_random
from teal_cli.versions import device_description, library_versions

WIDTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("BF16", {"dtype": "bfloat16"}),
    "int8": ("Q8_0", {"dtype": "bfloat16", "quantise": Scheme.parse("int8"), "quantise_output": True}),
    "float32": ("F32", {"dtype": "float32"}),
}
"""Type of llama.cpp's weights, and our settings."""
SHAPES = Path(__file__).with_name("family_shapes.yaml")


class Family:
    """A row of the shapes.

    Args:
        model_type: of transformers.
        sizes: of the rows that are like it.
        row: what is its own.
    """

    def __init__(self, model_type: str, sizes: dict[str, Any], row: dict[str, Any]) -> None:
        own = dict(row)
        self.older_keys: dict[str, Any] = own.pop("older_keys", {})
        self.widths: tuple[str, ...] = tuple(own.pop("widths", WIDTHS))
        self.name: str = own.pop("name", model_type)
        self.shape: dict[str, Any] = {"model_type": model_type, **sizes, **own}

    def cells(self) -> list[str]:
        """Their names."""
        return [f"{self.name}/{width}" for width in self.widths]

    def model(self, dtype: str) -> Any:
        """With random weights."""
        alias = Alias(self.name, "", self.shape, None)
        return build_random_model(alias, device="cpu", dtype=dtype, seed=0)


def families() -> Iterator[Family]:
    """All rows of the shapes."""
    table = yaml.safe_load(SHAPES.read_text(encoding="utf-8"))
    for model_type, row in table["families"].items():
        own = dict(row)
        yield Family(model_type, table[own.pop("like", "base")], own)


def measured(family: Family, width: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What ours and llama.cpp did in turn, with nothing of it left out.

    Args:
        family: whose shape is measured.
        width: a name in WIDTHS.
        file: of llama.cpp, with its weights.
        options: of the command.
    """
    _, settings = WIDTHS[width]
    config = BenchConfig(
        model=family.name,
        device="cpu",
        random_weights=True,
        sparsity=[options.sparsity],
        threads=options.threads,
        prompt_tokens=options.context,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        **settings,
    )
    use_threads(config.threads)
    prepared = prepare_random(config, family.name, family.model(settings["dtype"]))
    of_file = LlamaFile.read(file)
    of_file.require_shape(family.name, prepared.model.config)
    rival = LlamaBench(
        options.llama_programs / "llama-bench",
        of_file,
        threads=options.threads,
        prompt_tokens=options.context,
        new_tokens=options.new_tokens,
    )
    found = measure(config, prepared, Reporter(quiet=True), rival).to_json()
    parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    return {"shape": family.shape, "parameters": parameters, "threads": options.threads, "width": width, **found}


def measure_family(family: Family, names: list[str], cells: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure the named cells of a family; each is put into `cells`, and `cells` into the file."""
    with tempfile.TemporaryDirectory(prefix="teal-families-") as folder:
        of_bfloat16 = Path(folder) / f"{family.name}.BF16.gguf"
        write_gguf(family.model("bfloat16"), options.llama_source.resolve(), of_bfloat16, family.older_keys)
        for name in names:
            gc.collect()
            width = name.rpartition("/")[2]
            kind = WIDTHS[width][0]
            file = of_bfloat16.with_name(f"{family.name}.{kind}.gguf")
            if file != of_bfloat16:
                command = [options.llama_programs / "llama-quantize", "--allow-requantize", of_bfloat16, file, kind]
                subprocess.run(command, check=True, capture_output=True)  # noqa: S603 (the user's own program)
            cells[name] = measured(family, width, file, options)
            if file != of_bfloat16:
                file.unlink()
            print(name, *(_line(run) for run in cells[name]["runs"]), flush=True)
            result = {
                "command": "python benchmarks/compare_families_cpp.py --llama-source FOLDER --llama-programs FOLDER",
                "device": device_description(torch.device("cpu")),
                "versions": library_versions(),
                "cells": cells,
            }
            write_json(options.out, result)


def _line(run: dict[str, Any]) -> str:
    speed, over = run["tokens_per_second"]["median"], run["over_llama_cpp"]
    return (
        f"| {run['realised_sparsity']:.3f}: {speed:.1f}, {over['median']:.2f}x ({over['min']:.2f} to {over['max']:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-source", type=Path, required=True)
    parser.add_argument("--llama-programs", type=Path, required=True)
    parser.add_argument("--only", default=None, help="names of cells, with * and ?; they are measured again")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before the first that is timed")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-cpu-families.json"))
    options = parser.parse_args()
    quieten_libraries()
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    cells: dict[str, Any] = before.get("cells", {})
    for family in families():
        names = [name for name in family.cells() if fnmatch(name, options.only or "*")]
        names = [name for name in names if options.only is not None or name not in cells]
        if names:
            measure_family(family, names, cells, options)


if __name__ == "__main__":
    main()
