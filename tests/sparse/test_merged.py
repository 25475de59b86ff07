"""Merged projections: one product for all parts, however a model runs, and right however parts are called."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, build_family
from torch import Tensor, nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparseLinear, Threshold, control_of, merged, sparsify_

THRESHOLD = 0.3
PRODUCTS = 4
"""In a block: q/k/v, o, gate/up and down."""


def _model(family: str = "qwen2") -> Any:
    """Its q, k and v have biases."""
    model = build_family(family)
    rules = {p.name: Threshold(THRESHOLD, 0.5) for p in find_projections(model)}
    sparsify_(model, SparsityPlan("by hand", 0.5, rules))
    return model


def _token() -> Tensor:
    return torch.randint(2, VOCABULARY, (1, 1), generator=torch.Generator().manual_seed(0))


def _alone(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x * (x.abs() > layer.threshold), layer.weight, layer.bias)  # type: ignore[operator, arg-type]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of each sparse product that is computed outside of compiled code."""
    seen: list[int] = []

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight.shape[0])
        return real(x, weight, *rest)

    real = merged.sparse_linear
    monkeypatch.setattr(merged, "sparse_linear", counted)
    return seen


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_table_is_multiplied_once(products: list[int], grad: type[AbstractContextManager[None]], rows: int) -> None:
    model = _model()
    with grad():
        model(_token().expand(rows, 1), use_cache=False)
    block = model.model.layers[0]
    parts = block.self_attn.q_proj.merged.parts, block.mlp.up_proj.merged.parts
    assert sorted(products) == sorted(2 * [sum(parts[0]), 64, sum(parts[1]), 64])
    assert parts[0] == tuple(getattr(block.self_attn, f"{name}_proj").out_features for name in "qkv")


@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "forward", "blocks"])
def test_a_table_is_multiplied_once_in_compiled_code(how: str) -> None:
    torch._dynamo.reset()
    model, token, graphs = _model(), _token(), []
    expected = model(token, use_cache=False).logits

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options: dict[str, Any] = {"fullgraph": True, "backend": backend}
    run = model
    if how == "model":
        run = torch.compile(model, **options)
    elif how == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        for block in model.model.layers:
            block.compile(**options)
    for _ in range(3):  # no pass may ask for another graph
        torch.testing.assert_close(run(token, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    blocks = len(model.model.layers)
    assert len(graphs) == (blocks if how == "blocks" else 1)
    calls = [node for graph in graphs for node in graph.graph.nodes if "sparse_linear" in str(node.target)]
    assert len(calls) == blocks * PRODUCTS
    assert control_of(model).context is None


class _Calls(nn.Module):
    """Calls layers in another order than attention does, inside a pass."""

    def __init__(self, attention: nn.Module, inputs: list[tuple[str, int]], states: list[Tensor]) -> None:
        super().__init__()
        self.attention, self.inputs, self.states = attention, inputs, states
        self.found: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        for name, index in self.inputs:
            layer, x = getattr(self.attention, f"{name}_proj"), self.states[index]
            if index == -1:
                x.mul_(2)
            self.found.append((layer(x), _alone(layer, x)))
        return hidden_states, None


@torch.no_grad()
@pytest.mark.parametrize(
    "inputs",
    [
        [("v", 0)],
        [("k", 0), ("q", 0)],
        [("q", 0), ("k", 1), ("v", 0), ("k", 0)],
        [("q", 0), ("q", 0), ("k", 0), ("v", 0)],
        [("q", 0), ("k", 0), ("v", 0), ("q", 0), ("k", 0), ("v", 0)],  # a block that is called twice
        [("q", -1), ("k", -1), ("v", -1)],  # changed in place between the parts
        [("q", -1), ("q", -1), ("k", -1), ("v", -1)],
    ],
)
def test_parts_in_any_order(inputs: list[tuple[str, int]]) -> None:
    model = _model()
    block = model.model.layers[0]
    states = [torch.randn(1, 1, 64) for _ in range(3)]
    calls = _Calls(block.self_attn, inputs, states)
    block.self_attn = calls
    model(_token(), use_cache=False)
    assert len(calls.found) == len(inputs)
    for got, expected in calls.found:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_block_shared_by_two_layers() -> None:
    """Two layers of one set of weights: the second call is of another hidden state."""
    model = _model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    dense = build_family("qwen2")
    dense.model.layers[1].mlp = dense.model.layers[0].mlp
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * (args[0].abs() > THRESHOLD),))
    token = _token()
    got, expected = model(token, use_cache=False).logits, dense(token, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_alone_does_not_compute_the_others(products: list[int]) -> None:
    layer = _model().model.layers[0].self_attn.v_proj
    assert isinstance(layer, SparseLinear)
    x = torch.randn(1, 1, 64)
    torch.testing.assert_close(layer(x), _alone(layer, x), rtol=1e-5, atol=1e-5)
    assert products == [layer.out_features]


@torch.no_grad()
def test_nothing_is_held_after_a_pass() -> None:
    model, held = _model(), []
    control = control_of(model)
    model.lm_head.register_forward_pre_hook(lambda module, args: held.append(dict(control.context.products)))
    model(_token(), use_cache=False)
    assert held == [{}]
