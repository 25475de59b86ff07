"""First-order costs of thresholds: against their definition, and against autograd through the whole model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, build_model

from teal_cli.calibration import histogram, sensitivity
from teal_cli.models.architectures import find_projections

SINKS = 4


def _blocks(count: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def _edge(index: int) -> float:
    """The largest |x| in the bins up to one."""
    return histogram.upper_edge(sensitivity.edges()[index])


def test_squared_changes_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(7, 40, generator=generator) for _ in range(2))
    x[0, :5] = 0.0
    found = sensitivity.squared_changes(x, gradient)
    assert found.shape == (sensitivity.BINS,)
    for index in (1, 280, 300, 320, 330, sensitivity.BINS - 2):
        dropped = x.abs() <= _edge(index)
        expected = (x * gradient * dropped).double().sum(1).square().sum()
        assert float(found[index]) == pytest.approx(float(expected), rel=1e-4, abs=1e-12)
    assert float(found[-1]) == pytest.approx(float((x * gradient).double().sum(1).square().sum()), rel=1e-4)


def test_edges_are_those_of_the_histogram() -> None:
    values = torch.tensor([2.0**-50, 2.0**-40, 0.37, 1.0, 1.09, 3.0, 2.0**23.9, torch.inf])
    bins = sensitivity._bin_of(values[None])[0].tolist()
    for value, index in zip(values[:-1].tolist(), bins, strict=False):
        assert value <= _edge(index)
        assert index == 0 or value > _edge(index - 1)
    assert bins[-1] == sensitivity.BINS - 1


def test_against_autograd_through_the_whole_model(family: str) -> None:
    """A factor of 1 on what would be dropped at each token: its derivative is the first-order change."""
    model = build_model(family)
    projections, ids = find_projections(model, output_layer=True), _blocks()
    found = sensitivity.measure(model, projections, ids.split(1), sink_tokens=SINKS)
    assert set(found) == {projection.name for projection in projections}
    for index in (300, 318, sensitivity.BINS - 1):
        limit = torch.inf if index == sensitivity.BINS - 1 else _edge(index)
        factors: dict[str, torch.Tensor] = {}

        def scaled(name: str, limit: float = limit, factors: dict[str, torch.Tensor] = factors):
            def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                (x,) = args
                factors[name] = torch.ones(*x.shape[:2], 1, requires_grad=True)
                return (torch.where(x.abs() <= limit, x * factors[name], x),)

            return hook

        handles = [model.get_submodule(p.name).register_forward_pre_hook(scaled(p.name)) for p in projections]
        logits = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        changes = torch.autograd.grad(loss, list(factors.values()))
        for name, change in zip(factors, changes, strict=True):
            expected = float(change[:, SINKS:].double().square().sum())
            assert float(found[name][index]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_texts_add_up_and_nothing_stays_behind() -> None:
    model = build_model("llama").to(torch.bfloat16)
    projections, ids = find_projections(model), _blocks(4)
    trained = [parameter.requires_grad for parameter in model.parameters()]

    def measured(part: torch.Tensor) -> dict[str, torch.Tensor]:
        return sensitivity.measure(model, projections, part.split(1), sink_tokens=SINKS)

    whole, first, second = measured(ids), measured(ids[:1]), measured(ids[1:])
    for name, squares in whole.items():
        torch.testing.assert_close(squares, first[name] + second[name], rtol=1e-12, atol=0.0)
        assert float(squares.max()) > 0.0
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
