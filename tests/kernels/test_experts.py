"""Routers and products of chosen experts against their definitions in float64, in Triton's interpreter."""

import pytest
import torch
from experts_cases import ExpertsCase, random_experts, random_router
from kernel_cases import LIMITS, relative_error
from torch.nn.functional import softmax

from teal_kernels.experts import Chosen, fitting_experts, no_ids, table_of
from teal_kernels.launching import device_facts
from teal_kernels.operands import Scratch
from teal_kernels.plan_gemv import ProductShape, plan_product
from teal_kernels.triton_gemv import TileConfig, gemv
from teal_kernels.triton_router import route

CONFIGS = {
    "one chunk": TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=64, warps=1),
    "two chunks": TileConfig(block_out=16, block_in=4, unroll=2, inputs_per_chunk=32, warps=1),
}
DEVICE = torch.device("cpu")
EPILOGUES = ("plain", "gated", "residual")


def _check(case: ExpertsCase, config: TileConfig) -> None:
    y, squares = case.launch(config)
    assert relative_error(y, case.expected()) < LIMITS[case.x.dtype]
    if case.epilogue == "residual":
        torch.testing.assert_close(squares.sum(1), y.float().square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["listed", "dense"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("tokens", "config"), [(1, "one chunk"), (1, "two chunks"), (3, "two chunks")])
def test_products_against_float64(tokens: int, epilogue: str, dense: bool, config: str) -> None:
    case = random_experts(epilogue, tokens, sparsity=0.0 if dense else 0.5)
    _check(case, TileConfig(**{**vars(CONFIGS[config]), "dense": dense}))


@pytest.mark.parametrize("epilogue", ["paired", "gated", "residual"])
@pytest.mark.parametrize(("tokens", "config"), [(1, "one chunk"), (2, "two chunks")])
def test_biases_of_experts(tokens: int, epilogue: str, config: str) -> None:
    """gpt-oss's: gate and up alternate, and what an expert adds has its bias, weighted."""
    _check(random_experts(epilogue, tokens, bias=True), CONFIGS[config])


def test_one_expert_with_biases_and_one_chunk() -> None:
    """Nothing meets in memory."""
    _check(random_experts("residual", 2, experts=2, chosen=1, inputs=8, bias=True), CONFIGS["one chunk"])


@pytest.mark.parametrize("packed", [(8, 44, False), (4, 32, True)], ids=str)
@pytest.mark.parametrize("epilogue", ["paired", "residual"])
def test_biases_of_quantised_experts(epilogue: str, packed: tuple[int, int, bool]) -> None:
    case = random_experts(epilogue, 2, outputs=28, packed=packed, bias=True)
    _check(case, TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=32, warps=1))
    assert case.parts == ((56,) if epilogue == "paired" else (28,))


def test_what_a_paired_product_needs() -> None:
    case = random_experts("paired", 1)
    arguments = table_of(case.stack), case.parts, case.thresholds, case.before, CONFIGS["one chunk"], Scratch(DEVICE)
    with pytest.raises(ValueError, match="clamped_swiglu needs a curve"):
        gemv(case.x, *arguments, epilogue="paired", activation="clamped_swiglu", experts=case.chosen)
    with pytest.raises(ValueError, match="one of experts"):
        gemv(case.x, *arguments, epilogue="paired")
    with pytest.raises(ValueError, match="one even part"):
        plan_product(ProductShape(1, 44, (21,), 4, 32, 44, 21, "paired"), CONFIGS["one chunk"], device_facts(DEVICE))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_tokens_have_thresholds_of_their_own(epilogue: str) -> None:
    case = random_experts(epilogue, 3)
    case.thresholds = torch.tensor([[0.2], [1.0], [2.5]]) * case.thresholds
    _check(case, CONFIGS["two chunks"])


@pytest.mark.parametrize("packed", [(8, 44, False), (4, 16, True), (4, 32, False)], ids=str)
@pytest.mark.parametrize("epilogue", ["gated", "residual"])
@pytest.mark.parametrize("dense", [False, True], ids=["listed", "dense"])
def test_quantised_experts(epilogue: str, packed: tuple[int, int, bool], dense: bool) -> None:
    case = random_experts(epilogue, 2, outputs=24, packed=packed, sparsity=0.0 if dense else 0.5)
    config = TileConfig(block_out=16, block_in=4, unroll=2, inputs_per_chunk=32, warps=1, dense=dense)
    _check(case, config)


def test_blocks_that_no_expert_is_a_multiple_of_and_one_that_all_are() -> None:
    _check(random_experts("gated", 1, outputs=32), CONFIGS["two chunks"])
    _check(random_experts("residual", 2, inputs=64, outputs=32), CONFIGS["two chunks"])


def test_one_expert_of_one() -> None:
    _check(random_experts("residual", 2, experts=1, chosen=1, inputs=8), CONFIGS["one chunk"])


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_counts_and_the_same_bits_on_every_run(epilogue: str) -> None:
    case = random_experts(epilogue, 2)
    scratch, counts = Scratch(case.x.device), torch.zeros(3, dtype=torch.int64)
    first = case.launch(CONFIGS["two chunks"], scratch, counts)
    again = case.launch(CONFIGS["two chunks"], scratch, counts)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert counts.tolist() == [2 * case.kept] * len(case.parts) + [0] * (3 - len(case.parts))


def test_experts_that_were_not_chosen_are_not_read() -> None:
    for epilogue in ("gated", "residual"):
        case = random_experts(epilogue, 1)
        expected = case.launch(CONFIGS["two chunks"])[0]
        assert isinstance(case.stack, torch.Tensor)
        others = [n for n in range(5) if n not in case.chosen.ids[0].tolist()]
        case.stack[others] = torch.nan
        assert torch.equal(case.launch(CONFIGS["two chunks"])[0], expected)


def test_inputs_that_are_dropped_are_not_read() -> None:
    case = random_experts("gated", 1)
    expected = case.launch(CONFIGS["two chunks"])[0]
    assert isinstance(case.stack, torch.Tensor)
    case.stack[:, case.seen[0].abs() <= case.thresholds[0]] = torch.nan
    assert torch.equal(case.launch(CONFIGS["two chunks"])[0], expected)


def test_sizes_that_do_not_fit_are_refused() -> None:
    case = random_experts("residual", 2)
    assert isinstance(case.stack, torch.Tensor)
    ids, weights = no_ids(9, 3, case.x.device)
    for x, y, chosen in (
        (case.x[:3], case.before, case.chosen),
        (case.x, case.before[:1], case.chosen),
        (case.x.new_zeros(27, 44), case.x.new_zeros(9, 21), Chosen(ids, weights, 1)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            gemv(
                x,
                table_of(case.stack),
                case.parts,
                case.thresholds,
                y,
                CONFIGS["one chunk"],
                Scratch(x.device),
                epilogue="residual",
                squares=x.new_zeros(2, 4),
                experts=chosen,
            )


@pytest.mark.parametrize(
    ("inputs", "parts", "chunk", "block"),
    [
        (768, (2048,), 256, 128),
        (768, (2048,), 512, 128),
        (2048, (768, 768), 256, 512),
        (1408, (2048,), 256, 128),
        (48, (40,), 64, 64),
        (14336, (4096,), 1024, 128),
    ],
)
def test_chunks_of_an_expert_are_alike(inputs: int, parts: tuple[int, ...], chunk: int, block: int) -> None:
    config = fitting_experts(TileConfig(block, 2, 8, chunk, 1), inputs, parts)
    chunks = -(-inputs // config.inputs_per_chunk)
    assert chunks == -(-inputs // chunk)
    assert config.inputs_per_chunk <= chunk
    assert chunks * config.inputs_per_chunk - inputs < 32 * chunks
    assert config.block_out * config.block_in == 2 * block
    assert parts[0] % config.block_out == 0 or config.block_out == block


def _order(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """The highest first, the lower id among equals."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :chosen].int()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 8, 2), (3, 5, 3), (1, 128, 8), (2, 1, 1), (1, 160, 6)])
def test_softmax_router(tokens: int, experts: int, chosen: int, normalised: bool) -> None:
    case = random_router(tokens, experts, chosen, normalised=normalised, bias=experts == 5)
    ids, weights, _ = case.launch()
    scores = softmax(case.logits, dim=1)
    assert torch.equal(ids, _order(case.logits, chosen))
    expected = scores.gather(1, ids.long())
    if normalised:
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_without_a_norm_and_with_a_gate_aside() -> None:
    case = random_router(2, 6, 2, norm=False, aside=True)
    scratch = Scratch(case.x.device)
    ids, weights, share = case.launch(scratch)
    assert torch.equal(ids, _order(case.logits, 2))
    torch.testing.assert_close(weights, softmax(case.logits, dim=1).gather(1, ids.long()), rtol=1e-5, atol=1e-6)
    assert share is not None
    torch.testing.assert_close(share, torch.sigmoid(case.x @ case.router.weight[-1]), rtol=1e-5, atol=1e-6)
    assert torch.equal(case.launch(scratch)[1], weights)


@pytest.mark.parametrize("experts", [7, 130])
def test_among_equals_the_lower_id_comes_first(experts: int) -> None:
    case = random_router(1, experts, 4, norm=False)
    case.router.weight[:] = 0.0
    case.router.weight[[2, 5]] = case.x[0] / 100
    ids, weights, _ = case.launch()
    assert ids.tolist() == [[2, 5, 0, 1]]
    assert weights[0, 0] == weights[0, 1] > weights[0, 2] == weights[0, 3]


@pytest.mark.parametrize("experts", [6, 130])
def test_logits_that_are_no_numbers_still_give_experts_that_there_are(experts: int) -> None:
    case = random_router(1, experts, 3, norm=False)
    case.router.weight[[1, 4]] = torch.nan
    ids = case.launch()[0]
    assert ids[0, :2].tolist() == [1, 4]
    assert len(set(ids[0].tolist())) == 3


@pytest.mark.parametrize("tokens", [1, 3])
def test_sparsemixer_as_phimoe_has_it(tokens: int) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    for seed in range(4):
        case = random_router(tokens, 16, 2, scores="sparsemixer", jitter=0.2, seed=seed)
        ids, weights, _ = case.launch()
        expected, expected_ids = sparsemixer(case.logits, jitter_eps=0.2, training=False)
        assert torch.equal(ids.long(), expected_ids)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_routers_that_cannot_be_launched() -> None:
    case = random_router(1, 4, 2)
    scratch = Scratch(case.x.device)
    ids, weights = no_ids(1, 5, case.x.device)
    with pytest.raises(ValueError, match="cannot choose 5 of 4"):
        route(case.x, case.router, Chosen(ids, weights, 1), scratch)
    ids, weights = no_ids(2, 2, case.x.device)
    with pytest.raises(ValueError, match="does not fit"):
        route(case.x, case.router, Chosen(ids, weights, 1), scratch)
    ids, weights = no_ids(1, 2, case.x.device)
    with pytest.raises(ValueError, match="gate aside"):
        route(case.x, case.router, Chosen(ids, weights, 1), scratch, aside_share=torch.zeros(1))
