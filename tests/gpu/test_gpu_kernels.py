"""The kernels on a real GPU: against float64, and the same bits on every run."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import RARE, Attention, PartialsCase
from kernel_cases import (
    LIMITS,
    PARTS,
    PDL,
    Case,
    Output,
    random_case,
    random_packed,
    relative_error,
)
from torch import Tensor
from torch.nn.functional import rms_norm

from teal_kernels.launching import EMPTY
from teal_kernels.operands import AttentionPartials, Norm, Positions, Scratch
from teal_kernels.packing import Packed
from teal_kernels.triton_attention import attention_splits, decode_attention
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of
from teal_kernels.tuning import choose_config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Inputs, outputs of each projection, what follows: the products of real models.
PRODUCTS = {
    "llama-3-8b q/k/v": (4096, (4096, 1024, 1024), "plain"),
    "llama-3-8b o": (4096, (4096,), "residual"),
    "llama-3-8b gate+up": (4096, (14336, 14336), "gated"),
    "llama-3-8b down": (14336, (4096,), "residual"),
    "llama-3.2-1b q/k/v": (2048, (2048, 512, 512), "plain"),
    "smollm2-135m q/k/v": (576, (576, 192, 192), "plain"),
    "smollm2-135m gate+up": (576, (1536, 1536), "gated"),
    "qwen2.5-0.5b down": (4864, (896,), "residual"),
    "no multiple of anything": (1234, (517, 130, 66), "plain"),
}
CONFIGS = {
    "one program a block": TileConfig(block_out=16, block_in=4, unroll=2, inputs_per_chunk=32, warps=1),
    "four programs a block": TileConfig(block_out=128, block_in=4, unroll=2, inputs_per_chunk=8, warps=2),
    "one chunk": TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=64, warps=4),
}
CONFIG_OF_256 = TileConfig(block_out=64, block_in=8, unroll=4, inputs_per_chunk=256, warps=2)


def _model_case(
    name: str, rows: int, dtype: torch.dtype, sparsity: float, *, chosen_for: int | None = None
) -> tuple[Case, TileConfig]:
    """A product of a real model, config as decoding would for a batch of `rows` (or `chosen_for`)."""
    inputs, parts, epilogue = PRODUCTS[name]
    case = random_case(
        epilogue,
        rows,
        dtype=dtype,
        norm=epilogue != "residual",
        bias=False,
        listed=sparsity > 0,
        inputs=inputs,
        parts=parts,
        sparsity=sparsity,
        device="cuda",
    )
    config = choose_config(
        case.x.device,
        inputs=inputs,
        parts=parts,
        dtype=dtype,
        rows=chosen_for or rows,
        epilogue=epilogue,
        sparsity=sparsity,
    )
    if config.dense:  # reads, and takes, every input
        case.thresholds.fill_(-1.0)
    return case, config


def _check(case: Case, config: TileConfig) -> None:
    counts = torch.zeros(3, dtype=torch.int64, device="cuda")
    result = case.launch(config, counts=counts, pdl=PDL)
    # Sums of n terms: rounding grows with their number, to far below the 16-bit dtypes' own.
    limit = LIMITS[case.x.dtype] * (1 if case.x.dtype != torch.float32 else 2)
    assert relative_error(result.y, case.expected()) < limit
    used = len(case.parts)
    assert counts.tolist()[:used] == ([0] * used if config.dense else case.kept)
    if case.epilogue == "residual":
        squares = result.y.float().square().sum(1)
        torch.testing.assert_close(result.squares.sum(1), squares, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("epilogue", PARTS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_finish_and_dtype(epilogue: str, config: str, dtype: torch.dtype, rows: int) -> None:
    for listed in (True, False):
        case = random_case(epilogue, rows, dtype=dtype, listed=listed, device="cuda")
        _check(case, replace(CONFIGS[config], dense=not listed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("per_split", "warps"), [(1024, 1), (1024, 2), (8192, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_long_lists(rows: int, per_split: int, warps: int, dtype: torch.dtype) -> None:
    """Of more lines than a warp takes at a time, stored by two warps, and so long that they lie in global memory."""
    config = TileConfig(block_out=64, block_in=16, unroll=2, inputs_per_chunk=per_split, warps=warps)
    for listed, inputs in itertools.product((True, False), (3000, 3072)):
        case = random_case("plain", rows, dtype=dtype, listed=listed, inputs=inputs, parts=(200, 72), device="cuda")
        _check(case, replace(config, dense=not listed))


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_models(name: str, rows: int) -> None:
    """Batches as they are run, dense where too little is left out, and as skipping would run them."""
    skipped = 0
    for sparsity, chosen_for in itertools.product((0.0, 0.4, 0.5, 0.65, 0.9, 1.0), {1, rows}):
        case, config = _model_case(name, rows, torch.bfloat16, sparsity, chosen_for=chosen_for)
        skipped += not config.dense
        _check(case, config)
    assert skipped > 0


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["llama-3-8b q/k/v", "llama-3-8b o", "llama-3-8b gate+up", "llama-3-8b down"])
def test_products_have_the_same_bits_on_100_runs(name: str, rows: int) -> None:
    case, config = _model_case(name, rows, torch.bfloat16, 0.5)
    _same_bits(lambda scratch: case.launch(config, scratch, pdl=PDL).y, case.x.device)


def _same_bits(launch: Callable[[Scratch], Tensor], device: torch.device) -> None:
    scratch = Scratch(device)
    first = launch(scratch)
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(launch(scratch), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("epilogue", PARTS)
def test_not_finite_inputs_propagate(epilogue: str, value: float) -> None:
    """A NaN is also what an absent partial sum looks like: it must neither hang nor get lost."""
    for config in CONFIGS.values():
        case = random_case(epilogue, 2, norm=False, device="cuda")
        case.x[1, 7] = value
        y, expected = case.launch(config, pdl=PDL).y, case.expected()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert relative_error(y[:1], expected[:1]) < LIMITS[torch.float32]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("rows", "bits"), [(1, 16), (1, 4), (2, 4), (2, 16)])
def test_launches_that_overlap(rows: int, bits: int, dense: bool) -> None:
    """Products and attention one right behind the other on one scratch memory, as decoding launches them.

    With programmatic dependent launch each begins while the one before runs. The bits must be those of
    launches one by one.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    size, wide, heads = 1024, 2816, 8

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    def table(inputs: int, *parts: int) -> Tensor | Packed:
        if bits == 16:
            return random(inputs, sum(parts))
        packed = random_packed(inputs, parts, bits, 128, zeros=True, device="cuda")
        return replace(packed, scales=packed.scales.bfloat16() / 256)

    device = torch.device("cuda", torch.cuda.current_device())
    scratch = Scratch(device)
    config = TileConfig(block_out=128, block_in=4, unroll=4, inputs_per_chunk=128, warps=1, dense=dense)
    tables = [
        {
            "qkv": table(size, size, size, size),
            "o": table(size, size),
            "mlp": table(size, wide, wide),
            "down": table(wide, size),
        }
        for _ in range(6)
    ]
    thresholds = torch.full((3,), 0.3, device=device)
    nothing = torch.zeros(1, device=device)
    weight = torch.ones(size, dtype=torch.bfloat16, device=device)
    cos = torch.ones(256, size // heads, dtype=torch.bfloat16, device=device)
    caches = [random(2, rows, heads, 256, size // heads) for _ in tables]
    positions = Positions.at([200] * rows, device)
    start = random(rows, size) * 30
    hidden, qkv = start.clone(), random(rows, 3 * size)
    attended = AttentionPartials.empty(rows, heads, size // heads, attention_splits(rows * heads), positions)
    activation = random(rows, wide)
    columns = [squares_of(tables[0][name], (size,), config, rows, hidden.dtype) for name in ("o", "down")]
    squares = [torch.zeros(rows, count, device=device) for count in columns]

    def token(pdl: bool) -> None:
        hidden.copy_(start)
        for layer, (weights, cache) in enumerate(zip(tables, caches, strict=True)):
            before = hidden.float().square().sum(1, keepdim=True) if layer == 0 else squares[1]
            norm = Norm(weight, 1e-5, before)
            gemv(hidden, weights["qkv"], (size,) * 3, thresholds, qkv, config, scratch, norm=norm, pdl=pdl)
            decode_attention(qkv, cache[0], cache[1], cos, cos, attended, scale=0.1, pdl=pdl)
            epilogue: dict[str, Any] = {"epilogue": "residual", "pdl": pdl}
            gemv(attended, weights["o"], (size,), nothing, hidden, config, scratch, squares=squares[0], **epilogue)
            norm = Norm(weight, 1e-5, squares[0])
            gated: dict[str, Any] = {"epilogue": "gated", "pdl": pdl, "norm": norm}
            gemv(hidden, weights["mlp"], (wide, wide), thresholds[:2], activation, config, scratch, **gated)
            gemv(activation, weights["down"], (size,), nothing, hidden, config, scratch, squares=squares[1], **epilogue)

    token(pdl=False)
    expected = hidden.clone()
    assert expected.isfinite().all()
    assert not torch.equal(expected, start)
    token(pdl=PDL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token(pdl=PDL)
    for _ in range(100):
        graph.replay()
        assert torch.equal(hidden, expected)
    assert bool((scratch.tensor("partial", 1, torch.int32) == EMPTY).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (4, 128), (5, 80)])
@pytest.mark.parametrize(("rows", "position"), [(1, 150), (1, 1000), (3, 300), (8, 60), (8, 700)])
def test_product_of_heads(rows: int, position: int, heads: int, dim: int, dense: bool, dtype: torch.dtype) -> None:
    case = PartialsCase(rows, heads, dim, position, dtype=dtype, device="cuda")
    for config in (*CONFIGS.values(), CONFIG_OF_256):
        case.check(replace(config, dense=dense), pdl=PDL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_partials_of_few_lines(splits: int, rows: int, dense: bool, dtype: torch.dtype) -> None:
    """As a large batch's, whose rows are programs enough."""
    case = PartialsCase(rows, 32, 128, 64 * splits - 1, dtype=dtype, device="cuda", splits=splits)
    for config in (*CONFIGS.values(), CONFIG_OF_256, replace(CONFIG_OF_256, inputs_per_chunk=512)):
        case.check(replace(config, dense=dense), pdl=PDL)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_lines_wider_than_a_head(rows: int) -> None:
    """Read whole by four warps, a line of inputs is 128 wide: it begins and ends amid heads of 80."""
    config = TileConfig(block_out=64, block_in=16, unroll=2, inputs_per_chunk=512, warps=4, dense=True)
    for dtype in DTYPES:
        for heads, dim in ((20, 80), (7, 64)):
            PartialsCase(rows, heads, dim, 300, dtype=dtype, device="cuda").check(config, pdl=PDL)


def test_product_of_heads_in_much_shared_memory() -> None:
    """Tiles and a list together would be more shared memory than a launch has unasked: the list goes elsewhere."""
    config = TileConfig(block_out=64, block_in=64, unroll=2, inputs_per_chunk=1024, warps=4)
    for dense in (False, True):
        PartialsCase(3, 32, 128, 150, dtype=torch.bfloat16, device="cuda").check(replace(config, dense=dense), pdl=PDL)


# Rows, key/value heads, query heads of each, head size.
HEADS = {
    "llama-3-8b": (1, 8, 4, 128),
    "llama-2-7b": (1, 32, 1, 128),
    "llama-3.2-1b": (3, 8, 4, 64),
    "qwen2.5-0.5b": (1, 2, 7, 64),
    "smollm2-135m": (8, 3, 3, 64),
    "odd": (2, 3, 5, 24),
    "more programs than multiprocessors": (3, 8, 8, 128),
    "wide heads": (1, 4, 2, 256),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: str, dtype: torch.dtype) -> None:
    for position in (0, 1, 63, 64, 100, 700, 2000, 2100, 4000):
        Attention(*HEADS[heads], position, dtype=dtype, positions=4096, device="cuda").check(pdl=PDL)


@pytest.mark.parametrize(("window", "norm"), [(9, True), (500, False), (0, True)])
def test_attention_with_window_or_norm(window: int, norm: bool) -> None:
    for position in (5, 100, 2000, 4000):
        case = Attention(1, 8, 4, 128, position, window, norm, torch.bfloat16, positions=4096, device="cuda")
        case.check(pdl=PDL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rare", [*((each,) for each in RARE), RARE[:4]], ids=str)
def test_attention_of_fewer_models(rare: tuple[str, ...], dtype: torch.dtype) -> None:
    """gpt-oss's heads, and those of a batch."""
    for position in (0, 5, 100, 2000, 4000):
        case = Attention(1, 8, 8, 64, position, dtype=dtype, positions=4096, device="cuda", rare=rare)
        case.check(pdl=PDL)
    Attention(2, 8, 8, 64, (900, 63), window=128, dtype=dtype, positions=4096, device="cuda", rare=rare).check(pdl=PDL)


# Of one, several and all splits; a batch's last row is the longest, its first, or one in the middle.
MIXED = [(0, 63, 900), (2000, 5, 64), (1, 4000, 128, 700)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("position", MIXED, ids=str)
def test_attention_of_rows_of_different_lengths(position: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    rows = len(position)
    Attention(rows, 8, 4, 128, position, window, dtype=dtype, positions=4096, device="cuda").check(pdl=PDL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("position", [(0, 700), (63, 5, 1000), (130, 64, 0, 1, 1023, 2, 300, 500)], ids=str)
def test_product_of_rows_of_different_lengths(position: tuple[int, ...], dense: bool, dtype: torch.dtype) -> None:
    case = PartialsCase(len(position), 8, 128, position, dtype=dtype, device="cuda")
    for config in (*CONFIGS.values(), CONFIG_OF_256):
        case.check(replace(config, dense=dense), pdl=PDL)


@pytest.mark.parametrize("position", [40, 300, 2000, 4000])
def test_attention_has_the_same_bits_on_100_runs(position: int) -> None:
    case = Attention(1, 8, 4, 128, position, dtype=torch.bfloat16, positions=4096, device="cuda")
    _same_bits(lambda _: case.launch(case.keys, case.values, pdl=PDL), case.qkv.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocabulary"), [(1, 4096, 32003), (3, 2560, 49152), (8, 70, 77), (8, 4096, 32003)]
)
def test_output_layer(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> None:
    case = Output.random(rows, hidden_size, vocabulary, bias=rows > 1, dtype=dtype, device="cuda")
    logits, token = case.launch()
    normed = rms_norm(case.hidden.double(), (hidden_size,), case.norm.weight.double(), case.norm.eps)
    expected = normed @ case.weight.double().t() + (0.0 if case.bias is None else case.bias.double())
    assert relative_error(logits, expected) < 2 * LIMITS[dtype]
    assert torch.equal(token, logits.argmax(-1))
