"""RMS norms as one kernel while a model trains."""

import pytest
import torch
from conftest import build_model
from torch import nn

from teal_cli.adapt.norms import fused_norms


def _named(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "olmo2"])
def test_every_rms_norm_is_one_kernel_that_does_the_same(family: str) -> None:
    """With an added one and without, of blocks and of heads; values and gradients."""
    model = build_model(family)
    ids = torch.arange(12).view(2, 6)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = model(ids).logits
        return logits, list(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))

    logits, gradients = run()
    norms = _named(model)
    with fused_norms([model]) as count:
        assert count == len(norms) > 0
        assert all("forward" in vars(norm) for norm in norms)
        again, its_gradients = run()
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(its_gradients, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_other_norms_and_dtypes_stay_as_they_are() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * nn.functional.rms_norm(x, (8,), self.weight, self.eps)

    halved, layer_norm, narrow = Halved(), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5).bfloat16()
    with fused_norms([halved, layer_norm, narrow]) as count:
        assert count == 0
    plain = nn.RMSNorm(8, eps=1e-5)
    with fused_norms([plain]) as count:
        assert count == 1
        x = torch.randn(3, 8).bfloat16()
        assert torch.equal(plain(x), nn.RMSNorm.forward(plain, x))
    hooked = nn.RMSNorm(8, eps=1e-5)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    with fused_norms([hooked]) as count:
        assert count == 0
    assert "forward" in vars(hooked)
