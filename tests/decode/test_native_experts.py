"""Mixtures of experts on the native path, against transformers' forward in float64 with dropped inputs."""

import ctypes
from dataclasses import replace

import pytest
import torch
from conftest import build_model
from covering import covering
from fused_pair import error_of, random_tokens
from native_models import (
    ALL_MIXTURES,
    LIMIT,
    LIMIT_OF_4_BITS,
    NO_LIBRARY,
    check_decided_steps,
    sparse,
    tiny,
    use_threads,
)

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.native import NativePath
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import Scheme
from teal_cli.sparse.experts import SparseExperts
from teal_kernels.native.experts import product_of_experts, route_of, weight_of_experts
from teal_kernels.native.library import Session, shared_pool
from teal_kernels.native.structures import Epilogue, Scores, norm_of, product_of, program_of, rows_of, weight_of
from teal_kernels.packing import Packed, dequantised

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[20], [3, 20], [3, 20, 11], [5, 1, 9, 20], [1, 6, 3, 4, 5], [7] * 9]


@torch.no_grad()
@covering(2, family=ALL_MIXTURES, plan=["alike", "apart", "output"], dtype=DTYPES, lengths=LENGTHS, threads=[1, 2, 3])
def test_steps(
    family: str, plan: str, dtype: torch.dtype, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, threads)
    check_decided_steps(sparse(tiny(family).to(dtype), plan), lengths)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_MIXTURES)
@pytest.mark.parametrize(
    ("scheme", "lengths", "plan"),
    [("int8", [20], "apart"), ("int4:32", [20, 9, 4], "alike"), ("int4:64", [7], "alike")],
)
def test_steps_of_quantised_weights(
    family: str, scheme: str, lengths: list[int], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, 2)
    check_decided_steps(sparse(tiny(family), plan, scheme), lengths)


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_the_engine_takes_it(family: str) -> None:
    engine = Engine(sparse(tiny(family)))
    assert (engine.path.name, engine.general_because) == ("native", None)


def test_experts_of_another_form_are_refused() -> None:
    """Those of a model that nobody unstacked, as transformers has them."""
    assert NativePath.unsupported(build_model("mixtral"), None) == "experts of another form, or not unstacked"


def test_configurations_that_are_not_computed() -> None:
    assert NativePath.unsupported(tiny("olmoe", clip_qkv=4.0), None) == "clip_qkv 4.0"
    model = tiny("mixtral", intermediate_size=101)
    assert NativePath.unsupported(model, None) == "an odd number of neurons in experts_input"


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[9], [4, 9, 9, 2, 7, 1, 3, 5]], ids=str)
def test_as_many_bits_whatever_the_threads(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of threads gives the same bits, and another number the same choice of experts."""
    model, logits = sparse(tiny("qwen2_moe")), []
    for threads in (3, 3, 1):
        use_threads(monkeypatch, threads)
        engine = Engine(model, path="native")
        cache = engine.new_cache(12)
        engine.prefill(random_tokens(len(lengths), max(lengths)), cache, torch.tensor(lengths))
        logits.append(engine.step(random_tokens(len(lengths), 1, seed=1), cache).clone())
    assert torch.equal(logits[0], logits[1])
    assert error_of(logits[2], logits[0].double()) < LIMIT[torch.float32]


@torch.no_grad()
def test_weights_of_experts_are_held_once() -> None:
    model = sparse(tiny("mixtral"))
    engine = Engine(model, path="native")
    cache = engine.new_cache(4)
    engine.prefill(random_tokens(1, 2), cache)
    engine.step(random_tokens(1, 1, seed=1), cache)
    for layer in model.modules():
        if isinstance(layer, SparseExperts):
            assert layer.weight.transpose(1, 2).is_contiguous()
            bytes_ = layer.weight.untyped_storage().nbytes()
            assert bytes_ == layer.weight.numel() * 4


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4:32", "int4:64"])
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_of_experts(scheme: str, rows: int) -> None:
    """As the weights that they stand for, where the last group of an expert is a smaller one too."""
    experts, hidden, neurons, embedding = 5, 64, 48, torch.randn(9, 64)
    tables = [torch.randn(experts, 2 * neurons, hidden) / 8, torch.randn(experts, hidden, neurons) / 7]
    packs = [[quantise(weight, Scheme.parse(scheme)) for weight in table] for table in tables]
    route = route_of(rows_of(torch.randn(experts, hidden)), 2, scores=Scores.SOFTMAX)
    norm, results = norm_of(torch.ones(hidden), 1e-6), []
    for codes in (True, False):
        weights = [_stacked(pack) if codes else _dense(pack) for pack in packs]
        steps = [norm, route]
        for weight, epilogue in zip(weights, (Epilogue.GATED, Epilogue.RESIDUAL), strict=True):
            steps.append(product_of_experts(weight_of_experts(weight, threshold=0.05), experts, epilogue))
        output = product_of([weight_of(embedding)], Epilogue.PLAIN)
        session = Session(program_of(steps, embedding=weight_of(embedding), output=output), shared_pool(2), rows)
        logits, best = torch.empty(rows, 9), torch.empty(rows, dtype=torch.int64)
        session.step(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), logits, best)
        results.append(logits)
    for got, expected in zip(*results, strict=True):
        # Inputs of one row's 4-bit codes are rounded to 16 bits.
        assert error_of(got, expected.double()) < (LIMIT_OF_4_BITS if "int4" in scheme else 2e-6)


def _stacked(packs: list[Packed]) -> Packed:
    words, scales = (torch.stack([getattr(pack, name) for pack in packs]) for name in ("words", "scales"))
    zeros = None if packs[0].zeros is None else torch.stack([pack.zeros for pack in packs if pack.zeros is not None])
    return replace(packs[0], words=words, scales=scales, zeros=zeros)


def _dense(packs: list[Packed]) -> torch.Tensor:
    return torch.stack([dequantised(pack, torch.float32) for pack in packs]).transpose(1, 2)


@pytest.mark.parametrize("change", ["route", "experts", "top_k", "scale", "order"])
def test_programs_that_the_library_refuses(change: str) -> None:
    hidden, neurons, experts = 16, 8, 4
    up = torch.randn(experts, hidden, 2 * neurons).transpose(1, 2)
    down = torch.randn(experts, neurons, hidden).transpose(1, 2)
    route = route_of(rows_of(torch.randn(experts, hidden)), 5 if change == "top_k" else 2, scores=Scores.SOFTMAX)
    gated = product_of_experts(weight_of_experts(up), 3 if change == "experts" else experts, Epilogue.GATED)
    residual = product_of_experts(weight_of_experts(down), experts, Epilogue.RESIDUAL)
    if change == "scale":
        scale = rows_of(torch.randn(2, hidden))
        residual.scaled_by = ctypes.addressof(scale)
    norm = norm_of(torch.ones(hidden), 1e-6)
    steps = {"route": [norm, gated, residual], "order": [norm, route, residual, gated]}
    table_ = torch.randn(7, hidden)
    program = program_of(
        steps.get(change, [norm, route, gated, residual]),
        embedding=weight_of(table_),
        output=product_of([weight_of(table_)], Epilogue.PLAIN),
    )
    reasons = {"scale": "a scale", "top_k": "a number of experts", "order": "does not fit what stands before it"}
    with pytest.raises(ValueError, match=reasons.get(change, "experts")):
        Session(program, shared_pool(1), 1)
