"""Products on a GPU, as far as they can be tested without one."""

import pytest
import torch
from conftest import build_model

from teal_cli.bench import products
from teal_cli.bench.products import ProductShape
from teal_cli.bench.timing import Spread
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense
from teal_cli.models.architectures import find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.sparse import sparsify_
from teal_cli.steps.bench import site_products


def test_the_fastest_reading_of_a_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    microseconds = iter([20.0, 10.0, 40.0])

    def timed(_launch: object, _launches: int) -> Spread:
        fastest = next(microseconds)
        return Spread.of([fastest, 2 * fastest, 3 * fastest])

    monkeypatch.setattr(products, "_READ_ELEMENTS", 250_000)  # a million bytes
    monkeypatch.setattr(products, "_fastest_readings", {})
    monkeypatch.setattr(products, "graph_microseconds", timed)
    assert [products.reading_gb_s(torch.device("cpu")) for _ in range(3)] == pytest.approx([50.0, 100.0, 100.0])


def test_the_products_of_experts_are_one_long_product() -> None:
    """Of two chosen ones: outputs of gate and up side by side, inputs of down one behind the other."""
    model = build_model("mixtral")
    unstack_experts_(model)
    sparsify_(model, SparsityPlan("uniform", 0.0, {p.name: Dense() for p in find_projections(model)}))
    assert site_products(model)[1:] == [
        ProductShape(64, (64,), "residual"),
        ProductShape(64, (200, 200), "gated"),
        ProductShape(200, (64,), "residual"),
    ]
