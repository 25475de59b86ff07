"""Gate first on the fused path of a GPU: its launches with several tile configs, then whole tokens beside dense ones.

    python benchmarks/gate_first_tokens.py --out benchmarks/results/gate-first-tokens-gpu.json [--rows 1,4]

Random weights of Llama-2-7B's shapes, FATReLU with its thresholds at the quantile that leaves 89 % of the neurons dead.

Launches: an MLP behind its norm, which adds to the residual stream, several copies in turn inside a CUDA graph: gate
first for each tile config, sparse and dense, and our dense kernels on ordinary tables.

Tokens: dense on ordinary tables; dense and sparse of a model that decodes gate first; and sparse with thresholds on the
inputs of attention too.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread, graph_microseconds
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense, Threshold
from teal_cli.cli.output import quieten_libraries
from teal_cli.decode.engine import Engine
from teal_cli.models.aliases import require_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import build_random_model
from teal_cli.sparse import control_of, make_intrinsic_, neuron_sparsity, sparsify_
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.versions import device_description, library_versions
from teal_kernels import KEEP_ALL
from teal_kernels.gate_first import GateActivation, rounded_threshold
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_gate_first import GateFirstConfig, GateLayer, launch_gate_first, step_config
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of
from teal_kernels.tuning import choose_config

DEVICE = torch.device("cuda")
HIDDEN, NEURONS = 4096, 11008
DTYPE = torch.bfloat16
GPU_BYTES = 4_000_000_000
"""Of all copies, so that none lies in the L2 cache."""
PROMPT, NEW_TOKENS = 128, 64
ATTENTION = {"attention_input", "attention_output"}


def _at_once(neurons: int, warps: int, *, late: bool = False, block_out: int = 1) -> GateFirstConfig:
    """All gate rows of a program travel at once."""
    block_in = 256 * warps
    unroll = -(-HIDDEN // block_in)
    return GateFirstConfig(neurons, block_out, block_in, unroll, warps, block_in, unroll, late=late)


def _tensor_cores(neurons: int, block_out: int, block_in: int, warps: int, *, late: bool = False) -> GateFirstConfig:
    return GateFirstConfig(neurons, block_out, block_in, 1, warps, block_in, 1, late=late)


SPARSE = {
    "one": [
        GateFirstConfig(neurons=4, block_out=1),
        GateFirstConfig(neurons=4, block_out=1, late=True),
        GateFirstConfig(neurons=8, block_out=1, gate_block_in=512, gate_unroll=2),
        *(_at_once(neurons, 4, late=late) for neurons, late in itertools.product((1, 2, 4), (False, True))),
        *(_at_once(neurons, 8, late=late) for neurons, late in itertools.product((2, 4, 8), (False, True))),
        _at_once(2, 2),
        _at_once(4, 8, block_out=2),
    ],
    "several": [
        GateFirstConfig(neurons=4, block_out=4),
        GateFirstConfig(neurons=4, block_out=2, block_in=2048, gate_block_in=2048),
        _tensor_cores(16, 16, 128, 2),
        _tensor_cores(16, 16, 256, 2),
        _tensor_cores(16, 16, 256, 4),
        _tensor_cores(32, 16, 128, 4),
        _tensor_cores(32, 16, 128, 4, late=True),
        _tensor_cores(32, 32, 128, 4),
        _tensor_cores(32, 16, 256, 4),
        _tensor_cores(64, 16, 128, 4),
    ],
}
DENSE = {
    "one": [
        _at_once(neurons, warps, late=late)
        for (neurons, warps), late in itertools.product(((1, 4), (2, 4), (2, 8)), (False, True))
    ],
    "several": [
        _tensor_cores(16, 16, 128, 2),
        _tensor_cores(32, 16, 128, 4),
        _tensor_cores(32, 16, 128, 4, late=True),
        _tensor_cores(64, 16, 64, 4),
    ],
}


@dataclass(frozen=True)
class Copy:
    """The weights of one MLP."""

    gate_up: Tensor
    """(in, 2 out), a table."""
    gate: Tensor
    up: Tensor
    """(out, in), row-major."""
    down: Tensor
    """(neurons, hidden), a table."""


class Launches:
    """MLPs of a residual stream: norm, gate and up, activation, down, residual sum."""

    def __init__(self, rows: int, dead: float) -> None:
        self.rows = rows
        generator = torch.Generator(DEVICE).manual_seed(rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE, dtype=DTYPE)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, device=DEVICE, dtype=dtype)

        weights = HIDDEN * NEURONS * DTYPE.itemsize
        self.copies = []
        for _ in range(max(2, GPU_BYTES // (5 * weights))):
            gate, up = (random(NEURONS, HIDDEN) / math.sqrt(HIDDEN) for _ in range(2))
            table = torch.cat([gate, up]).t().contiguous()
            self.copies.append(Copy(table, gate, up, random(NEURONS, HIDDEN) / math.sqrt(NEURONS)))
        # Behind a norm of weight 1 gates are normal, whatever the stream has become.
        self.threshold = rounded_threshold(math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * dead - 1))), DTYPE)
        self.start, self.hidden = random(rows, HIDDEN), random(rows, NEURONS)
        self.weight = 1 + zeros(HIDDEN, dtype=DTYPE)
        self.x = self.start.clone()
        self.scratch, self.pdl = Scratch(DEVICE), hopper_or_later(DEVICE)
        self.keep_all, self.zero = KEEP_ALL + zeros(2), zeros(1)
        self.live, self.kept = zeros(1, dtype=torch.int64), zeros(3, dtype=torch.int64)
        self.gated = self._chosen(HIDDEN, (NEURONS, NEURONS), "gated", 0.0)
        self.down = {share: self._chosen(NEURONS, (HIDDEN,), "residual", share) for share in (0.0, ASSUMED_ZEROS)}
        self.squares = {
            config: zeros(rows, squares_of(self.copies[0].down, (HIDDEN,), config, rows, DTYPE))
            for config in self.down.values()
        }

    def _chosen(self, inputs: int, parts: tuple[int, ...], epilogue: str, sparsity: float) -> TileConfig:
        return choose_config(
            DEVICE, inputs=inputs, parts=parts, dtype=DTYPE, rows=self.rows, epilogue=epilogue, sparsity=sparsity
        )

    def _down(self, index: int, config: TileConfig) -> None:
        gemv(
            self.hidden,
            self.copies[index].down,
            (HIDDEN,),
            self.keep_all[:1] if config.dense else self.zero,
            self.x,
            config,
            self.scratch,
            epilogue="residual",
            squares=self.squares[config],
            counts=self.kept,
            pdl=self.pdl,
        )

    def tables(self, index: int) -> None:
        """Ordinary tables, dense."""
        down, copy = self.down[0.0], self.copies[index]
        gemv(
            self.x,
            copy.gate_up,
            (NEURONS, NEURONS),
            self.keep_all,
            self.hidden,
            self.gated,
            self.scratch,
            norm=Norm(self.weight, 1e-5, self.squares[down]),
            epilogue="gated",
            pdl=self.pdl,
        )
        self._down(index, down)

    def neurons(self, index: int, config: GateFirstConfig, dense: bool) -> None:
        """The first launch of gate first."""
        copy = self.copies[index]
        launch_gate_first(
            self.x,
            GateLayer(copy.gate, None),
            copy.up,
            None,
            self.hidden,
            kind="fatrelu",
            threshold=self.threshold,
            norm=Norm(self.weight, 1e-5, self.squares[self.down[0.0 if dense else ASSUMED_ZEROS]]),
            dense=dense,
            counts=self.live,
            config=config,
            pdl=self.pdl,
        )

    def gate_first(self, index: int, config: GateFirstConfig, dense: bool) -> None:
        """Gate first, or every neuron, and down."""
        self.neurons(index, config, dense)
        self._down(index, self.down[0.0 if dense else ASSUMED_ZEROS])

    def reset(self) -> None:
        """The stream as it was, and its squares."""
        self.x.copy_(self.start)
        for squares in self.squares.values():
            squares.zero_()[:, 0] = self.x.float().square().sum(1)

    def time(self, work: Callable[[int], object]) -> Spread:
        """Microseconds of one copy."""
        self.reset()
        return graph_microseconds(work, len(self.copies))

    def dead(self, config: GateFirstConfig) -> float:
        """The share that really is, over all copies."""
        self.reset()
        self.live.zero_()
        for index in range(len(self.copies)):
            self.gate_first(index, config, dense=False)
        return 1.0 - int(self.live) / (len(self.copies) * self.rows * NEURONS)


def launches(rows: int, dead: float) -> dict[str, Any]:
    """Every config, the fastest first."""
    mlp, group = Launches(rows, dead), "one" if rows == 1 else "several"
    tables = mlp.time(mlp.tables)
    chosen = step_config(HIDDEN, rows)
    found: list[dict[str, Any]] = []
    for dense, configs in ((False, SPARSE[group]), (True, DENSE[group])):
        for config in dict.fromkeys([chosen, *configs]):
            try:
                both = mlp.time(partial(mlp.gate_first, config=config, dense=dense))
                first = mlp.time(partial(mlp.neurons, config=config, dense=dense))
            except (RuntimeError, ValueError) as error:  # one that this GPU cannot hold
                print(f"{config} cannot run ({str(error).splitlines()[0]})")
                continue
            found.append({"dense": dense, "config": asdict(config), "mlp": asdict(both), "gate_up": asdict(first)})
    found.sort(key=lambda entry: (entry["dense"], entry["mlp"]["median"]))
    really = mlp.dead(chosen)
    print(f"\nMLP {HIDDEN} x {NEURONS}, {rows} rows, {really:.3f} dead; dense on tables {tables.median:.2f} us")
    print(f"down: {mlp.down[ASSUMED_ZEROS]}")
    print("         MLP us         (min-max)  gate+up tables/it  neurons out  up tiles  gate tiles warps late")
    for entry in found:
        config, both = GateFirstConfig(**entry["config"]), entry["mlp"]
        spread = f"({both['min']:.2f}-{both['max']:.2f})"
        print(
            f"{'dense ' if entry['dense'] else 'sparse'} {both['median']:8.2f} {spread:>17} "
            f"{entry['gate_up']['median']:8.2f} {tables.median / both['median']:9.2f} "
            f"{config.neurons:8} {config.block_out:3} {config.unroll:3} x {config.block_in:4} "
            f"{config.gate_unroll:4} x {config.gate_block_in:4} {config.warps:4}  {config.late!s:5}"
            f"{' <- step_config' if config == chosen else ''}",
            flush=True,
        )
    return {"rows": rows, "dead": really, "tables_microseconds": asdict(tables), "configs": found}


class _Unchecked(Engine):
    """Without the check before the first token: FATReLU jumps at its threshold, and with random weights so many gates
    lie beside it in every block that two right ways of rounding give other logits."""

    def check(self, prompt: Tensor) -> None:
        """Nothing."""


def _build(layers: int | None) -> Any:
    alias = require_alias("llama-2-7b")
    shape = {**alias.shape, "hidden_act": "fatrelu", "hidden_act_param": 0.0}
    if layers:
        shape["num_hidden_layers"] = layers
    return build_random_model(replace(alias, shape=shape), device=DEVICE.type, dtype="bfloat16", seed=0)


@torch.no_grad()
def skip_nothing_(model: Any) -> None:
    """Put sparse layers into a dense model that read everything: our weights and kernels, and what others are over."""
    sparsify_(model, SparsityPlan("uniform", 0.0, {p.name: Dense() for p in find_projections(model)}))


def leave_dead_(model: Any, ids: Tensor, dead: float) -> None:
    """Set the threshold of each FATReLU at the quantile of its gates, the first block first: it changes the next."""

    def choose(mlp: GateFirstMLP, inputs: tuple[Tensor, ...]) -> None:
        gate = mlp.layers[0](inputs[0][:, inputs[0].shape[1] // 2 :]).float()
        mlp.activation = GateActivation("fatrelu", float(gate.quantile(dead)))

    handles = [m.register_forward_pre_hook(choose) for m in model.modules() if isinstance(m, GateFirstMLP)]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _with_thresholds(model: Any, plan: SparsityPlan, ids: Tensor, share: float) -> SparsityPlan:
    """The plan, with thresholds that drop a share of the inputs of attention."""
    rules = dict(plan.projections)
    names = [p.name for p in find_projections(model) if p.site.rpartition(".")[2] in ATTENTION]

    def choose(name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0][:, PROMPT // 2 :].abs().float().flatten()
        rules[name] = Threshold(float(size.quantile(share)), share)

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(choose, name)) for name in names]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return replace(plan, projections=rules, target_sparsity=share)


def _realised(engine: Engine, plan: SparsityPlan, prompt: Tensor) -> dict[str, float]:
    """Of a few tokens: dead neurons, and dropped inputs of attention."""
    with control_of(engine.model).counting() as counter:
        decode_seconds(engine, plan, prompt, 8)
    shares = counter.by_projection()
    attention = [shares[p.name] for p in find_projections(engine.model) if p.site.rpartition(".")[2] in ATTENTION]
    return {"neurons": neuron_sparsity(engine.model, shares) or 0.0, "attention": sum(attention) / len(attention)}


def tokens(rows: list[int], dead: float, repeats: int, layers: int | None) -> list[dict[str, Any]]:
    """Whole tokens, each way in turn."""
    started = time.perf_counter()
    ordinary = _build(layers)
    skip_nothing_(ordinary)
    gated = _build(layers)
    zeros = make_intrinsic_(gated)
    vocabulary = int(gated.config.vocab_size)
    ids = random_prompt(vocabulary, PROMPT, 1).to(DEVICE)
    leave_dead_(gated, ids, dead)
    plans = {f"zeros, attention {share:.0%}": _with_thresholds(gated, zeros, ids, share) for share in (0.5, 0.65)}
    engines = _Unchecked(ordinary), _Unchecked(gated)
    print(f"\nbuilt in {time.perf_counter() - started:.0f} s; paths {[engine.path.name for engine in engines]}")
    ways: dict[str, tuple[Engine, SparsityPlan | None]] = {
        "dense on tables": (engines[0], None),
        "gate first, dense": (engines[1], None),
        "zeros": (engines[1], zeros),
        **{name: (engines[1], plan) for name, plan in plans.items()},
    }
    found = []
    for batch in rows:
        prompt = random_prompt(vocabulary, PROMPT, 0, batch)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        realised = {name: _realised(engine, plan, prompt) for name, (engine, plan) in ways.items() if plan is not None}
        for _ in range(repeats):
            for name, (engine, plan) in ways.items():
                speeds[name].append(batch * NEW_TOKENS / decode_seconds(engine, plan, prompt, NEW_TOKENS))
        for name, values in speeds.items():
            over = Spread.of_ratios(values, speeds["dense on tables"])
            shares = realised.get(name)
            said = "" if shares is None else f"dead {shares['neurons']:.3f}, attention {shares['attention']:.3f}"
            speed = Spread.of(values)
            print(
                f"{batch} rows  {name:22} {speed.median:8.1f} ({speed.min:.1f}-{speed.max:.1f}) tokens/s  "
                f"{over.median:5.2f}x  {said}",
                flush=True,
            )
            measured = {"tokens_per_second": asdict(speed), "speedup": asdict(over), "realised": shares}
            found.append({"rows": batch, "way": name, **measured})
    return found


def main() -> None:
    """Measure, and write after each part, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default="1", help="of a batch, comma-separated")
    parser.add_argument("--dead", type=float, default=0.89)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="blocks of the model, by default all")
    parser.add_argument("--only", choices=("launches", "tokens"))
    options = parser.parse_args()
    quieten_libraries()
    rows = [int(number) for number in options.rows.split(",")]
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_description(DEVICE),
        "versions": library_versions(),
        "dead": options.dead,
    }
    with torch.no_grad():
        if options.only != "launches":
            result["tokens"] = tokens(rows, options.dead, options.repeats, options.layers)
            write_json(options.out, result)
            torch.cuda.empty_cache()
        if options.only != "tokens":
            result["launches"] = [launches(number, options.dead) for number in rows]
            write_json(options.out, result)


if __name__ == "__main__":
    main()
