"""The fused product against its definition in float64: every epilogue, with and without what goes before it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import PartialsCase
from kernel_cases import INPUTS, LIMITS, PARTS, Case, random_case, relative_error

from teal_kernels import active_inputs, plan_gemv
from teal_kernels.operands import Scratch
from teal_kernels.triton_gemv import MAX_ROWS, TileConfig, gemv

CONFIGS = {
    "one chunk": TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=128, warps=1),
    "two chunks": TileConfig(block_out=16, block_in=4, unroll=2, inputs_per_chunk=32, warps=1),
}
EPILOGUES = list(PARTS)


def _check(case: Case, config: TileConfig) -> None:
    result = case.launch(config)
    assert relative_error(result.y, case.expected()) < LIMITS[case.x.dtype]
    if case.epilogue == "residual":
        # The squares are those of y as it is stored, block by block.
        blocks = [chunk.float().square().sum(1) for chunk in result.y.split(config.block_out, dim=1)]
        torch.testing.assert_close(result.squares, torch.stack(blocks, dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("rows", "config"), [*itertools.product([1, 3], CONFIGS), (2, "one chunk"), (8, "two chunks")])
def test_against_float64(rows: int, epilogue: str, listed: bool, config: str) -> None:
    case = random_case(epilogue, rows, listed=listed)
    _check(case, replace(CONFIGS[config], dense=not listed))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_have_thresholds_of_their_own(epilogue: str, config: str) -> None:
    case = random_case(epilogue, 3)
    case.thresholds = torch.tensor([[0.2], [1.0], [2.5]]) * case.thresholds
    counts = torch.zeros(3, dtype=torch.int64)
    _check(case, CONFIGS[config])
    case.launch(CONFIGS[config], counts=counts)
    assert counts[: len(case.parts)].tolist() == case.kept


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_without_bias_or_norm(epilogue: str, listed: bool, bias: bool, norm: bool) -> None:
    case = random_case(epilogue, 2, listed=listed, bias=bias, norm=norm)
    _check(case, replace(CONFIGS["two chunks"], dense=not listed))


@pytest.fixture
def bfloat16_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter adds and multiplies bfloat16 as the 16-bit words that hold it, and cuts where it rounds."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary_op, cast_impl = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl

    def rounded(values: Any) -> Any:
        words = torch.from_numpy(np.asarray(values)).bfloat16().view(torch.int16)
        return TensorHandle(words.numpy().view(np.uint16), bfloat16)

    def right_op(self: Any, lhs: Any, rhs: Any, op: Callable[[Any, Any], Any]) -> Any:
        if lhs.dtype.scalar != bfloat16:
            return binary_op(self, lhs, rhs, op)
        # float32 holds the product of two, and enough of the sum, for one rounding to be the whole of it.
        wide = [torch.from_numpy(side.data.view(np.int16)).view(torch.bfloat16).float().numpy() for side in (lhs, rhs)]
        return rounded(op(*wide))

    def right_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (float32, bfloat16):
            return rounded(src.data)
        return cast_impl(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "binary_op", right_op)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", right_cast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("bfloat16_arithmetic")
def test_16_bit_dtypes(rows: int, epilogue: str, listed: bool, dtype: torch.dtype) -> None:
    case = random_case(epilogue, rows, listed=listed, dtype=dtype)
    _check(case, replace(CONFIGS["two chunks"], dense=not listed))


@pytest.mark.parametrize(("inputs", "parts"), [(1, (32, 16, 16)), (8, (1, 1)), (33, (16, 1, 33)), (64, (32,))], ids=str)
def test_even_and_tiny_sizes(inputs: int, parts: tuple[int, ...]) -> None:
    _check(random_case("plain", 1, inputs=inputs, parts=parts, norm=False), CONFIGS["two chunks"])


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_more_chunks_than_are_gathered_at_a_time(epilogue: str) -> None:
    """A wide block leaves registers for the partial sums of two chunks; here are six."""
    _check(random_case(epilogue, 2), TileConfig(block_out=512, block_in=4, unroll=2, inputs_per_chunk=8, warps=1))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 3])
def test_everything_dropped(epilogue: str, rows: int) -> None:
    case = random_case(epilogue, rows)
    case.thresholds.fill_(1e9)
    result = case.launch(CONFIGS["two chunks"], counts=(counts := torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(result.y, case.expected().float(), rtol=1e-6, atol=1e-6)
    assert not counts.any()
    bare = random_case(epilogue, rows, bias=False)
    bare.thresholds.fill_(1e9)
    y = bare.launch(CONFIGS["two chunks"]).y
    assert torch.equal(y, bare.before if epilogue == "residual" else torch.zeros_like(y))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_dropped(epilogue: str, rows: int) -> None:
    """A threshold below zero keeps zeros too."""
    case = random_case(epilogue, rows, listed=False, norm=False)
    case.x[:, ::5] = 0.0
    counts = torch.zeros(3, dtype=torch.int64)
    result = case.launch(CONFIGS["one chunk"], counts=counts)
    assert relative_error(result.y, case.expected()) < LIMITS[torch.float32]
    used = len(case.parts)
    assert counts.tolist() == [rows * INPUTS] * used + [0] * (3 - used)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("rows", "config"), [(1, "two chunks"), (3, "one chunk")])
def test_counts_are_added_to(epilogue: str, rows: int, config: str) -> None:
    case = random_case(epilogue, rows)
    counts = torch.tensor([5, 6, 7])
    scratch = Scratch(case.x.device)
    for _ in range(2):
        case.launch(CONFIGS[config], scratch, counts)
    kept = [*case.kept, 0, 0][:3]
    assert counts.tolist() == [start + 2 * more for start, more in zip((5, 6, 7), kept, strict=True)]
    assert len(set(case.kept)) == len(case.parts)  # or a count could go to the wrong part
    case.launch(replace(CONFIGS[config], dense=True), scratch, counts)  # a dense read counts nothing
    assert counts.tolist() == [start + 2 * more for start, more in zip((5, 6, 7), kept, strict=True)]


def test_drops_exactly_the_inputs_at_or_below_the_threshold() -> None:
    x = torch.tensor([[0.5, -0.5, 0.25, 0.75, -1.0]])
    case = Case("plain", (5,), x, torch.eye(5), torch.tensor([0.5]), torch.zeros(1, 5), None, None)
    assert case.launch(CONFIGS["one chunk"]).y.tolist() == [[0.0, 0.0, 0.0, 0.75, -1.0]]


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_that_no_row_needs_are_not_used(rows: int) -> None:
    case = random_case("plain", rows)
    clean = case.launch(CONFIGS["two chunks"]).y
    start = 0
    for part, threshold in zip(case.parts, case.thresholds, strict=True):
        dropped = ~active_inputs(case.seen, threshold).any(0)
        assert dropped.any()
        case.table[dropped, start : start + part] = float("nan")
        start += part
    assert torch.equal(case.launch(CONFIGS["two chunks"]).y, clean)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_not_finite_inputs_propagate(epilogue: str, listed: bool, value: float) -> None:
    """As in the masked product, and into the row that holds them only."""
    case = random_case(epilogue, 2, listed=listed, norm=False)
    case.x[1, 7] = value
    y, expected = case.launch(replace(CONFIGS["two chunks"], dense=not listed)).y, case.expected()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[y.isinf()].double(), expected[expected.isinf()])
    assert torch.equal(y.isinf(), expected.isinf())
    assert not y[1].isfinite().all()
    assert relative_error(y[:1], expected[:1]) < LIMITS[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_not_finite_inputs_propagate_through_the_norm(value: float) -> None:
    case = random_case("plain", 2)
    case.x[1, 7] = value
    assert case.norm is not None
    case.norm.squares[1, 0] = value
    y, expected = case.launch(CONFIGS["two chunks"]).y, case.expected()
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[1].isnan().all()
    assert relative_error(y[:1], expected[:1]) < LIMITS[torch.float32]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_infinite_threshold_drops_infinity_and_keeps_nan(rows: int) -> None:
    case = random_case("plain", rows, norm=False)
    case.thresholds[1] = torch.inf
    case.x[0, 7], case.x[0, 40] = torch.inf, -torch.inf
    second = slice(case.parts[0], case.parts[0] + case.parts[1])
    assert case.bias is not None
    y = case.launch(CONFIGS["two chunks"]).y
    assert torch.equal(y[0, second], case.bias[second])
    assert not y[0, : case.parts[0]].isfinite().any()
    case.x[0, 7] = torch.nan
    assert case.launch(CONFIGS["two chunks"]).y[0].isnan().all()


def test_one_workspace_for_all_shapes_and_dtypes() -> None:
    """Scratch that was used, outgrown or of another dtype leaves no trace in the results."""
    shared = Scratch(torch.device("cpu"))
    launches = [
        (random_case("plain", 1), CONFIGS["two chunks"]),
        (random_case("gated", 3, dtype=torch.float16), CONFIGS["two chunks"]),
        (random_case("residual", 1, inputs=20, parts=(5,)), CONFIGS["two chunks"]),
        (random_case("gated", 2, listed=False), replace(CONFIGS["two chunks"], dense=True)),
        (random_case("plain", 2, dtype=torch.float16, inputs=70), CONFIGS["two chunks"]),
        (random_case("plain", MAX_ROWS), CONFIGS["one chunk"]),
        (random_case("plain", 1), CONFIGS["two chunks"]),
    ]
    for case, config in launches:
        own, taken = case.launch(config), case.launch(config, shared)
        assert torch.equal(own.y, taken.y)
        assert torch.equal(own.squares, taken.squares)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_same_bits_on_every_run(epilogue: str, listed: bool) -> None:
    case, config = random_case(epilogue, 2, listed=listed), replace(CONFIGS["two chunks"], dense=not listed)
    scratch = Scratch(case.x.device)
    first = case.launch(config, scratch)
    for _ in range(2):
        again = case.launch(config, scratch)
        assert torch.equal(again.y, first.y)
        assert torch.equal(again.squares, first.squares)


def test_a_residual_product_needs_squares_of_its_config() -> None:
    x, table, y = torch.ones(1, 8), torch.ones(8, 40), torch.zeros(1, 40)
    for squares in (None, torch.zeros(1, 1), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"squares of shape \(1, 2\)"):
            gemv(
                x,
                table,
                (40,),
                torch.zeros(1),
                y,
                CONFIGS["one chunk"],
                Scratch(x.device),
                epilogue="residual",
                squares=squares,
            )


@pytest.mark.parametrize(("epilogue", "parts"), [("gated", (16, 24)), ("gated", (40,)), ("plain", (10, 10, 10, 10))])
def test_parts_that_do_not_fit_the_epilogue(epilogue: str, parts: tuple[int, ...]) -> None:
    """A gated product would wait for sums that nobody sends."""
    x, table, y = torch.ones(1, 8), torch.ones(8, 40), torch.zeros(1, 40)
    with pytest.raises(ValueError, match="parts"):
        gemv(x, table, parts, torch.zeros(4), y, CONFIGS["one chunk"], Scratch(x.device), epilogue=epilogue)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_blocks_wider_than_the_registers_of_a_warp(epilogue: str) -> None:
    _check(random_case(epilogue, 1), TileConfig(block_out=2048, block_in=1, unroll=1, inputs_per_chunk=22, warps=1))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("rows", "dim", "position"), [(1, 16, 0), (1, 16, 70), (2, 24, 100), (3, 16, 120), (8, 16, 90)]
)
def test_partials_are_merged(rows: int, dim: int, position: int, config: str, dense: bool) -> None:
    PartialsCase(rows, 4, dim, position, split_multiple=16, outputs=40).check(replace(CONFIGS[config], dense=dense))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("splits", "position"), [(1, 9), (2, 10), (2, 31), (3, 47), (4, 40), (6, 90)])
def test_partials_of_few_lines(splits: int, position: int, dense: bool) -> None:
    """As many as are read at first, fewer, and more."""
    case = PartialsCase(5, 4, 16, position, split_multiple=16, outputs=40, splits=splits)
    case.check(replace(CONFIGS["one chunk"], dense=dense))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("packed", [None, (8, 32, True)], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize(
    ("position", "window"), [((0, 90), 0), ((70, 15, 130), 0), ((16, 100, 3, 95, 40), 35)], ids=str
)
def test_partials_of_rows_of_different_lengths(
    position: tuple[int, ...], window: int, packed: tuple[int, int, bool] | None, dense: bool
) -> None:
    """Each gets what it gets in a batch of which all are as long, bit for bit; beyond all partials lies NaN.

    (Of all inputs: what other rows drop decides in which order those of a list are added up.)
    """
    config = replace(CONFIGS["one chunk"], inputs_per_chunk=32, dense=dense)
    rows = len(position)
    case = PartialsCase(rows, 4, 16, position, split_multiple=16, outputs=40, packed=packed, window=window)
    case.check(config)
    threshold = torch.full((1,), -torch.inf)
    together = case.launch(config, threshold)
    for row in range(rows):
        assert torch.equal(case.all_at(row).launch(config, threshold)[row], together[row])


def test_partials_of_other_dtypes() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        PartialsCase(1, 4, 16, 70, split_multiple=16, dtype=dtype).check(CONFIGS["one chunk"])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.usefixtures("narrow_warps")
def test_inputs_taken_vector_by_vector(epilogue: str, rows: int, dense: bool) -> None:
    """Chunks of eight vectors, all full or the last one not; of five rows a warp holds two at a time.

    (Three and five rows read whole are normalised as they are multiplied, in no vectors.)
    """
    config = TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=64, warps=1, dense=dense)
    for inputs in (INPUTS, 128):
        _check(random_case(epilogue, rows, listed=not dense, inputs=inputs), config)


# Heads, head size: heads narrower than what is taken at once, as wide, wider, and none of these.
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(16, 8), (4, 16), (2, 64), (4, 24)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("narrow_warps")
def test_partials_are_merged_vector_by_vector(
    rows: int, heads: int, dim: int, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_gemv, "_MAX_VECTORS", 64)  # so that a warp of three rows takes eight vectors, too
    monkeypatch.setattr(plan_gemv, "_MAX_VECTORS_OF_PARTIALS", 128)
    for per_split in (32, 64):
        config = replace(CONFIGS["one chunk"], inputs_per_chunk=per_split, dense=dense)
        PartialsCase(rows, heads, dim, 100, split_multiple=16, outputs=40).check(config)
        PartialsCase(rows, heads, dim, 100, split_multiple=16, outputs=40, packed=(8, 32, True)).check(config)


def test_partials_propagate_nan_to_their_own_row() -> None:
    case = PartialsCase(2, 4, 16, 40, split_multiple=16)
    case.read.sums[1, 1, 5] = torch.nan
    y = torch.zeros(2, case.outputs)
    everything = torch.full((1,), torch.inf)
    gemv(case.read, case.table, (case.outputs,), everything, y, CONFIGS["one chunk"], Scratch(y.device))
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
