"""The histogram: exact counts, exact merging, thresholds that realise the asked sparsity."""

import math

import pytest
import torch

from teal_cli.calibration import histogram

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _samples(kind: str, count: int = 200_000) -> torch.Tensor:
    torch.manual_seed(1)
    return {
        "normal": lambda: torch.randn(count),
        "laplace": lambda: torch.distributions.Laplace(0, 0.02).sample((count,)),
        "skewed": lambda: torch.randn(count).exp() - 0.3,
        "heavy": lambda: torch.distributions.StudentT(1.5).sample((count,)),
        "tiny": lambda: torch.randn(count) * 1e-5,
    }[kind]()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "laplace", "skewed", "heavy", "tiny"])
def test_threshold_realises_the_sparsity(kind: str, dtype: torch.dtype) -> None:
    x = _samples(kind).to(dtype)
    if dtype == torch.float16 and kind == "tiny":
        x = x * 100  # float16 has no such small normal numbers
    counts = histogram.count(x)
    for sparsity in (0.05, 0.25, 0.4, 0.5, 0.65, 0.9, 0.99):
        threshold = histogram.threshold_for(counts, sparsity)
        realised = float((x.abs().float() <= threshold).float().mean())
        assert abs(realised - sparsity) < 0.005
        # The share read off the histogram is the share itself, not an estimate.
        assert histogram.sparsity_at(counts, threshold) == pytest.approx(realised, abs=1e-6)


def test_threshold_is_the_nearest_edge() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    counts = histogram.count(x)
    for sparsity, dropped in ((0.2, 1), (0.3, 1), (0.4, 2), (0.6, 2), (0.74, 3)):
        assert int((x <= histogram.threshold_for(counts, sparsity)).sum()) == dropped


def test_merging_is_exact_and_in_any_order() -> None:
    x = _samples("heavy")
    whole = histogram.count(x)
    parts = [histogram.count(part) for part in x.split(7_919)]
    assert torch.equal(sum(parts[1:], parts[0]), whole)
    assert torch.equal(sum(reversed(parts[:-1]), parts[-1]), whole)


def test_bins_cover_everything_once() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, 2.0**-40, 1.0, -1.0, 2.0**24 - 1, 2.0**24, math.inf, -math.inf, math.nan])
    bins = histogram.bin_of(x)
    assert int(bins.min()) == 0
    assert bins[:3].tolist() == [0, 0, 0]
    assert int(bins[3]) == 1
    assert bins[4] == bins[5]
    assert int(bins[6]) == histogram.BINS - 2
    assert bins[7:].tolist() == [histogram.BINS - 1] * 4
    assert histogram.not_finite(histogram.count(x)) == 4


def test_upper_edge_is_the_last_value_of_its_bin() -> None:
    for index in (1, 2, 300, 9_000, histogram.BINS - 2):
        edge = torch.tensor(histogram.upper_edge(index))
        following = torch.nextafter(edge, torch.tensor(math.inf))
        assert int(histogram.bin_of(edge)[0]) == index
        assert int(histogram.bin_of(following)[0]) == index + 1


def test_bins_are_narrow() -> None:
    for index in (1, 5_000, 12_000):
        assert histogram.upper_edge(index + 1) / histogram.upper_edge(index) - 1 < 1 / 255


def test_zero_sparsity_and_errors() -> None:
    counts = histogram.count(torch.randn(100))
    assert histogram.threshold_for(counts, 0.0) == 0.0
    assert histogram.sparsity_at(counts, -1.0) == 0.0
    with pytest.raises(ValueError, match="empty"):
        histogram.threshold_for(histogram.empty(), 0.5)
    with pytest.raises(ValueError, match="not finite"):
        histogram.threshold_for(histogram.count(torch.full((10,), math.inf)), 0.5)


def test_many_zeros_are_dropped_at_no_less_than_their_share() -> None:
    """ReLU-like states: a threshold cannot keep some zeros and drop others."""
    x = torch.cat([torch.zeros(900), torch.rand(100) + 1])
    threshold = histogram.threshold_for(histogram.count(x), 0.5)
    assert float((x <= threshold).float().mean()) == pytest.approx(0.9)
