"""Every kernel through Triton's compiler, for a GPU that need not be here; nothing is launched.

    PYTHONPATH=tests python tests/compile_kernels.py 80 90

compiles for compute capabilities 8.0 and 9.0, and prints the names of the kernels after each. Capabilities below 9.0
and from there on take turns (`Turn`): a case is compiled for one of them, each value of its arguments for both.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from attention_cases import RARE, Attention, PartialsCase
from experts_cases import random_experts, random_router
from kernel_cases import PARTS, Output, random_case
from triton.backends.compiler import GPUTarget

from teal_kernels import (
    launching,
    triton_attention,
    triton_decode,
    triton_distil,
    triton_gate_first,
    triton_gemv,
    triton_masks,
    triton_ranks,
    triton_routed,
    triton_router,
)
from teal_kernels.operands import Added, Beside, Norm, Positions, Scratch
from teal_kernels.triton_decode import LOGITS_BLOCK, Best, embed, find_best, write_norm, write_norm_of_partials
from teal_kernels.triton_distil import distil_rows_
from teal_kernels.triton_gate_first import GateFirstConfig, GateLayer, launch_gate_first
from teal_kernels.triton_gemv import Curve, TileConfig, gemv, squares_of
from teal_kernels.triton_masks import masked_rows
from teal_kernels.triton_ranks import Inboxes, gather_ranks, sum_ranks
from teal_kernels.triton_routed import GroupRouter, RoutedConfig, launch_routed, no_choice, route_groups
from teal_kernels.tuning import UNTUNED

# Rows, config, quantised weights of the product after attention: lists in shared and in global memory, and none.
PRODUCTS = (
    (1, TileConfig(block_out=128, block_in=4, unroll=2, inputs_per_chunk=64, warps=1), (8, 64, False)),
    (3, TileConfig(block_out=64, block_in=16, unroll=1, inputs_per_chunk=2048, warps=2), (4, 64, True)),
    (1, TileConfig(block_out=128, block_in=4, unroll=2, inputs_per_chunk=128, warps=2, dense=True), (4, 64, True)),
    (3, TileConfig(block_out=64, block_in=16, unroll=1, inputs_per_chunk=128, warps=2, dense=True), (8, 64, False)),
)
# FMA instructions with all inputs at once and in a loop, and tensor cores for more rows than one.
GATE_FIRST = (
    GateFirstConfig(neurons=2, block_out=1, warps=1),
    GateFirstConfig(neurons=16, block_out=16, block_in=64, unroll=1, warps=1, gate_block_in=64, gate_unroll=1),
)
# The same, of groups of 16 neurons.
ROUTED = (
    RoutedConfig(neurons=2, block_in=1024, unroll=4, warps=1),
    RoutedConfig(neurons=2, block_in=32, unroll=2, warps=1),
    RoutedConfig(neurons=16, block_in=64, unroll=1, warps=1),
)
DTYPE = torch.bfloat16


class NoGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        """What launches a kernel is made for a driver."""


class Turn:
    """Which cases are this capability's.

    Of two capabilities one has those whose arguments' numbers, added up, are even, and the other all others. Any
    values of the arguments stand together in a case of one of them, and any but one of them in cases of both.
    """

    def __init__(self, capability: int) -> None:
        self._odd = capability >= 90

    def __call__(self, *numbers: int) -> bool:
        return sum(numbers) % 2 == self._odd


def _compile(kernel: Any, *arguments: Any, pdl: bool, names: set[str], **options: Any) -> None:
    launching.launch(kernel, *arguments, pdl=pdl, **options)
    names.add(kernel.__name__)


def _norms(index: int, mine: Turn, *, pdl: bool) -> None:
    """Products that take up a layer norm with and without biases, and what is still to be added to the stream."""
    rows, config, _ = PRODUCTS[index]
    x, weight, table = (torch.zeros(*shape, dtype=DTYPE) for shape in ((rows, 72), (72,), (72, 128)))
    scratch, thresholds, y = Scratch(x.device), torch.zeros(1), torch.zeros(rows, 128, dtype=DTYPE)
    count = squares_of(table, (128,), config, rows, DTYPE)
    sums = torch.zeros(2, rows, count)
    for bias in (None, weight):
        if not mine(index, bias is None):
            continue
        norm = Norm(weight, 1e-5, torch.zeros(2, rows, 3), centred=True, bias=bias)
        options = {"norm": norm, "epilogue": "residual", "squares": sums, "scale": 0.5, "pdl": pdl}
        gemv(x, table, (128,), thresholds, y, config, scratch, **options)  # type: ignore[arg-type]
    for number, activation in enumerate(launching.ACTIVATIONS if rows == 1 else ()):
        if activation not in ("drelu", "clamped_swiglu") and mine(index // 2, number):
            curve = Curve(0.8, 0.8, 0.5) if activation == "xielu" else None
            options = {"epilogue": "activated", "activation": activation, "curve": curve, "pdl": pdl}
            gemv(x, table, (128,), thresholds, y, config, scratch, **options)  # type: ignore[arg-type]
    if rows == 1:
        added = Added(x, weight, 1e-5, True, 0.5, torch.zeros(4, 3), x.clone())
        for first in (None, Norm(weight, 1e-5, sums[0])):
            if not mine(index // 2, first is None):
                continue
            options = {
                "norm": first,
                "added": added,
                "epilogue": "beside",
                "squares": torch.zeros(4, count),
                "pdl": pdl,
            }
            of_outputs = Beside(y.clone(), torch.zeros(128, dtype=DTYPE), True)
            gemv(x, table, (128,), thresholds, y, config, scratch, beside=of_outputs, **options)  # type: ignore[arg-type]


def _of_vllm() -> None:
    """A layer of three projections as vLLM runs it, with and without a bias."""
    x, table, y = (torch.zeros(*shape, dtype=DTYPE) for shape in ((1, 72), (72, 256), (1, 256)))
    for bias in (None, y[0]):
        scratch = Scratch(x.device)
        gemv(x, table, (128, 64, 64), torch.zeros(3), y, UNTUNED, scratch, bias=bias, exclusive_device=False)


def _routed(rows: int, mine: Turn, *, pdl: bool) -> None:
    """Routers of one layer and of two, few groups and many, and the groups that they choose."""
    x, weight = torch.zeros(rows, 72, dtype=DTYPE), torch.zeros(2048, 72, dtype=DTYPE)
    norm, counts = Norm(weight[0], 1e-5, torch.zeros(rows, 4)), torch.zeros(1, dtype=torch.int64)
    for number, (groups, rank) in enumerate(((128, None), (2048, None), (128, 24))):
        if not mine(rows // 2, number):
            continue
        first, inputs = (None, 72) if rank is None else (weight[:rank], rank)
        router = GroupRouter(first, torch.zeros(groups, inputs, dtype=DTYPE), torch.zeros(groups, dtype=DTYPE), 16)
        chosen, ranked = no_choice(rows, router, x.device, DTYPE)
        route_groups(x, router, chosen, ranked, norm=norm, counts=counts, pdl=pdl)
    chosen, y, layer = (
        torch.zeros(rows, 128, dtype=torch.int32),
        torch.zeros(rows, 2048, dtype=DTYPE),
        GateLayer(weight, None),
    )
    for number, config in enumerate(ROUTED):
        for whole in (False, True):
            if mine(rows // 2, number, whole):
                options = {"group": 16, "kind": "silu", "norm": norm, "whole": whole, "config": config, "pdl": pdl}
                launch_routed(x, chosen, layer, layer, y, **options)  # type: ignore[arg-type]


def _ranks(rows: int, mine: Turn, *, pdl: bool) -> None:
    """Sums over one, two and three ranks, of RMS and layer norms, and gathers."""
    own, y = torch.zeros(rows, 300, dtype=DTYPE), torch.zeros(rows, 300, dtype=DTYPE)
    for ranks in (1, 2, 3):
        inboxes = Inboxes(ranks - 1, [torch.zeros(9000, dtype=torch.int32) for _ in range(ranks)])
        for number, squares in enumerate((None, torch.zeros(rows, 2), torch.zeros(2, rows, 2))):
            for scale in (1.0, 0.5):
                if mine(rows // 2, ranks, number, scale == 1.0):
                    sum_ranks(own, inboxes, 16, y, added=squares is not None, scale=scale, squares=squares, pdl=pdl)
        gather_ranks(own, inboxes, 16, torch.zeros(rows, 300 * ranks - 1, dtype=DTYPE), pdl=pdl)


def _masks() -> None:
    """Forward and backward, in training under autocast and without it; a start for each row and for all."""
    for dtype in (torch.float32, DTYPE):
        x = torch.zeros(2, 8, 72, requires_grad=True)
        for start in (4, torch.tensor([2, 4])):
            masked, _ = masked_rows(x, torch.zeros(()), start, tokens=8, dtype=dtype)
            masked.sum().backward()


def _distils() -> None:
    """Logits of either dtype, with the loss of the text and without it."""
    for dtype in (torch.float32, DTYPE):
        logits = torch.zeros(3, 100, dtype=dtype)
        distil_rows_(logits, logits.clone(), 0.5)
        distil_rows_(logits, logits.clone(), 0.5, torch.zeros(3, dtype=torch.int64), torch.tensor(0.1))


@launching.compiling(raising=True)
def main(capability: int) -> None:
    """Compile them."""
    triton.runtime.driver.set_active(NoGPU(capability))
    names: set[str] = set()
    modules = (triton_gemv, triton_attention, triton_decode, triton_gate_first, triton_routed, triton_router)
    for module in (*modules, triton_ranks, triton_masks, triton_distil):
        module.launch = partial(_compile, names=names)
    pdl, mine = capability >= 90, Turn(capability)
    for index, (rows, config, quantised) in enumerate(PRODUCTS):
        for number, epilogue in enumerate(PARTS):
            case = random_case(epilogue, rows, dtype=DTYPE)
            if mine(index, number):
                case.launch(config, pdl=pdl)
            if rows > 1 and epilogue == "gated" and mine(index // 2):
                replace(case, thresholds=case.thresholds.repeat(rows, 1)).launch(config, pdl=pdl)
        _norms(index, mine, pdl=pdl)
        for packed in (None, quantised):
            if mine(index, packed is None):
                PartialsCase(rows, 3, 64, 150, dtype=DTYPE, packed=packed).launch(config, torch.zeros(1), pdl=pdl)
    for index, (_, config, quantised) in enumerate(PRODUCTS[::2]):
        for number, epilogue in enumerate(("gated", "residual", "paired")):
            for packed in (None, quantised):
                sizes = {"inputs": 128, "outputs": 64, "dtype": DTYPE, "packed": packed}
                for bias in (False, True) if epilogue == "residual" else (epilogue == "paired",):
                    of_experts = random_experts(epilogue, 2, **sizes, bias=bias)  # type: ignore[arg-type]
                    if mine(index, number, packed is None, bias):
                        of_experts.launch(config, pdl=pdl)
                    if epilogue == "residual" and packed is None and bias and mine(index):
                        replace(of_experts, thresholds=of_experts.thresholds.repeat(2, 1)).launch(config, pdl=pdl)
    for experts, scores in ((8, "softmax"), (200, "softmax"), (16, "sparsemixer")):
        random_router(2, experts, 2, dtype=DTYPE, scores=scores, aside=experts == 8).launch(pdl=pdl)
    attention = Attention(4, 2, 3, 64, (150, 151, 140, 141), dtype=DTYPE, span=2)
    attention.launch(attention.keys, attention.values, pdl=pdl)
    for rows in (1, 3):
        kinds = ({"window": 40, "norm": True}, {"rare": RARE[:4]}, {"rare": RARE[4:5]}, {"rare": RARE[5:]})
        for number, kind in enumerate(kinds):
            if mine(rows // 2, number):
                attention = Attention(rows, 2, 3, 64, 150, dtype=DTYPE, **kind)  # type: ignore[arg-type]
                attention.launch(attention.keys, attention.values, pdl=pdl)
        logits, token = Output.random(rows, 72, 1001, bias=True, dtype=DTYPE, device="cpu").launch()
        find_best(logits, Best.empty(*logits.shape, logits.device, block=LOGITS_BLOCK), pdl=pdl)
        hidden, gates, up = (torch.zeros(rows, size, dtype=DTYPE) for size in (72, 152, 152))
        embed(token, hidden, Positions.at([0] * rows, "cpu"), hidden, torch.zeros(rows, 1), pdl=pdl)
        for squares in (None, torch.zeros(rows, 1)):
            for added in {False, squares is not None}:
                options = {"centred": squares is None, "squares": squares, "added": added, "pdl": pdl}
                write_norm(hidden, hidden[0], hidden, eps=1e-5, **options)  # type: ignore[arg-type]
        left = PartialsCase(rows, 3, 24, 150).read
        for bias in (None, hidden[0]):
            centred = bias is not None
            write_norm_of_partials(left, hidden[0], hidden, eps=1e-5, bias=bias, centred=centred, pdl=pdl)
        weight = torch.zeros(152, 72, dtype=DTYPE)
        layer = GateLayer(weight, None)
        for gate in (gates, layer):
            launch_gate_first(hidden, gate, weight, None, up, kind="relu", threshold=0.0, pdl=pdl)
        norm, counts = Norm(weight[0], 1e-5, torch.zeros(rows, 4)), torch.zeros(1, dtype=torch.int64)
        step = partial(launch_gate_first, hidden, layer, weight, None, up, kind="fatrelu", threshold=0.1, norm=norm)
        for number, config in enumerate(GATE_FIRST):
            for dense in (False, True):
                if mine(rows // 2, number, dense):
                    step(dense=dense, counts=counts, config=config, pdl=pdl)
        _routed(rows, mine, pdl=pdl)
        _ranks(rows, mine, pdl=pdl)
    _of_vllm()
    _masks()
    _distils()
    print(capability, *sorted(names), flush=True)


if __name__ == "__main__":
    # Each in a process of its own, since Triton keeps its target; what it is imported with is imported once.
    for asked in map(int, sys.argv[1:]):
        child = os.fork()
        if child == 0:
            main(asked)
            sys.exit()
        if os.waitpid(child, 0)[1]:
            sys.exit(f"it does not compile for {asked}")
