"""Quantiles that thresholds follow."""

import pytest
import torch

from teal_cli.adapt.followed import _SAMPLED, FollowedRouters, _quantile
from teal_cli.sparse.routed import Router


@pytest.mark.parametrize("features", [576, 1536, 2560, 11008, 14336])
@pytest.mark.parametrize("share", [0.3, 0.65, 0.9])
def test_a_quantile_of_some_is_that_of_all(features: int, share: float) -> None:
    """Though features differ in size, and neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 3.0, features).sin().abs() + 0.05
    values = (torch.randn(64, features, generator=generator) * scales).abs()
    found = _quantile(values, share)
    assert values.numel() > _SAMPLED
    assert float((values <= found).float().mean()) == pytest.approx(share, abs=0.02)


def test_a_quantile_of_few_is_exact() -> None:
    values = torch.randn(10, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_quantile(values, 0.4), values.flatten().sort().values[199])


@pytest.mark.parametrize("target", [0.0, 0.005, 0.5, 0.995])
@pytest.mark.parametrize("even", [True, False])
def test_routers_that_are_to_leave_out_the_same_leave_out_what_was_asked_for(target: float, even: bool) -> None:
    """However much or little; so do those that left out nothing of themselves, whose shares say nothing."""
    following = FollowedRouters([Router(4, 10).requires_grad_(False) for _ in range(2)], target, even=even)
    following.move([0, 1], torch.tensor([0.3, 0.1] if even else [0.0, 0.0]))
    assert following.values()[:, 0].tolist() == pytest.approx([target, target])
