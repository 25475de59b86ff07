"""Embedding, attention and output layer of a decoded token, against plain torch in float64."""

import pytest
import torch
from attention_cases import ATTENTION_LIMITS, RARE, Attention, PartialsCase, merged
from kernel_cases import EPS, LIMITS, Output, relative_error
from torch.nn.functional import layer_norm, rms_norm

from teal_kernels import triton_attention
from teal_kernels.operands import AttentionPartials, Positions
from teal_kernels.triton_attention import attention_splits
from teal_kernels.triton_decode import LOGITS_BLOCK, Best, embed, find_best, pick, write_norm_of_partials

# Lanes that pad a group of heads divide zero by zero; nobody stores what they get.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CPU = torch.device("cpu")


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for programs that find nothing to do."""
    monkeypatch.setattr(triton_attention, "_ATTENTION_PROGRAMS", 1)


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than blocks, as in a long cache."""
    monkeypatch.setattr(triton_attention, "_ATTENTION_PROGRAMS", 16)


HEADS = [(1, 2, 2, 16), (2, 3, 3, 24), (1, 2, 1, 64), (1, 1, 8, 128)]


@pytest.mark.parametrize(("window", "norm"), [(0, False), (9, True)], ids=["plain", "window-and-norm"])
@pytest.mark.parametrize("position", [0, 5, 40, 150])
@pytest.mark.parametrize(("rows", "kv_heads", "group", "dim"), HEADS)
@pytest.mark.usefixtures("few_splits")
def test_attention(rows: int, kv_heads: int, group: int, dim: int, position: int, window: int, norm: bool) -> None:
    Attention(rows, kv_heads, group, dim, position, window, norm).check()


@pytest.mark.parametrize(("window", "norm"), [(0, True), (1, False), (6, False), (41, False), (200, True)])
@pytest.mark.usefixtures("few_splits")
def test_attention_windows(window: int, norm: bool) -> None:
    Attention(2, 2, 2, 16, 40, window, norm).check()


@pytest.mark.parametrize(("position", "window"), [(150, 0), (150, 100), (150, 9), (64, 0), (63, 0), (5, 0)])
@pytest.mark.parametrize(("rows", "kv_heads", "group", "dim"), [(2, 1, 2, 16), (1, 2, 3, 24)])
@pytest.mark.usefixtures("many_splits")
def test_attention_in_many_splits(rows: int, kv_heads: int, group: int, dim: int, position: int, window: int) -> None:
    Attention(rows, kv_heads, group, dim, position, window, split_multiple=16).check()


@pytest.mark.parametrize("rare", [*((each,) for each in RARE), RARE[:4]], ids=str)
@pytest.mark.parametrize("position", [(150,), (5, 97)], ids=str)
def test_what_fewer_models_have(position: tuple[int, ...], rare: tuple[str, ...]) -> None:
    """In several splits, within the window and beyond it, with heads that are no power of two."""
    sizes = (len(position), 2, 3, 24, position)
    Attention(*sizes, window=60, split_multiple=16, splits=4, rare=rare).check()


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("position", [(150,), (150, 20, 64)], ids=str)
def test_norm_of_what_attention_left(position: tuple[int, ...], centred: bool) -> None:
    """Of rows in several splits, and in fewer than the longest has."""
    case = PartialsCase(len(position), 3, 24, position, split_multiple=16)
    weight, bias = torch.randn(2, 72, generator=torch.Generator().manual_seed(0))
    y = torch.full((len(position), 72), torch.nan)
    write_norm_of_partials(case.read, weight, y, eps=EPS, bias=bias if centred else None, centred=centred)
    x = case.x.double()
    expected = rms_norm(x, (72,), weight.double(), EPS)
    if centred:
        expected = layer_norm(x, (72,), weight.double(), bias.double(), EPS)
    assert relative_error(y, expected) < LIMITS[torch.float32]


def test_layer_norms_that_the_kernel_has_not() -> None:
    case = Attention(1, 2, 2, 16, 3, rare=("own layer norms",))
    case.biases = (case.cos[0],) * 2
    with pytest.raises(ValueError, match="their own have no bias"):
        case.launch(case.keys, case.values)
    case = Attention(1, 2, 2, 16, 3, rare=("alibi",))
    assert case.alibi is not None
    case.alibi = case.alibi[:, 1:]
    with pytest.raises(ValueError, match="does not fit 4 heads, 160 positions"):
        case.launch(case.keys, case.values)


@pytest.mark.parametrize("position", [(0, 150), (40, 3, 97), (15, 16, 0, 31), (70, 70)], ids=str)
@pytest.mark.parametrize(("window", "norm"), [(0, False), (20, True)])
def test_attention_of_rows_of_different_lengths(position: tuple[int, ...], window: int, norm: bool) -> None:
    """Each gets what it gets alone; bit for bit, where the KV cache is split as it is alone."""
    case = Attention(len(position), 2, 2, 16, position, window, norm, split_multiple=16, splits=4)
    case.check()
    together = case.partials(case.keys.clone(), case.values.clone())
    for row in range(case.rows):
        single = case.row(row)
        alone = single.partials(single.keys.clone(), single.values.clone())
        assert relative_error(merged(together)[row], merged(alone)[0]) < ATTENTION_LIMITS[case.dtype]
        if case.at[row] == max(case.at):
            assert torch.equal(alone.logs[:, 0], together.logs[:, row])
            assert torch.equal(alone.sums[:, 0].nan_to_num(), together.sums[:, row].nan_to_num())
    assert not together.sums.isnan().any()  # beyond a row's own they are read, and weigh nothing


def test_partials_need_a_position_a_row() -> None:
    with pytest.raises(ValueError, match="2 rows need as many positions"):
        AttentionPartials.empty(2, 4, 16, 1, Positions.at([0], "cpu"))


@pytest.mark.parametrize("position", [0, 70, 150])
@pytest.mark.usefixtures("many_splits")
def test_attention_in_float16(position: int) -> None:
    """bfloat16 is tested on a GPU: the interpreter cannot multiply it."""
    Attention(1, 1, 2, 64, position, dtype=torch.float16, split_multiple=16).check()


@pytest.mark.usefixtures("few_splits")
def test_attention_propagates_nan_to_its_own_heads() -> None:
    case = Attention(2, 2, 2, 16, 20)
    case.qkv[1, :16] = torch.nan  # the first query head of the second row
    case.values[0, 1, 3] = torch.nan  # an old value of the first row's second key/value head
    out = case.launch(case.keys, case.values).view(2, 4, 16)
    assert out.isnan().all(-1).tolist() == [[False, False, True, True], [True, False, False, False]]
    assert out.isnan().any(-1).tolist() == out.isnan().all(-1).tolist()


def test_attention_splits() -> None:
    assert [attention_splits(programs) for programs in (1, 8, 16, 100, 128, 1000)] == [16, 16, 8, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "hidden_size"), [(1, 64), (3, 70), (8, 1)])
def test_embed(rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    vocabulary = 77
    embedding = torch.randn(vocabulary, hidden_size).to(dtype)
    token = torch.tensor([0, vocabulary - 1, 5, 5, 1, 2, 3, 4])[:rows]
    positions = Positions.at(range(4, 4 + rows), "cpu")
    hidden, squares = torch.empty(rows, hidden_size, dtype=dtype), torch.empty(rows, 1)
    embed(token, embedding, positions, hidden, squares, pdl=False)
    assert torch.equal(hidden, embedding[token])
    torch.testing.assert_close(squares[:, 0], hidden.float().square().sum(1), rtol=1e-6, atol=1e-6)
    assert positions.own.tolist() == list(range(5, 5 + rows))
    assert positions.longest.tolist() == [4 + rows]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocabulary"),
    [(1, 70, 77), (3, 70, 77), (8, 16, 64), (2, 1100, 24), (1, 16, 5), (2, 70, 300), (5, 33, 129)],
)
def test_output_logits(rows: int, hidden_size: int, vocabulary: int, bias: bool) -> None:
    case = Output.random(rows, hidden_size, vocabulary, bias=bias)
    logits, token = case.launch()
    expected = rms_norm(case.hidden.double(), (hidden_size,), case.norm.weight.double(), EPS) @ case.weight.double().t()
    if case.bias is not None:
        expected += case.bias.double()
    assert float((logits.double() - expected).norm() / expected.norm()) < 2e-6
    assert torch.equal(token, logits.argmax(-1))


def test_output_logits_in_float16() -> None:
    case = Output.random(2, 70, 77, bias=True, dtype=torch.float16)
    assert case.bias is not None
    logits, token = case.launch()
    scale = torch.rsqrt(case.hidden.float().square().mean(1, keepdim=True) + EPS)
    normed = (case.hidden.float() * scale).half() * case.norm.weight  # rounded where transformers rounds
    expected = normed.double() @ case.weight.double().t() + case.bias.double()
    assert float((logits.double() - expected).norm() / expected.norm()) < 1e-3
    assert torch.equal(token, logits.argmax(-1))


@pytest.mark.parametrize(
    ("rows", "vocabulary", "tied"),
    [
        *((1, 77, tied) for tied in ((3, 4, 6), (7, 8), (0, 76), (20, 50, 76), (75, 76), (72, 73))),
        *((2, 300, tied) for tied in ((3, 4, 6), (127, 128), (0, 299), (20, 150, 299), (256, 257))),
    ],
    ids=str,
)
def test_among_equal_logits_the_lowest_token_wins(rows: int, vocabulary: int, tied: tuple[int, ...]) -> None:
    """Within a block of logits, and in different ones."""
    case = Output.random(rows, 16, vocabulary, bias=True)
    assert case.bias is not None
    case.weight[list(tied)] = 0.0
    case.bias[list(tied)] = 1000.0
    logits, token = case.launch()
    assert (logits == 1000.0).sum(1).tolist() == [len(tied)] * rows
    assert token.tolist() == [tied[0]] * rows


def test_ties_are_those_of_the_rounded_logits() -> None:
    """In float16 3000.4 and 3000.9 are both 3000, and argmax of the logits takes the first."""
    case = Output.random(1, 16, 77, bias=True, dtype=torch.float16)
    assert case.bias is not None
    normed = case.hidden * 0
    case.hidden[:], case.norm.squares[:] = normed, 0.0
    case.hidden[0, 0] = 1.0
    case.norm.squares[0, 0] = 16.0  # a scale of one
    case.norm.weight[0] = 1.0
    case.weight[:, 0], case.bias[:] = 0.0, 0.0
    case.bias[[30, 60]] = 3000.0
    case.weight[30, 0], case.weight[60, 0] = 0.4, 0.9
    logits, token = case.launch()
    assert logits[0, 30] == logits[0, 60] == 3000.0
    assert token.tolist() == [30]


def test_all_logits_minus_infinity() -> None:
    case = Output.random(2, 16, 77, bias=True)
    assert case.bias is not None
    case.bias[:] = -torch.inf
    logits, token, numbers = case.launch_and_check()
    assert logits.isinf().all()
    assert token.tolist() == [0, 0]
    assert numbers.tolist() == [0, 0]


@pytest.mark.parametrize("vocabulary", [5, 64, 77])
def test_nan_logits_give_a_token_that_there_is(vocabulary: int) -> None:
    case = Output.random(2, 16, vocabulary, bias=False)
    case.hidden[0] = torch.nan
    case.norm.squares[0] = torch.nan
    logits, token, numbers = case.launch_and_check()
    assert logits[0].isnan().all()
    assert 0 <= int(token[0]) < vocabulary
    assert token[1] == logits[1].argmax()  # the other row is not touched
    assert numbers.tolist() == [0, 1]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hit", [slice(0, 1), slice(8, 16), slice(70, 77), slice(0, 76)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_row_with_a_logit_that_is_no_number(rows: int, hit: slice, value: float) -> None:
    """Whatever block of the vocabulary it is in, and of all rows."""
    case = Output.random(rows, 16, 77, bias=True)
    assert case.bias is not None
    case.bias[hit] = value
    logits, token, numbers = case.launch_and_check()
    assert (logits[:, hit].isnan() if value != value else logits[:, hit].isinf()).all()
    assert token.tolist() == logits.argmax(-1).tolist() == [hit.start] * rows
    assert numbers.tolist() == [0] * rows


def test_logits_that_are_ruled_out_are_no_error() -> None:
    case = Output.random(2, 16, 77, bias=True)
    assert case.bias is not None
    case.bias[3:] = -torch.inf
    logits, token, numbers = case.launch_and_check()
    assert token.tolist() == logits.argmax(-1).tolist()
    assert numbers.tolist() == [1, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.0], ids=str)
@pytest.mark.parametrize("at", [0, 511, 512, 1200])
def test_logits_of_another_product_are_checked_too(at: int, value: float) -> None:
    logits = torch.zeros(2, 1201)
    logits[1, at] = value
    best = Best.empty(2, 1201, logits.device, block=LOGITS_BLOCK)
    find_best(logits, best)
    token, read = torch.full((2,), -1), torch.full((2, 2), -1)
    pick(best, token, read)
    assert token.tolist() == logits.argmax(-1).tolist()
    assert read.tolist() == [[0, 1], [int(token[1]), int(value in (-torch.inf, 1.0))]]


@pytest.mark.parametrize("blocks", [1, 2, 37])
def test_pick_takes_the_best_block(blocks: int) -> None:
    logits = torch.randn(3, blocks)
    logits[1, blocks // 2 :] = 9.0  # ties: the first of them
    tokens = torch.arange(3 * blocks, dtype=torch.int32).view(3, blocks) * 8
    token = torch.full((3,), -1)
    read = torch.full((3, 2), -1)
    pick(Best(logits, tokens), token, read)
    assert token.tolist() == tokens.gather(1, logits.argmax(1, keepdim=True)).view(-1).tolist()
    assert read.tolist() == [[number, 1] for number in token.tolist()]
