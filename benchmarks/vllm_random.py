"""vLLM beside ours on one GPU: one sequence of a model's shape with random weights, nothing to download.

    python benchmarks/vllm_random.py --out benchmarks/results/vllm-llama-3-8b-gpu.json

Needs teal-cli and vLLM in one environment. Each process has the GPU to itself, in turn: ours in bfloat16 (dense and at
50 %) and in int4; vLLM dense, with our plugin at 50 %, and with int4 in groups of 128 by Marlin and by what vLLM
chooses itself. The bfloat16 models have the same weights, vLLM's by a load format that its processes learn of as they
learn of any plugin; its int4 weights are vLLM's dummies. All are timed alike: whole replies, and replies of one token.
`teal_loop_tokens_per_second` is what `teal bench` says of steps alone. Logs and models go to --work.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm_random_models import ALIAS_VARIABLE, LOAD_FORMAT, SEED, write_models, write_plugin

from teal_cli.atomic import write_json
from teal_cli.bench.decode import random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.sparse import apply_plan_, control_of
from teal_cli.steps.bench import measure
from teal_cli.steps.prepared import prepare
from teal_cli.versions import device_description, library_versions

SPARSITY, WARM_UP = 0.5, 3
_NOT_MARLIN = "CutlassW4A8LinearKernel,MacheteLinearKernel,AllSparkLinearKernel"
OURS = ("teal", "teal-int4")
VLLM = {
    "vllm-dense": ("dense", LOAD_FORMAT, {}),
    "vllm-plugin": ("teal", LOAD_FORMAT, {}),
    "vllm-marlin": ("int4", "dummy", {"VLLM_DISABLED_KERNELS": _NOT_MARLIN}),
    "vllm-int4": ("int4", "dummy", {}),
}
"""Run -> folder of the model, load format, environment."""
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1"}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "generation_config": "vllm",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.6,
    "kv_cache_memory_bytes": 2 << 30,
    "disable_log_stats": True,
    "compilation_config": {"cudagraph_capture_sizes": [1]},
    "kernel_config": {"enable_flashinfer_autotune": False, "enable_cutedsl_warmup": False},
}
"""What is set of vLLM; all else is as it comes: compiled, with CUDA graphs, its engine in a process of its own."""


def reply_times(ask: Callable[[int], Sequence[int]], asked: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of whole replies and of replies of one token.

    Args:
        ask: writes so many tokens behind a prompt, and gives them.
        asked: the command line.
    """
    found: dict[str, list[float]] = {}
    for name, new in (("reply_seconds", asked.new_tokens), ("first_token_seconds", 1)):
        found[name] = []
        for index in range(WARM_UP + asked.repeats):
            begin = time.perf_counter()
            written = len(ask(new))
            seconds = time.perf_counter() - begin
            if written != new:
                raise SystemExit(f"a reply of {new} tokens has {written}")
            if index >= WARM_UP:
                found[name].append(seconds)
    return found


def run_ours(asked: argparse.Namespace, *, int4: bool) -> list[dict[str, Any]]:
    """Ours dense and sparse, of one model; also writes what vLLM reads."""
    quieten_libraries()
    more: dict[str, Any] = {"quantise": "int4"} if int4 else {}
    tokens = {"prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens, "repeats": asked.repeats}
    where = {"model": asked.model, "random_weights": True, "dtype": "bfloat16", "device": asked.device, "seed": SEED}
    config = BenchConfig.model_validate({**where, **tokens, **more, "sparsity": [SPARSITY]})
    prepared = prepare(config, Reporter())
    model, plan = prepared.model, prepared.plans[0]
    if not int4:
        write_models(asked.work, model.config.to_dict(), type(model).__name__, plan.to_dict())
    loops = measure(config, prepared, Reporter()).to_json()["runs"]
    engine, control = Engine(model), control_of(model)
    runs = []
    for loop in loops:
        dense = loop["sparsity"] == 0
        if not dense:
            apply_plan_(model, plan)

        def ask(new: int) -> list[int]:
            return list(engine.generate(prepared.prompt, max_new_tokens=new, sampling=SamplingConfig()))

        with control.switched_off() if dense else nullcontext():
            seconds, tokens_of_reply = reply_times(ask, asked), ask(asked.new_tokens)
        name = f"teal-{'int4-' * int4}{'dense' if dense else 'sparse'}"
        of_run = {"run": name, "weights": prepared.quantization or "bfloat16", "sparsity": loop["sparsity"]}
        of_run |= {"realised_sparsity": loop["realised_sparsity"], "teal_loop": loop["tokens_per_second"]}
        runs.append({**of_run, "tokens": tokens_of_reply, **seconds})
    return runs


def run_vllm(asked: argparse.Namespace, folder: str, load_format: str) -> list[dict[str, Any]]:
    """One model in vLLM."""
    from vllm import LLM, SamplingParams

    length = asked.prompt_tokens + asked.new_tokens
    where = {"model": str(asked.work / folder), "load_format": load_format, "max_model_len": length}
    llm = LLM(**{**where, **OPTIONS, **asked.more})
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompt = {"prompt_token_ids": random_prompt(vocabulary, asked.prompt_tokens, SEED)[0].tolist()}

    def ask(new: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=new, detokenize=False)
        return list(llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids)

    seconds = reply_times(ask, asked)
    sparsity = SPARSITY if folder == "teal" else 0.0
    of_run = {"run": asked.run, "weights": "int4-128" if folder == "int4" else "bfloat16", "sparsity": sparsity}
    of_run |= {"realised_sparsity": None if sparsity else 0.0, "teal_loop": None}
    return [{**of_run, "tokens": ask(asked.new_tokens), **seconds}]


def run_here(asked: argparse.Namespace) -> None:
    """One run in this process; its results go beside the models."""
    runs = run_ours(asked, int4=asked.run != OURS[0]) if asked.run in OURS else run_vllm(asked, *VLLM[asked.run][:2])
    device = device_description(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = library_versions() | ({"vllm": version("vllm")} if asked.run in VLLM else {})
    write_json(asked.work / f"{asked.run}.json", {"device": device, "versions": versions, "runs": runs})


def run_elsewhere(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, which has ended when this returns."""
    set_here = {**ENVIRONMENT, **(VLLM[name][2] if name in VLLM else {}), ALIAS_VARIABLE: asked.model}
    path = [str(asked.work), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    log = asked.work / f"{name}.log"
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name, "--work", str(asked.work)]
    environment = {**os.environ, **set_here, "PYTHONPATH": os.pathsep.join(path)}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)  # noqa: S603 (itself)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed: see {log}")
    made: dict[str, Any] = json.loads((asked.work / f"{name}.json").read_text(encoding="utf-8"))
    kernel = re.search(r"Using (\w+)LinearKernel for", log.read_text(encoding="utf-8"))
    for run in made["runs"]:
        run["int4_kernel"] = kernel and kernel[1]
    return made


def row(run: dict[str, Any], new_tokens: int, tokens_of_ours: Sequence[int] | None) -> dict[str, Any]:
    """A run as it goes into the result.

    Args:
        run: with all of its seconds, in order.
        new_tokens: of a whole reply.
        tokens_of_ours: the reply of ours with the same weights and sparsity; None where there is none.
    """
    whole, first = Spread.of(run["reply_seconds"]), Spread.of(run["first_token_seconds"])
    pairs = enumerate(zip(run["tokens"], tokens_of_ours or (), strict=tokens_of_ours is not None))
    alike = next((index for index, (a, b) in pairs if a != b), new_tokens)
    return {
        **{key: run[key] for key in ("run", "weights", "int4_kernel", "sparsity", "realised_sparsity")},
        "reply_seconds": asdict(whole),
        "first_token_seconds": asdict(first),
        "reply_tokens_per_second": new_tokens / whole.median,
        "tokens_per_second_after_first": (new_tokens - 1) / (whole.median - first.median),
        "teal_loop_tokens_per_second": run["teal_loop"],
        "first_tokens_as_ours": None if tokens_of_ours is None else alike,
    }


def assemble(asked: argparse.Namespace, made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result, of what the processes wrote."""
    runs = [run for process in made for run in process["runs"]]
    ours = {(run["weights"], run["sparsity"]): run["tokens"] for run in runs if run["run"].startswith("teal-")}
    rows = []
    for run in runs:
        same_weights = run["run"].startswith("vllm-") and run["weights"] == "bfloat16"
        rows.append(row(run, asked.new_tokens, ours.get((run["weights"], run["sparsity"])) if same_weights else None))
    return {
        "command": f"python benchmarks/{Path(__file__).name} --model {asked.model}",
        "model": f"{asked.model} (random weights)",
        "device": made[0]["device"],
        "dtype": "bfloat16",
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "warm_up": WARM_UP,
        "repeats": asked.repeats,
        "versions": {name: each for process in made for name, each in process["versions"].items()},
        "vllm_options": {**OPTIONS, **asked.more},
        "vllm_environment": {"every run": ENVIRONMENT, **{name: more for name, (_, _, more) in VLLM.items() if more}},
        "runs": rows,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'':18} {'tokens/s after the first':>26} {'s of a reply':>14} {'s to the first token':>22}")
    for run in result["runs"]:
        whole, first = run["reply_seconds"]["median"], run["first_token_seconds"]["median"]
        print(f"{run['run']:18} {run['tokens_per_second_after_first']:26.1f} {whole:14.4f} {first:22.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="alias, for its shape")
    parser.add_argument("--runs", default=",".join([*OURS, *VLLM]), help="comma-separated; `teal` writes the models")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda", help="of ours")
    parser.add_argument("--more", type=json.loads, default={}, help="further options of vLLM's LLM, as JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/vllm-random"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.work = asked.work.resolve()
    if asked.run is not None:
        run_here(asked)
        return
    names = asked.runs.split(",")
    if unknown := set(names) - {*OURS, *VLLM}:
        parser.error(f"--runs: no run {', '.join(sorted(unknown))}, but {', '.join([*OURS, *VLLM])}")
    write_plugin(asked.work)
    result = assemble(asked, [run_elsewhere(name, asked) for name in names])
    show(result)
    if asked.out is not None:
        write_json(asked.out, result)


if __name__ == "__main__":
    main()
