"""The kernels of a mixture of experts on a GPU, with several tile configs: what one token asks of one block.

    python benchmarks/experts_kernels.py --out benchmarks/results

Random weights, other experts in every launch, so that none is in a cache (but for Mixtral's eight, of which two are
three times the L2). `chain` is what a block runs: router, gate and up, down, one right behind the other, with the
fastest config of each. Shares are of what this GPU was measured to read.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.bench.products import reading_gb_s
from teal_cli.bench.timing import graph_microseconds
from teal_cli.versions import device_description, library_versions
from teal_kernels.experts import Chosen, chosen_of, fitting_experts, no_ids, table_of
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of
from teal_kernels.triton_router import Router, route

LAUNCHES = 32
"""In a graph, each with experts of its own."""
DTYPE = torch.bfloat16
SPARSITIES = {0.0: -1.0, 0.5: 0.6745}
"""And the thresholds that drop so many of normal values."""
CONFIGS = {
    "gate_up": [(128, 2, 6, 128), (128, 2, 6, 256), (128, 2, 8, 256), (64, 4, 6, 128), (64, 4, 6, 256)],
    "down": [(64, 4, 6, 128), (64, 4, 6, 256), (128, 2, 8, 128), (128, 2, 8, 256), (128, 2, 8, 384)],
}
"""Block of outputs, rows of a tile, tiles in flight, inputs of a chunk; one warp each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the experts of one block."""

    hidden: int
    experts: int
    chosen: int
    intermediate: int


SHAPES = {"qwen3-30b-a3b": Shape(2048, 128, 8, 768), "mixtral-8x7b": Shape(4096, 8, 2, 14336)}


class Product:
    """Gate and up, or down, of the experts of one block."""

    def __init__(self, stack: Tensor, parts: tuple[int, ...], epilogue: str, x: Tensor, norm: Norm | None) -> None:
        self.stack, self.parts, self.epilogue, self.x, self.norm = stack, parts, epilogue, x, norm
        self.thresholds = {
            sparsity: torch.full((len(parts),), bound, device=x.device) for sparsity, bound in SPARSITIES.items()
        }

    def launch(self, config: TileConfig, chosen: Chosen, sparsity: float, scratch: Scratch, *, pdl: bool) -> None:
        """Once."""
        table, count = table_of(self.stack), chosen.ids.shape[1]
        config = fitting_experts(config, table.shape[0], self.parts)
        columns = squares_of(table, self.parts, config, 1, DTYPE, chosen)
        residual = self.epilogue == "residual"
        y = scratch.tensor(f"y {self.epilogue}", count * self.parts[0], DTYPE).view(count, -1)
        gemv(
            self.x,
            table,
            self.parts,
            self.thresholds[sparsity],
            y[:1] if residual else y,
            config,
            scratch,
            norm=self.norm,
            epilogue=self.epilogue,
            squares=scratch.tensor(f"squares {columns}", columns, torch.float32).view(1, -1) if residual else None,
            experts=replace(chosen, stride=self.stack.stride(0)),
            pdl=pdl,
        )


class Block:
    """The experts of one block and their router, with random weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=DTYPE)

        hidden, width = shape.hidden, shape.intermediate
        self.x = random(1, hidden)
        self.norm = Norm(torch.ones_like(self.x[0]), 1e-5, self.x.float().square().sum(-1, keepdim=True))
        self.router = Router(random(shape.experts, hidden) * hidden**-0.5, normalised=True)
        self.products = {
            "gate_up": Product(random(shape.experts, hidden, 2 * width), (width, width), "gated", self.x, self.norm),
            "down": Product(
                random(shape.experts, width, hidden), (hidden,), "residual", random(shape.chosen, width), None
            ),
        }
        self.scratch, self.pdl = Scratch(device), hopper_or_later(device)
        self.routed = chosen_of(self.products["down"].stack, *no_ids(1, shape.chosen, device))
        self.choices = []
        for index in range(LAUNCHES):
            ids, weights = no_ids(1, shape.chosen, device)
            ids[0] = (torch.arange(shape.chosen, device=device) + index * shape.chosen) % shape.experts
            self.choices.append(replace(self.routed, ids=ids, weights=weights.fill_(1.0 / shape.chosen)))

    def route(self) -> None:
        """Launch the router. Nobody reads what it chooses: here it would be the same experts each time."""
        route(self.x, self.router, self.routed, self.scratch, norm=self.norm, pdl=self.pdl)

    def launching(
        self, configs: dict[str, TileConfig], sparsity: float, *, routed: bool = False
    ) -> Callable[[int], None]:
        """What launches these products with the experts of a number, behind the router or without it."""

        def launch(index: int) -> None:
            if routed:
                self.route()
            for name, config in configs.items():
                self.products[name].launch(config, self.choices[index], sparsity, self.scratch, pdl=self.pdl)

        return launch


def measure(name: str, shape: Shape, limit: float, device: torch.device) -> list[dict[str, Any]]:
    """Every kernel of a block by itself, then all."""
    block = Block(shape, device)
    results: list[dict[str, Any]] = []

    def note(what: str, sparsity: float, microseconds: float, size: float, config: TileConfig | None) -> None:
        entry = {"shape": name, "what": what, "sparsity": sparsity, "microseconds": microseconds}
        entry["share_of_limit"] = size * (1.0 - sparsity) / limit / 1e3 / microseconds
        results.append(entry | {"config": None if config is None else asdict(config)})
        print(json.dumps(results[-1]), flush=True)

    note("router", 0.0, graph_microseconds(lambda _: block.route(), LAUNCHES).median, block.router.weight.nbytes, None)
    for sparsity in SPARSITIES:
        fastest: dict[str, TileConfig] = {}
        total = 0
        for product, tiles in CONFIGS.items():
            size = shape.chosen * block.products[product].stack[0].nbytes
            total += size
            times = {}
            for block_out, block_in, unroll, chunk in tiles:
                config = TileConfig(block_out, block_in, unroll, chunk, 1, dense=not sparsity)

                times[config] = graph_microseconds(block.launching({product: config}, sparsity), LAUNCHES).median
                note(product, sparsity, times[config], size, config)
            fastest[product] = min(times, key=lambda config: times[config])

        chain = block.launching(fastest, sparsity, routed=True)
        note("chain", sparsity, graph_microseconds(chain, LAUNCHES).median, total, None)
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda")
    limit = reading_gb_s(device)
    results = [entry for name in options.shapes.split(",") for entry in measure(name, SHAPES[name], limit, device)]
    content = {"device": device_description(device), "versions": library_versions(), "limit_gb_s": limit}
    write_json(options.out / "experts-kernels-gpu.json", content | {"kernels": results})


if __name__ == "__main__":
    main()
