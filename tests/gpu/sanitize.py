"""Every kernel a few times, small, for compute-sanitizer:

    PYTHONPATH=tests compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [KERNELS [ROWS]]

and again with `--tool racecheck`, which looks at shared memory only: that programs hand their partial
sums over rightly is what the tests of equal bits show. The sanitizer slows kernels down a hundredfold,
so this is not a test of results. KERNELS are `products`, `attention`, `packed` or `others`, ROWS of a batch
1 or 3: a process for each is soonest done.
"""

import sys
from dataclasses import replace

import torch
from attention_cases import Attention, PartialsCase
from kernel_cases import PARTS, Output, random_case

from teal_kernels.gate_first import GateActivation, gate_first, gated_hidden
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_decode import embed
from teal_kernels.triton_gate_first import GateLayer, launch_gate_first, step_config
from teal_kernels.triton_gemv import TileConfig

CONFIGS = (
    TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=64, warps=1),
    TileConfig(block_out=128, block_in=4, unroll=2, inputs_per_chunk=8, warps=2),
    TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=512, warps=2),
)
EVEN = {"plain": (256, 128, 128), "residual": (256,), "gated": (128, 128)}
PACKED = ((8, 200, False), (4, 128, True), (4, 32, True))


def products(rows: int) -> None:
    for epilogue in PARTS:
        for parts, inputs in ((PARTS[epilogue], 44), (EVEN[epilogue], 512)):
            case = random_case(epilogue, rows, dtype=torch.bfloat16, inputs=inputs, parts=parts, device="cuda")
            scratch = Scratch(case.x.device)
            for config in CONFIGS:
                for dense in (False, True):
                    case.launch(replace(config, dense=dense), scratch)


def attention(rows: int) -> None:
    mixed = tuple(range(150, 150 - 60 * rows, -60))
    for position, window in ((0, 0), (5, 0), (150, 0), (150, 40), (mixed, 0)):
        case = Attention(rows, 2, 3, 64, position, window, dtype=torch.bfloat16, device="cuda")
        case.launch(case.keys, case.values)
        for splits in (4, 16):
            attended = PartialsCase(rows, 3, 64, position, dtype=torch.bfloat16, device="cuda", splits=splits)
            for config in CONFIGS:
                for dense in (False, True):
                    attended.check(replace(config, dense=dense))


def packed(rows: int) -> None:
    for weights in PACKED:
        case = random_case(
            "plain", rows, dtype=torch.bfloat16, inputs=200, parts=(152, 72, 40), packed=weights, device="cuda"
        )
        attended = PartialsCase(rows, 8, 24, 150, dtype=torch.bfloat16, device="cuda", packed=weights)
        scratch = Scratch(case.x.device)
        for config in CONFIGS:
            for dense in (False, True):
                case.launch(replace(config, dense=dense), scratch)
                attended.check(replace(config, dense=dense))


def others(rows: int) -> None:
    """Gate first, the output layer, the embedding."""
    for width in (44, 200):
        gate, up = (torch.randn(152, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        gated_hidden(x, gate, None, up, None, GateActivation("relu"), "triton")
        gate_first(x, torch.nn.functional.linear(x, gate), up, None, GateActivation("relu"), "triton")
        norm = Norm(gate[0], 1e-5, x.float().square())
        for dense in (False, True):
            launch_gate_first(
                x,
                GateLayer(gate, None),
                up,
                None,
                x.new_empty(rows, 152),
                kind="relu",
                threshold=0.0,
                norm=norm,
                dense=dense,
                counts=torch.zeros(1, dtype=torch.int64, device="cuda"),
                config=step_config(width, rows),
            )
    output = Output.random(rows, 72, 1001, bias=True, dtype=torch.bfloat16, device="cuda")
    _, token = output.launch()
    embed(
        token,
        output.weight,
        torch.zeros(rows, dtype=torch.int32, device="cuda"),
        torch.empty_like(output.hidden),
        torch.empty(rows, 1, device="cuda"),
        pdl=False,
    )


KERNELS = {launches.__name__: launches for launches in (products, attention, packed, others)}


def main() -> None:
    """Launch them."""
    arguments = sys.argv[1:]
    for name in arguments[:1] or KERNELS:
        for rows in [int(argument) for argument in arguments[1:]] or (1, 3):
            KERNELS[name](rows)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
