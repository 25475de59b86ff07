"""A gated MLP dense and gate first, at several shares of dead neurons; on a CPU or a GPU.

    python benchmarks/gate_first.py --json benchmarks/results/gate-first-cpu.json
    python benchmarks/gate_first.py --device cuda --json benchmarks/results/gate-first-gpu.json [--tune]

Random weights of one MLP (Llama-2-7B's shape), several copies in turn, so that none comes from a cache. The
activation is FATReLU, whose threshold is set to the quantile of the gate product that leaves the wanted share
dead. Results are held against float64 first. Dense is the best of what there is: on a GPU cuBLAS (gate and up in
one product) or our own kernels without skipping; on a CPU torch's products on row-major weights.
On a GPU a time is that of CUDA graphs of all copies, gate first is the better of two ways (the gate product by itself,
or in the launch of up's), and `--tune` first tries cuts of every launch.
"""

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.bench.timing import Spread, graph_microseconds, seconds_of
from teal_cli.console import Reporter
from teal_cli.plain_table import PlainTable
from teal_cli.versions import device_description, library_versions
from teal_kernels import input_major, sparse_linear
from teal_kernels.gate_first import GateActivation, gate_first, rounded_threshold
from teal_kernels.launching import hopper_or_later
from teal_kernels.triton_gate_first import UNTUNED, UNTUNED_FUSED, GateFirstConfig, GateLayer, launch_gate_first
from teal_kernels.triton_gemv import Scratch, TileConfig, gemv
from teal_kernels.tuning import choose_config

SPARSITIES = (0.5, 0.7, 0.8, 0.89, 0.95)
TUNED_AT = 0.89
GPU_BYTES = 4_000_000_000
"""Of all copies: with weights that leave the L2 cache first, a few times its size is not enough."""
CPU_COPIES, CPU_INPUTS = 2, 8
# Relative norm error against float64: roundings of up, of the activation, of the hidden state and of the result,
# and float32 sums of 11,008 terms.
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

UP_CUTS = [
    GateFirstConfig(neurons=neurons, block_out=block_out, block_in=block_in, unroll=unroll, warps=warps)
    for neurons, block_out, (block_in, unroll, warps) in itertools.product(
        (8, 16, 32), (2, 4), ((1024, 4, 4), (512, 4, 2))
    )
]
GATE_CUTS = [
    TileConfig(block_out=256, block_in=1, unroll=6, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=128, block_in=2, unroll=6, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=64, block_in=4, unroll=8, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=64, block_in=8, unroll=8, inputs_per_chunk=512, warps=2, dense=True),
]
FUSED_CUTS = [
    GateFirstConfig(
        neurons=neurons,
        block_out=block_out,
        block_in=256 * warps,
        warps=warps,
        gate_block_in=gate_block_in,
        gate_unroll=gate_unroll,
    )
    for warps, (neurons, gate_block_in, gate_unroll), block_out in itertools.product(
        (2, 4), ((2, 1024, 4), (4, 512, 4), (4, 1024, 2), (8, 512, 2)), (1, 2)
    )
]
DOWN_CUTS = [
    TileConfig(block_out=block_out, block_in=block_in, unroll=unroll, inputs_per_chunk=per_split, warps=warps)
    for (block_out, warps), (block_in, unroll), per_split in itertools.product(
        ((64, 1), (128, 1)), ((4, 6), (8, 4)), (256, 512)
    )
]


class Mlp:
    """Copies of one MLP's weights, an input for each, and what is computed with them."""

    def __init__(self, hidden: int, neurons: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype) / math.sqrt(shape[-1])

        self.hidden, self.neurons, self.dtype, self.device = hidden, neurons, dtype, device
        self.bytes_of_one = hidden * neurons * dtype.itemsize
        copies = CPU_COPIES if device.type == "cpu" else max(2, -(-GPU_BYTES // (3 * self.bytes_of_one)))
        self.gate_up = [random(2 * neurons, hidden) for _ in range(copies)]
        """gate_proj above up_proj, row-major: each is a view of its own."""
        self.down = [input_major(random(hidden, neurons)) for _ in range(copies)]
        inputs = CPU_INPUTS if device.type == "cpu" else copies
        self.x = [random(1, hidden) * math.sqrt(hidden) for _ in range(inputs)]
        """Each with its own live neurons."""
        self.gates = [self.gate(index) for index in range(inputs)]
        self.activations: list[GateActivation] = []

    @property
    def inputs(self) -> int:
        return len(self.x)

    def weights(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down, each (out, in)."""
        copy = index % len(self.gate_up)
        gate_up = self.gate_up[copy]
        return gate_up[: self.neurons], gate_up[self.neurons :], self.down[copy]

    def gate(self, index: int) -> Tensor:
        return F.linear(self.x[index], self.weights(index)[0])

    def leave_dead_(self, share: float) -> float:
        """Set each copy's threshold so that this share of its neurons is dead; the share that really is."""
        self.activations = [GateActivation("fatrelu", float(g.float().quantile(share))) for g in self.gates]
        live = [float(a.live(g).float().mean()) for a, g in zip(self.activations, self.gates, strict=True)]
        return 1.0 - sum(live) / len(live)

    def read_bytes(self, dead: float) -> float:
        """Weights that gate first has to read."""
        return self.bytes_of_one * (1 + 2 * (1 - dead))

    def expected(self, index: int) -> Tensor:
        """In float64, from the gate product as it was rounded: a threshold is decided by that."""
        _, up, down = self.weights(index)
        gate, activation = self.gates[index], self.activations[index]
        hidden = activation.of_gate(gate).double() * F.linear(self.x[index].double(), up.double())
        return F.linear(hidden, down.double())

    def error(self, result: Tensor, index: int) -> float:
        expected = self.expected(index)
        return float((result.double() - expected).norm() / expected.norm())


class OnCpu(Mlp):
    """torch's products, as the CPU's modules call them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.zero = torch.zeros(())
        self.dense_down = [weight.contiguous() for weight in self.down]

    def dense(self, index: int) -> Tensor:
        gate, up, _ = self.weights(index)
        x = self.x[index]
        hidden = self.activations[index].hidden(F.linear(x, gate), F.linear(x, up))
        return F.linear(hidden, self.dense_down[index % len(self.dense_down)])

    def gate_first(self, index: int) -> Tensor:
        return self.down_product(index, self.up_product(index, self.gate(index)))

    def up_product(self, index: int, gate: Tensor) -> Tensor:
        return gate_first(self.x[index], gate, self.weights(index)[1], None, self.activations[index], "cpu")

    def down_product(self, index: int, hidden: Tensor) -> Tensor:
        return sparse_linear(hidden, self.weights(index)[2], None, self.zero, "cpu")


class OnGpu(Mlp):
    """Launches of our kernels one behind the other, and cuBLAS."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        device, dtype, neurons, hidden = self.device, self.dtype, self.neurons, self.hidden
        self.gate_up_table = [weight.t().contiguous() for weight in self.gate_up]
        self.gate_out, self.hidden_out = (torch.empty(1, neurons, device=device, dtype=dtype) for _ in range(2))
        self.out = torch.empty(1, hidden, device=device, dtype=dtype)
        self.keep_all = torch.full((2,), -1.0, device=device)
        self.zero = torch.zeros(1, device=device)
        self.scratch = Scratch(device)
        self.pdl = hopper_or_later(device)
        self.up_cut, self.fused_cut = UNTUNED, UNTUNED_FUSED
        self.down_cut = self._chosen(neurons, (hidden,), "plain", TUNED_AT)
        self.gate_cut: TileConfig | None = None
        """None: cuBLAS."""
        self.dense_cuts = (
            self._chosen(hidden, (neurons, neurons), "gated", 0.0),
            self._chosen(neurons, (hidden,), "plain", 0.0),
        )

    def _chosen(self, inputs: int, parts: tuple[int, ...], epilogue: str, sparsity: float) -> TileConfig:
        return choose_config(
            self.device, inputs=inputs, parts=parts, dtype=self.dtype, rows=1, epilogue=epilogue, sparsity=sparsity
        )

    def cublas(self, index: int) -> Tensor:
        gate, up = F.linear(self.x[index], self.gate_up[index % len(self.gate_up)]).split(self.neurons, dim=1)
        return F.linear(self.activations[index].hidden(gate, up), self.weights(index)[2])

    def own_dense(self, index: int) -> Tensor:
        """Our kernels without skipping; the activation is theirs, SiLU, which costs as much."""
        x, parts = self.x[index], (self.neurons, self.neurons)
        self._gemv(
            x,
            self.gate_up_table[index % len(self.gate_up_table)],
            parts,
            self.keep_all,
            self.hidden_out,
            self.dense_cuts[0],
            "gated",
        )
        self._gemv(
            self.hidden_out, self.weights(index)[2].t(), (self.hidden,), self.keep_all[:1], self.out, self.dense_cuts[1]
        )
        return self.out

    def _gemv(
        self,
        x: Tensor,
        table: Tensor,
        parts: tuple[int, ...],
        thresholds: Tensor,
        y: Tensor,
        cut: TileConfig,
        epilogue: str = "plain",
    ) -> None:
        gemv(x, table, parts, thresholds, y, cut, self.scratch, epilogue=epilogue, pdl=self.pdl)

    def gate_product(self, index: int) -> Tensor:
        if self.gate_cut is None:
            return self.gate(index)
        table = self.gate_up_table[index % len(self.gate_up_table)][:, : self.neurons]
        self._gemv(self.x[index], table, (self.neurons,), self.keep_all[:1], self.gate_out, self.gate_cut)
        return self.gate_out

    def up_product(self, index: int, gate: Tensor) -> Tensor:
        return self._launch(index, gate, self.up_cut)

    def gate_up_product(self, index: int, kind: str = "fatrelu") -> Tensor:
        """Both in one launch."""
        return self._launch(index, GateLayer(self.weights(index)[0], None), self.fused_cut, kind)

    def _launch(self, index: int, gate: Tensor | GateLayer, cut: GateFirstConfig, kind: str = "fatrelu") -> Tensor:
        launch_gate_first(
            self.x[index],
            gate,
            self.weights(index)[1],
            None,
            self.hidden_out,
            kind=kind,
            threshold=rounded_threshold(self.activations[index].threshold, self.dtype),
            config=cut,
        )
        return self.hidden_out

    def fused(self, index: int) -> Tensor:
        return self.down_product(index, self.gate_up_product(index))

    def fused_error(self, index: int) -> float:
        """Against float64, with ReLU: FATReLU has a step, where the rounding of a gate decides."""
        gate, up, _ = self.weights(index)
        x = self.x[index].double()
        expected = F.linear(x, gate.double()).clamp_min(0) * F.linear(x, up.double())
        found = self.gate_up_product(index, "relu").clone()
        if not torch.equal(found, self.gate_up_product(index, "relu")):
            raise SystemExit("gate and up in one launch do not repeat bit for bit")
        return float((found.double() - expected).norm() / expected.norm())

    def down_product(self, index: int, hidden: Tensor) -> Tensor:
        self._gemv(hidden, self.weights(index)[2].t(), (self.hidden,), self.zero, self.out, self.down_cut)
        return self.out

    def gate_first(self, index: int) -> Tensor:
        return self.down_product(index, self.up_product(index, self.gate_product(index)))

    def microseconds(self, work: Callable[[int], object]) -> Spread:
        """Of `work` for one copy, inside a graph of all copies."""
        return graph_microseconds(work, self.inputs)

    def tune_(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Try cuts of each product at `TUNED_AT`, take the fastest, and return every time."""
        self.leave_dead_(TUNED_AT)
        hiddens = [self.up_product(index, gate).clone() for index, gate in enumerate(self.gates)]
        found: dict[str, Any] = {}

        def best(what: str, cuts: list[Any], time_of: Callable[[Any], Spread]) -> Any:
            entries = []
            for cut in cuts:
                try:
                    entries.append((time_of(cut), cut))
                except (RuntimeError, ValueError) as error:  # a cut that this GPU cannot hold
                    say(f"{what}: {cut} cannot run ({str(error).splitlines()[0]})")
            entries.sort(key=lambda entry: entry[0].median)
            found[what] = [
                {"microseconds": asdict(spread), "config": "cublas" if cut is None else asdict(cut)}
                for spread, cut in entries
            ]
            for spread, cut in entries[:3]:
                say(f"{what}: {spread.median:.2f} us ({spread.min:.2f}-{spread.max:.2f}) {cut or 'cuBLAS'}")
            return entries[0][1]

        def time_up(cut: GateFirstConfig) -> Spread:
            self.up_cut = cut
            return self.microseconds(lambda index: self.up_product(index, self.gates[index]))

        def time_gate(cut: TileConfig | None) -> Spread:
            self.gate_cut = cut
            return self.microseconds(self.gate_product)

        def time_down(cut: TileConfig) -> Spread:
            self.down_cut = cut
            return self.microseconds(lambda index: self.down_product(index, hiddens[index]))

        def time_fused(cut: GateFirstConfig) -> Spread:
            self.fused_cut = cut
            return self.microseconds(self.gate_up_product)

        before = self.down_cut
        self.up_cut = best("up", UP_CUTS, time_up)
        self.fused_cut = best("gate and up", FUSED_CUTS, time_fused)
        self.gate_cut = best("gate", [None, *GATE_CUTS], time_gate)
        self.down_cut = best("down", [before, *DOWN_CUTS], time_down)
        return found


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
    parser.add_argument("--tune", action="store_true", help=f"try cuts at {TUNED_AT} first, on a GPU")
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
                cuts = [None, mlp._chosen(mlp.hidden, (mlp.neurons,), "plain", 0.0), GATE_CUTS[0]]
                times = {index: _gate_time(mlp, cut) for index, cut in enumerate(cuts)}
                mlp.gate_cut = cuts[min(times, key=lambda index: times[index])]
        for share in arguments.sparsity.split(","):
            runs.append(measure(mlp, float(share), arguments.repeats))
            latest = runs[-1]
            console.print(f"{name} {share}: {latest['microseconds']['median']:.1f} us, {latest['speedup']:.2f}x dense")
        cuts_used = (
            {
                "gate": mlp.gate_cut and asdict(mlp.gate_cut),
                "up": asdict(mlp.up_cut),
                "gate and up": asdict(mlp.fused_cut),
                "down": asdict(mlp.down_cut),
            }
            if isinstance(mlp, OnGpu)
            else None
        )
        for run in runs:
            run.setdefault("configs", cuts_used)
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


def _gate_time(mlp: OnGpu, cut: TileConfig | None) -> float:
    mlp.gate_cut = None if cut is None else replace(cut, dense=True)
    return mlp.microseconds(mlp.gate_product).median


if __name__ == "__main__":
    main()
