"""Signed counts in coarse bins become counts of |x| in ours: nothing lost but what a bin hides."""

import pytest
import torch

from teal_cli.calibration import histogram
from teal_cli.importing.rebin import SignedHistogram


def _signed(x: torch.Tensor, bins: int = 2000) -> SignedHistogram:
    """As a user of wide outlier bins counts: 1 % of the values in each, the rest in bins of one width."""
    values = x.double().sort().values
    tail = len(values) // 100
    inner = torch.linspace(float(values[tail]), float(values[-tail]), bins - 1, dtype=torch.float64)
    edges = torch.cat([values[:1], inner, values[-1:]])
    counts = torch.histogram(values, edges).hist
    return SignedHistogram.from_centers(((edges[:-1] + edges[1:]) / 2).float(), counts.float())


@pytest.mark.parametrize("shape", ["symmetric", "skewed"])
def test_thresholds_are_quantiles_of_magnitudes(shape: str) -> None:
    """A skewed site is where half of the values above a signed quantile are not half of the magnitudes."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    if shape == "skewed":
        x = torch.where(x > 0, x * 3.0, x * 0.2) + 0.1
    signed = _signed(x)
    counts = signed.of_magnitudes()
    width = float(signed.edges[2] - signed.edges[1])
    for sparsity in (0.1, 0.25, 0.5, 0.65, 0.9):
        exact = float(x.abs().double().quantile(sparsity))
        found = histogram.threshold_for(counts, sparsity)
        # A bin of theirs, and one of ours, which is 1/256 wide.
        assert found == pytest.approx(exact, abs=width + exact / 256)


def test_every_value_is_counted_once() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * 7
    counts = _signed(x, 100).of_magnitudes()
    assert int(counts.sum()) == 50_000
    assert int(counts.min()) == 0
    # The greatest magnitude is an edge of theirs: no value of ours lies above the bin that holds it.
    top = int(histogram.bin_of(x.abs().max()))
    assert int(counts[top + 2 :].sum()) == 0


def test_padding_shows() -> None:
    x = torch.cat([torch.randn(75_000, generator=torch.Generator().manual_seed(2)), torch.full((25_000,), 1e-4)])
    share, middle = _signed(x).fullest()
    assert share == pytest.approx(0.25, abs=0.01)
    assert abs(middle) < 0.01


@pytest.mark.parametrize(
    ("centers", "counts", "message"),
    [
        ([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1], "centres of shape"),
        ([-9, 0, 1, 2.5, 3, 9], [1, 1, 1, 1, 1, 1], "not equally wide"),
        ([9, 0, 1, 2, 3, 9], [1, 1, 1, 1, 1, 1], "outliers lie between"),
        ([-9, 0, 1, 2, 3, 9], [1, 1, -1, 1, 1, 1], "not those of a histogram"),
        ([-9, 0, 1, 2, 3, 9], [0, 0, 0, 0, 0, 0], "not those of a histogram"),
        ([-9, 0, float("nan"), 2, 3, 9], [1, 1, 1, 1, 1, 1], "not those of a histogram"),
    ],
)
def test_what_is_no_histogram(centers: list[float], counts: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SignedHistogram.from_centers(torch.tensor(centers), torch.tensor(counts))
