"""A gated MLP with random weights, and what computes it: torch on a CPU, our kernels and cuBLAS on a GPU."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.bench.timing import Spread, graph_microseconds
from teal_kernels import KEEP_ALL, input_major, sparse_linear
from teal_kernels.gate_first import GateActivation, gate_first, rounded_threshold
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Scratch
from teal_kernels.triton_gate_first import UNTUNED, UNTUNED_FUSED, GateFirstConfig, GateLayer, launch_gate_first
from teal_kernels.triton_gemv import TileConfig, gemv
from teal_kernels.tuning import choose_config

TUNED_AT = 0.89
GPU_BYTES = 4_000_000_000
"""Of all copies: with weights that leave the L2 cache first, a few times its size is not enough."""
CPU_COPIES, CPU_INPUTS = 2, 8

UP_CONFIGS = [
    GateFirstConfig(neurons=neurons, block_out=block_out, block_in=block_in, unroll=unroll, warps=warps)
    for neurons, block_out, (block_in, unroll, warps) in itertools.product(
        (8, 16, 32), (2, 4), ((1024, 4, 4), (512, 4, 2))
    )
]
GATE_CONFIGS = [
    TileConfig(block_out=256, block_in=1, unroll=6, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=128, block_in=2, unroll=6, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=64, block_in=4, unroll=8, inputs_per_chunk=256, warps=1, dense=True),
    TileConfig(block_out=64, block_in=8, unroll=8, inputs_per_chunk=512, warps=2, dense=True),
]
FUSED_CONFIGS = [
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
DOWN_CONFIGS = [
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
        self.keep_all = torch.full((2,), KEEP_ALL, device=device)
        self.zero = torch.zeros(1, device=device)
        self.scratch = Scratch(device)
        self.pdl = hopper_or_later(device)
        self.up_config, self.fused_config = UNTUNED, UNTUNED_FUSED
        self.down_config = self._chosen(neurons, (hidden,), "plain", TUNED_AT)
        self.gate_config: TileConfig | None = None
        """None: cuBLAS."""
        self.dense_configs = (
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
            self.dense_configs[0],
            "gated",
        )
        self._gemv(
            self.hidden_out,
            self.weights(index)[2].t(),
            (self.hidden,),
            self.keep_all[:1],
            self.out,
            self.dense_configs[1],
        )
        return self.out

    def _gemv(
        self,
        x: Tensor,
        table: Tensor,
        parts: tuple[int, ...],
        thresholds: Tensor,
        y: Tensor,
        config: TileConfig,
        epilogue: str = "plain",
    ) -> None:
        gemv(x, table, parts, thresholds, y, config, self.scratch, epilogue=epilogue, pdl=self.pdl)

    def gate_product(self, index: int) -> Tensor:
        if self.gate_config is None:
            return self.gate(index)
        table = self.gate_up_table[index % len(self.gate_up_table)][:, : self.neurons]
        self._gemv(self.x[index], table, (self.neurons,), self.keep_all[:1], self.gate_out, self.gate_config)
        return self.gate_out

    def up_product(self, index: int, gate: Tensor) -> Tensor:
        return self._launch(index, gate, self.up_config)

    def gate_up_product(self, index: int, kind: str = "fatrelu") -> Tensor:
        """Both in one launch."""
        return self._launch(index, GateLayer(self.weights(index)[0], None), self.fused_config, kind)

    def _launch(self, index: int, gate: Tensor | GateLayer, config: GateFirstConfig, kind: str = "fatrelu") -> Tensor:
        launch_gate_first(
            self.x[index],
            gate,
            self.weights(index)[1],
            None,
            self.hidden_out,
            kind=kind,
            threshold=rounded_threshold(self.activations[index].threshold, self.dtype),
            config=config,
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
        self._gemv(hidden, self.weights(index)[2].t(), (self.hidden,), self.zero, self.out, self.down_config)
        return self.out

    def gate_first(self, index: int) -> Tensor:
        return self.down_product(index, self.up_product(index, self.gate_product(index)))

    def microseconds(self, work: Callable[[int], object]) -> Spread:
        """Of `work` for one copy, inside a graph of all copies."""
        return graph_microseconds(work, self.inputs)

    def tune_(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Try configs of each product at `TUNED_AT`, take the fastest, and return every time."""
        self.leave_dead_(TUNED_AT)
        hiddens = [self.up_product(index, gate).clone() for index, gate in enumerate(self.gates)]
        found: dict[str, Any] = {}

        def best(what: str, configs: list[Any], time_of: Callable[[Any], Spread]) -> Any:
            entries = []
            for config in configs:
                try:
                    entries.append((time_of(config), config))
                except (RuntimeError, ValueError) as error:  # one that this GPU cannot hold
                    say(f"{what}: {config} cannot run ({str(error).splitlines()[0]})")
            entries.sort(key=lambda entry: entry[0].median)
            found[what] = [
                {"microseconds": asdict(spread), "config": "cublas" if config is None else asdict(config)}
                for spread, config in entries
            ]
            for spread, config in entries[:3]:
                say(f"{what}: {spread.median:.2f} us ({spread.min:.2f}-{spread.max:.2f}) {config or 'cuBLAS'}")
            return entries[0][1]

        def time_up(config: GateFirstConfig) -> Spread:
            self.up_config = config
            return self.microseconds(lambda index: self.up_product(index, self.gates[index]))

        def time_gate(config: TileConfig | None) -> Spread:
            self.gate_config = config
            return self.microseconds(self.gate_product)

        def time_down(config: TileConfig) -> Spread:
            self.down_config = config
            return self.microseconds(lambda index: self.down_product(index, hiddens[index]))

        def time_fused(config: GateFirstConfig) -> Spread:
            self.fused_config = config
            return self.microseconds(self.gate_up_product)

        before = self.down_config
        self.up_config = best("up", UP_CONFIGS, time_up)
        self.fused_config = best("gate and up", FUSED_CONFIGS, time_fused)
        self.gate_config = best("gate", [None, *GATE_CONFIGS], time_gate)
        self.down_config = best("down", [before, *DOWN_CONFIGS], time_down)
        return found
