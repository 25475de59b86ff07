"""Routers and products of chosen experts on a real GPU: against float64, in order, the same bits on every run."""

from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, build_model
from experts_cases import ExpertsCase, random_experts, random_router
from kernel_cases import LIMITS, PDL, relative_error
from tiny_configs import ALL_MIXTURES
from torch import Tensor
from torch.nn.functional import softmax

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.models.architectures import find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import control_of, sparsify_
from teal_kernels.experts import fitting_experts
from teal_kernels.operands import Scratch
from teal_kernels.triton_gemv import TileConfig

# Hidden size, experts, chosen ones, neurons.
MODELS = {
    "qwen3-30b-a3b": (2048, 128, 8, 768),
    "mixtral-8x7b": (4096, 8, 2, 14336),
    "qwen1.5-moe": (2048, 60, 4, 1408),
    "gpt-oss-20b": (2880, 32, 4, 2880),
    "no multiple of anything": (1234, 7, 3, 517),
}
CONFIGS = (TileConfig(128, 2, 6, 256, 1), TileConfig(64, 4, 6, 128, 2))


def _case(name: str, epilogue: str, tokens: int, sparsity: float, **options: object) -> ExpertsCase:
    hidden, experts, chosen, neurons = MODELS[name]
    inputs, outputs = (neurons, hidden) if epilogue == "residual" else (hidden, neurons)
    return random_experts(
        epilogue,
        tokens,
        experts=experts,
        chosen=chosen,
        inputs=inputs,
        outputs=outputs,
        sparsity=sparsity,
        device="cuda",
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("epilogue", ["gated", "residual"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_products_against_float64(name: str, tokens: int, epilogue: str, sparsity: float) -> None:
    case = _case(name, epilogue, tokens, sparsity, dtype=torch.bfloat16)
    for config in CONFIGS:
        fitted = fitting_experts(replace(config, dense=not sparsity), case.x.shape[1], case.parts)
        counts = torch.zeros(3, dtype=torch.int64, device="cuda")
        y, squares = case.launch(fitted, counts=counts, pdl=PDL)
        assert relative_error(y, case.expected()) < LIMITS[torch.bfloat16]
        if epilogue == "residual":
            torch.testing.assert_close(squares.sum(1), y.float().square().sum(1), rtol=1e-4, atol=1e-4)
        assert int(counts[0]) == (case.kept if sparsity else 0)


@pytest.mark.parametrize("packed", [None, (8, 1 << 20, False), (4, 64, True)], ids=["bf16", "int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("epilogue", ["paired", "residual"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_biases_and_pairs_against_float64(
    tokens: int, epilogue: str, sparsity: float, packed: tuple[int, int, bool] | None
) -> None:
    """gpt-oss's, in blocks that one program ends and that several do."""
    packed = packed and (packed[0], min(packed[1], 2880), packed[2])
    options = {"dtype": torch.bfloat16, "packed": packed, "bias": True}
    for name in ("gpt-oss-20b",) if packed else ("gpt-oss-20b", "no multiple of anything"):
        case = _case(name, epilogue, tokens, sparsity, **options)
        for config in (CONFIGS[0], replace(CONFIGS[1], block_out=64), replace(CONFIGS[0], block_out=256, warps=2)):
            fitted = fitting_experts(replace(config, dense=not sparsity), case.x.shape[1], case.parts)
            y = case.launch(fitted, pdl=PDL)[0]
            assert relative_error(y, case.expected()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("packed", [(8, 1 << 20, False), (4, 128, True)], ids=["int8", "int4"])
@pytest.mark.parametrize("epilogue", ["gated", "residual"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_codes_against_float64(name: str, epilogue: str, packed: tuple[int, int, bool], sparsity: float) -> None:
    hidden, _, _, neurons = MODELS[name]
    inputs = neurons if epilogue == "residual" else hidden
    packed = (packed[0], min(packed[1], inputs), packed[2])
    case = _case(name, epilogue, 1, sparsity, dtype=torch.bfloat16, packed=packed)
    config = fitting_experts(replace(CONFIGS[0], block_in=4, dense=not sparsity), inputs, case.parts)
    assert relative_error(case.launch(config, pdl=PDL)[0], case.expected()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("epilogue", ["gated", "residual"])
def test_the_same_bits_on_100_runs(epilogue: str) -> None:
    case = _case("qwen3-30b-a3b", epilogue, 1, 0.5, dtype=torch.bfloat16)
    scratch = Scratch(case.x.device)
    first = case.launch(CONFIGS[0], scratch, pdl=PDL)[0]
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(case.launch(CONFIGS[0], scratch, pdl=PDL)[0], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 8, 2), (8, 128, 8), (1, 60, 4), (2, 256, 8), (1, 512, 10)]
)
def test_routers(tokens: int, experts: int, chosen: int, dtype: torch.dtype) -> None:
    case = random_router(tokens, experts, chosen, inputs=2048, dtype=dtype, device="cuda", aside=experts == 60)
    scratch = Scratch(case.x.device)
    first: Tensor | None = None
    for _ in range(100):
        ids, weights, _ = case.launch(scratch, pdl=PDL)
        # By the logits that the kernel has: of two that round apart another order may be right.
        picked = case.logits.gather(1, ids.long())
        rest = case.logits.scatter(1, ids.long(), float("-inf")).amax(1)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert bool((picked.amin(1) >= rest - tolerance).all())
        assert all(len(set(row)) == chosen for row in ids.tolist())
        expected = softmax(case.logits, dim=1).gather(1, ids.long())
        torch.testing.assert_close(weights, expected, rtol=1e-3 if dtype == torch.float32 else 0.05, atol=1e-4)
        assert first is None or torch.equal(ids, first)
        first = ids


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, None) for family in ALL_MIXTURES),
        *(("mixtral", "int8"), ("qwen2_moe", "int4:32"), ("gpt_oss", "int8"), ("gpt_oss", "int4:32")),
    ],
)
def test_text_is_that_of_transformers_forward(family: str, scheme: str | None) -> None:
    """Kernels and graphs beside the general path with the reference backend, on the same GPU."""
    model = build_model(family).requires_grad_(False).cuda()
    unstack_experts_(model)
    packs = {} if scheme is None else quantise_(model, Scheme.parse(scheme))
    rules = {projection.name: Threshold(0.3, 0.5) for projection in find_projections(model)}
    control = sparsify_(model, SparsityPlan("uniform", 0.5, rules))
    pack_(model, packs)
    prompt = torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0)).cuda()
    texts, realised = [], []
    for path, backend in (("general", "reference"), ("fused", "triton")):
        control_of(model).backend = backend
        with control.counting() as counter:
            engine = Engine(model, path=path)
            assert engine.path.name == path
            texts.append(list(engine.generate(prompt, max_new_tokens=8, sampling=SamplingConfig())))
            realised.append(counter.model_wide())
    assert texts[1] == texts[0]
    assert realised[1] == pytest.approx(realised[0], abs=0.02)
