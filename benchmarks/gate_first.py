"""A gated MLP dense and gate first, at several shares of dead neurons; on a CPU or a GPU.

    python benchmarks/gate_first.py --json benchmarks/results/gate-first-cpu.json
    python benchmarks/gate_first.py --device cuda --json benchmarks/results/gate-first-gpu.json [--tune]

Random weights of one MLP (Llama-2-7B's shape), several copies in turn, so that none comes from a cache. The
activation is FATReLU, whose threshold is set to the quantile of the gate product that leaves the wanted share
dead. Results are held against float64 first. Dense is the best of what there is: on a GPU cuBLAS (gate and up in
one product) or our own kernels without skipping; on a CPU torch's products on row-major weights.
On a GPU a time is that of CUDA graphs of all copies, gate first is the better of two ways (the gate product by itself,
or in the launch of up's), and `--tune` first tries tile configs of every launch.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gate_first_mlp import CPU_INPUTS, GATE_CONFIGS, TUNED_AT, OnCpu, OnGpu
from rich.console import Console

from teal_cli.atomic import write_json
from teal_cli.bench.timing import Spread
from teal_cli.console import Reporter
from teal_cli.decode.timing import seconds_of
from teal_cli.plain_table import PlainTable
from teal_cli.versions import device_description, library_versions
from teal_kernels.triton_gemv import TileConfig

SPARSITIES = (0.5, 0.7, 0.8, 0.89, 0.95)
# Relative norm error against float64: roundings of up, of the activation, of the hidden state and of the result,
# and float32 sums of 11,008 terms.
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def check(mlp: OnCpu | OnGpu) -> float:
    """The largest error of gate first against float64 over the copies; also that it repeats bit for bit."""
    worst = 0.0
    for index in range(min(mlp.inputs, 3)):
        hidden = mlp.up_product(index, mlp.gates[index])
        result = mlp.down_product(index, hidden).clone()
        again = mlp.down_product(index, mlp.up_product(index, mlp.gates[index]))
        if not torch.equal(result, again):
            raise SystemExit("gate first does not repeat bit for bit")
        worst = max(worst, mlp.error(result, index))
        if isinstance(mlp, OnGpu):
            worst = max(worst, mlp.fused_error(index))
    if worst > LIMITS[mlp.dtype]:
        raise SystemExit(f"gate first is wrong: relative error {worst:.2e} in {mlp.dtype}")
    return worst


def in_turn(works: dict[str, Callable[[int], object]], repeats: int) -> dict[str, Spread]:
    """Microseconds on the CPU of each, one after the other, with inputs and copies of the weights in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            times[name].append(seconds_of(partial(work, repeat % CPU_INPUTS), torch.device("cpu")) * 1e6)
    return {name: Spread.of(values[1:]) for name, values in times.items()}


def measure(mlp: OnCpu | OnGpu, share: float, repeats: int) -> dict[str, Any]:
    """One share of dead neurons."""
    dead = mlp.leave_dead_(share)
    error = check(mlp)
    hiddens = [mlp.up_product(index, gate).clone() for index, gate in enumerate(mlp.gates)]
    works: dict[str, Callable[[int], object]] = {
        "separate": mlp.gate_first,
        "up": lambda index: mlp.up_product(index, mlp.gates[index]),
        "down": lambda index: mlp.down_product(index, hiddens[index]),
    }
    if isinstance(mlp, OnCpu):
        times = in_turn({"dense": mlp.dense, "gate": mlp.gate, **works}, repeats)
        dense = {"torch": times.pop("dense")}
    else:
        works |= {"gate": mlp.gate_product, "gate and up": mlp.gate_up_product, "fused": mlp.fused}
        times = {name: mlp.microseconds(work) for name, work in works.items()}
        dense = {"cublas": mlp.microseconds(mlp.cublas), "own": mlp.microseconds(mlp.own_dense)}
    best = min(dense, key=lambda name: dense[name].median)
    way = min((name for name in ("separate", "fused") if name in times), key=lambda name: times[name].median)
    size = mlp.read_bytes(dead)
    return {
        "dtype": str(mlp.dtype).removeprefix("torch."),
        "sparsity": share,
        "realised_sparsity": dead,
        "error_against_float64": error,
        "dense": best,
        "dense_microseconds": {name: asdict(spread) for name, spread in dense.items()},
        "gate_first": way,
        "microseconds": asdict(times[way]),
        "parts_microseconds": {name: asdict(spread) for name, spread in times.items() if name != way},
        "bytes_read": round(size),
        "gb_s": size / times[way].median / 1e3,
        "dense_gb_s": 3 * mlp.bytes_of_one / dense[best].median / 1e3,
        "speedup": dense[best].median / times[way].median,
    }


def table_of(runs: list[dict[str, Any]], title: str) -> PlainTable:
    """The runs, to look at."""
    parts = [name for name in ("gate", "up", "gate and up", "down") if name in runs[0]["parts_microseconds"]]
    columns = ("dtype", "dead", "dense us", "gate first us", *parts, "GB/s", "speedup", "error")
    table = PlainTable(title, *columns)

    def spread(entry: dict[str, float]) -> str:
        return f"{entry['median']:.1f} ({entry['min']:.1f}-{entry['max']:.1f})"

    for run in runs:
        table.add_row(
            run["dtype"],
            f"{run['realised_sparsity']:.3f}",
            f"{spread(run['dense_microseconds'][run['dense']])} {run['dense']}",
            f"{spread(run['microseconds'])} {run['gate_first']}",
            *(f"{run['parts_microseconds'][name]['median']:.1f}" for name in parts),
            f"{run['gb_s']:.0f}",
            f"{run['speedup']:.2f}x",
            f"{run['error_against_float64']:.1e}",
        )
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="comma-separated (default float32,bfloat16 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--sparsity", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--repeats", type=int, default=15, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help=f"try tile configs at {TUNED_AT} first, on a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    device = torch.device(arguments.device)
    if arguments.tune and device.type == "cpu":
        raise SystemExit("--tune needs --device cuda")
    names = arguments.dtype or ("float32,bfloat16" if device.type == "cpu" else "bfloat16")
    runs: list[dict[str, Any]] = []
    tuned: dict[str, Any] = {}
    for name in names.split(","):
        kind = OnCpu if device.type == "cpu" else OnGpu
        mlp = kind(arguments.hidden, arguments.neurons, getattr(torch, name), device, arguments.seed)
        if isinstance(mlp, OnGpu):
            if arguments.tune:
                tuned[name] = mlp.tune_(console.print)
            else:  # the gate product the way that is faster here
                configs = [None, mlp._chosen(mlp.hidden, (mlp.neurons,), "plain", 0.0), GATE_CONFIGS[0]]
                times = {index: _gate_time(mlp, config) for index, config in enumerate(configs)}
                mlp.gate_config = configs[min(times, key=lambda index: times[index])]
        for share in arguments.sparsity.split(","):
            runs.append(measure(mlp, float(share), arguments.repeats))
            latest = runs[-1]
            console.print(f"{name} {share}: {latest['microseconds']['median']:.1f} us, {latest['speedup']:.2f}x dense")
        configs_used = (
            {
                "gate": mlp.gate_config and asdict(mlp.gate_config),
                "up": asdict(mlp.up_config),
                "gate and up": asdict(mlp.fused_config),
                "down": asdict(mlp.down_config),
            }
            if isinstance(mlp, OnGpu)
            else None
        )
        for run in runs:
            run.setdefault("configs", configs_used)
    described = device_description(device)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": described,
        "versions": library_versions(),
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.neurons,
        "repeats": arguments.repeats if device.type == "cpu" else None,
        "seed": arguments.seed,
        "runs": runs,
        "tuned": tuned,
    }
    if arguments.json:
        write_json(arguments.json, result)
    Reporter().show(
        table_of(runs, f"MLP {arguments.hidden} x {arguments.neurons}, one token, {described}; median (min-max)")
    )


def _gate_time(mlp: OnGpu, config: TileConfig | None) -> float:
    mlp.gate_config = None if config is None else replace(config, dense=True)
    return mlp.microseconds(mlp.gate_product).median


if __name__ == "__main__":
    main()
