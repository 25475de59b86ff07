"""Products on a GPU, as far as they can be tested without one."""

import pytest
import torch

from teal_cli.bench import products
from teal_cli.bench.timing import Spread


def test_the_fastest_reading_of_a_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    microseconds = iter([20.0, 10.0, 40.0])

    def timed(_launch: object, _launches: int) -> Spread:
        fastest = next(microseconds)
        return Spread.of([fastest, 2 * fastest, 3 * fastest])

    monkeypatch.setattr(products, "_READ_ELEMENTS", 250_000)  # a million bytes
    monkeypatch.setattr(products, "_fastest_readings", {})
    monkeypatch.setattr(products, "graph_microseconds", timed)
    assert [products.reading_gb_s(torch.device("cpu")) for _ in range(3)] == pytest.approx([50.0, 100.0, 100.0])
