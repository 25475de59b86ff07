"""RMS norms as one kernel while a model trains."""

import pytest
import torch
from conftest import build_model
from torch import Tensor, nn

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


class _Weighted(nn.Module):
    """Has what an RMS norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6


class _AddedToRoot(_Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class _AtLeast(_Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).clamp_min(self.eps).rsqrt()


class _AnotherEpsilon(_Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), self.weight, 1e-5)


class _Clipped(_Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.clamp(-50, 50), (8,), self.weight, self.eps)


class _WithBuffer(_Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.rms_norm(x, (8,), self.weight, self.eps)


class _Gated(_Weighted):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return nn.functional.rms_norm(x * gate.sigmoid(), (8,), self.weight, self.eps)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [_AddedToRoot, _AtLeast, _AnotherEpsilon, _Clipped, _WithBuffer, _Gated])
def test_what_differs_only_for_small_or_large_inputs_stays(kind: type[nn.Module]) -> None:
    """Or later, by a buffer; and what cannot run on one tensor, in whatever way it fails."""
    with fused_norms([kind()]) as count:
        assert count == 0


def test_hooks_are_not_told_of_what_is_tried() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    told: list[nn.Module] = []
    norm.register_forward_hook(lambda module, args, output: told.append(module))
    with fused_norms([norm]) as count:
        assert (count, told) == (1, [])
        norm(torch.randn(2, 8))
    assert told == [norm]
