"""Products of 16-bit numbers in float32, as on a processor without instructions for them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from torch import Tensor, nn

from teal_cli.models import wide_products
from teal_cli.models.wide_products import InFloat32, is_slow, widen_products_

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """This processor has no instructions; the shapes of weights that are multiplied in float32."""
    seen: list[tuple[int, ...]] = []
    product = wide_products._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(wide_products, "is_slow", lambda dtype: dtype in NARROW)
    monkeypatch.setattr(wide_products, "_product", counted)
    monkeypatch.setattr(wide_products, "_PIECE", 1000)  # so that tiny weights have several pieces
    return seen


def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.detach()
    return logits


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_rounded_and_no_more(family: str, dtype: torch.dtype, slow: list[tuple[int, ...]]) -> None:
    ids = torch.arange(24).view(2, 12)
    model = build_model(family).to(dtype)
    exact = logits_of(build_model(family).to(dtype).float(), ids)  # of the same weights
    plain = logits_of(model, ids)
    assert not slow
    widen_products_(model)
    found = logits_of(model, ids)
    assert slow
    assert found.dtype == dtype
    error, before = (found - exact).norm() / exact.norm(), (plain - exact).norm() / exact.norm()
    assert error < max(1.5 * before, 1e-3)


def test_blocks_that_are_called_alone_multiply_so_too(slow: list[tuple[int, ...]]) -> None:
    model = build_model("llama").bfloat16()
    widen_products_(model)
    block = model.model.layers[0]
    states = torch.ones(1, 4, model.config.hidden_size, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb(states, torch.arange(4)[None])
    block(states, position_embeddings=rotary)
    assert len(slow) == 7


def test_gradients_are_those_of_float32(slow: list[tuple[int, ...]]) -> None:
    shapes = {"x": (2, 5, 48), "weight": (70, 48), "bias": (70,)}
    values = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    narrow = {name: value.clone().requires_grad_() for name, value in values.items()}
    wide = {name: value.float().requires_grad_() for name, value in values.items()}
    with InFloat32():
        product = F.linear(narrow["x"], narrow["weight"], narrow["bias"])
        (product * product).float().sum().backward()
    expected = F.linear(wide["x"], wide["weight"], wide["bias"])
    (expected * expected).sum().backward()
    assert (70, 48) in slow
    for name in shapes:
        found, right = narrow[name].grad, wide[name].grad
        assert found is not None
        assert right is not None
        assert found.dtype == torch.bfloat16
        assert (found - right).norm() / right.norm() < 2e-2, name


def test_experts_that_no_row_chose_are_not_read(slow: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(5, 16).bfloat16(), torch.randn(4, 16, 24).bfloat16()
    ends = torch.tensor([2, 2, 5, 5], dtype=torch.int32)
    with InFloat32():
        found = F.grouped_mm(x, weight, offs=ends)
    right = torch.cat([x[:2].float() @ weight[0].float(), x[2:].float() @ weight[2].float()])
    assert slow == [(24, 16)] * 2
    assert torch.equal(found, right.bfloat16())


def test_products_that_are_called_otherwise_are_torch_s(slow: list[tuple[int, ...]]) -> None:
    x, weight, out = torch.ones(2, 8).bfloat16(), torch.ones(8, 8).bfloat16(), torch.zeros(2, 8).bfloat16()
    with InFloat32():
        named = F.linear(input=x, weight=weight)
        torch.mm(x, weight, out=out)
    assert not slow
    assert torch.equal(named, torch.full((2, 8), 8.0).bfloat16())
    assert torch.equal(out, named)


def test_a_forward_that_fails_leaves_nothing_behind(slow: list[tuple[int, ...]]) -> None:
    model = build_model("llama").bfloat16()
    widen_products_(model)

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("a hook of somebody")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="of somebody"):
        logits_of(model, torch.arange(6)[None])
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    seen = len(slow)
    logits_of(model, torch.arange(6)[None])
    assert len(slow) > seen
    assert not torch.overrides._get_current_function_mode_stack()


def test_compiled_code_is_left_alone(slow: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").bfloat16()
    widen_products_(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    logits_of(model, torch.arange(6)[None])
    assert not slow


def test_float32_is_left_alone(slow: list[tuple[int, ...]]) -> None:
    model = build_model("llama")
    widen_products_(model)
    assert not model._forward_hooks
    assert not is_slow(torch.float32)


def test_loaded_models_are_widened(slow: list[tuple[int, ...]], tmp_path: Any) -> None:
    from teal_cli.model_loading import load_model

    build_model("llama").save_pretrained(tmp_path)
    logits_of(load_model(tmp_path, device="cpu", dtype="bfloat16"), torch.arange(6)[None])
    assert slow


def test_speed_is_measured_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait for one another on a busy machine take longer than the loops that are looked for."""
    threads = torch.get_num_threads()
    seen: list[int] = []

    def seconds(dtype: torch.dtype) -> float:
        seen.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(wide_products, "_seconds", seconds)
    torch.set_num_threads(2)
    try:
        assert not is_slow.__wrapped__(torch.bfloat16)
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
