"""Families other than Llama's on a GPU: our dense and sparse decoding, and transformers' compiled, in one process.

    python benchmarks/families_gpu.py --out benchmarks/results/families-gpu.json [--models A,B] [--compile-layers 8]

Random weights of the models' shapes, thresholds calibrated on them, one sequence. Compiling takes transformers a
minute or two for a whole model, so it is timed on models of fewer blocks, in turn with ours of as many.
"""

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from compare_decode import CompiledStep

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.models import aliases
from teal_cli.models.loading import build_random_model
from teal_cli.steps.bench import measure
from teal_cli.steps.prepared import prepare
from teal_cli.versions import device_description, library_versions

MODELS = (
    "llama-3-8b",
    "phi-4-mini",
    "gemma-2-2b",
    "gemma-3-4b",
    "olmo-2-7b",
    "command-r7b",
    "phi-2",
    "starcoder2-3b",
    "pythia-6.9b",
    "glm-4-9b",
    "granite-3.3-8b",
    "opt-6.7b",
    "smollm3-3b",
    "minitron-4b",
    "gpt-oss-20b",
)
PROMPT, NEW_TOKENS = 128, 64


@contextmanager
def _with_layers(name: str, layers: int) -> Iterator[None]:
    """For a while, the alias has so many blocks."""
    known = aliases.find_alias

    def shallow(asked: str) -> aliases.Alias | None:
        found = known(asked)
        if found is None or asked != name:
            return found
        kinds = found.shape.get("layer_types")
        more = {} if kinds is None else {"layer_types": kinds[:layers]}
        return replace(found, shape={**found.shape, "num_hidden_layers": layers, **more})

    aliases.find_alias = shallow  # type: ignore[assignment]
    try:
        yield
    finally:
        aliases.find_alias = known


def _config(name: str, repeats: int) -> BenchConfig:
    return BenchConfig(
        model=name,
        random_weights=True,
        sparsity=[0.5],
        prompt_tokens=PROMPT,
        new_tokens=NEW_TOKENS,
        repeats=repeats,
        dtype="bfloat16",
        device="cuda",
    )


def _ours(name: str, repeats: int, reporter: Reporter) -> dict[str, Any]:
    config = _config(name, repeats)
    return measure(config, prepare(config, reporter), reporter).to_json()


def _beside_compiled(name: str, layers: int, repeats: int, reporter: Reporter) -> dict[str, Any]:
    """transformers with a static cache and compiled steps, ours dense and at 50 %, in turn."""
    with _with_layers(name, layers):
        config = _config(name, repeats)
        plain = build_random_model(aliases.require_alias(name), device="cuda", dtype="bfloat16", seed=0)
        prompt = random_prompt(int(plain.config.vocab_size), PROMPT, 0).cuda()
        theirs = CompiledStep(plain, mode="reduce-overhead")
        started = time.perf_counter()
        theirs.speed(prompt, 8)
        compiling = time.perf_counter() - started
        theirs.speed(prompt, 8)
        prepared = prepare(config, reporter)
        engine = Engine(prepared.model)
        rows = []
        for _ in range(repeats):
            ours = [NEW_TOKENS / decode_seconds(engine, plan, prompt, NEW_TOKENS) for plan in (None, prepared.plans[0])]
            rows.append((theirs.speed(prompt, NEW_TOKENS), *ours))
    names = ("transformers_compiled", "ours_dense", "ours_50")
    speeds = {
        name: asdict(Spread.of(list(column))) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    return {"model": name, "layers": layers, "path": engine.path.name, "compile_seconds": compiling, **speeds}


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Measure, and write after each model, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile-layers", type=int, default=0, help="also transformers compiled, of so many blocks")
    parser.add_argument("--only-compiled", action="store_true", help="leave out whole models")
    options = parser.parse_args()
    quieten_libraries()
    reporter = Reporter()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_description(torch.device("cuda")),
        "versions": library_versions(),
        "runs": [],
        "beside_transformers": [],
    }
    for name in options.models.split(","):
        try:
            if not options.only_compiled:
                run = _ours(name, options.repeats, reporter)
                result["runs"].append(run)
                dense, half = run["runs"]
                share = [
                    entry["tokens_per_second"]["median"] / entry["limit_tokens_per_second"] for entry in (dense, half)
                ]
                print(
                    f"{name:16} dense {dense['tokens_per_second']['median']:7.1f} ({share[0]:.2f} of the limit)  "
                    f"50 % {half['tokens_per_second']['median']:7.1f} ({share[1]:.2f}; {half['speedup']:.2f}x, "
                    f"realised {half['realised_sparsity']:.3f})",
                    flush=True,
                )
                _free()
            if options.compile_layers:
                beside = _beside_compiled(name, options.compile_layers, options.repeats, reporter)
                result["beside_transformers"].append(beside)
                speeds = {key: round(beside[key]["median"], 1) for key in beside if key.startswith(("ours", "transf"))}
                print(f"{name:16} of {beside['layers']} blocks {beside['path']}: {speeds}", flush=True)
        except Exception as error:  # one model that fails must not cost the others, on a machine that is lent
            print(f"{name:16} failed: {type(error).__name__}: {error}", flush=True)
            result.setdefault("failed", []).append({"model": name, "error": str(error)})
        _free()
        write_json(options.out, result)


if __name__ == "__main__":
    main()
