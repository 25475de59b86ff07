"""RMS norms in one launch while a model trains.

transformers computes one in six steps, and twice as many backward: some thousand launches of a pass of a small model.
PyTorch has a kernel for each direction.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZES = (0.0, 0.3, 1.0, 3.0)
"""Of rows on which the kernel is held against a module's own forward, over the root of its epsilon: there it shows
what epsilon does. Rows of size 1, where it does nothing, and of size 1000 are tried too."""
_TOLERANCE = 1e-5


def _plain(module: Any, epsilon: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, epsilon)


def _with_added_one(module: Any, epsilon: float, x: Tensor) -> Tensor:
    """As Gemma has it."""
    return F.rms_norm(x, module.weight.shape, 1.0 + module.weight, epsilon)


@contextmanager
def fused_norms(models: Iterable[nn.Module]) -> Iterator[int]:
    """Inside it, RMS norms of these models run as one kernel; the value is how many do.

    No class is named: a module is one that has a float32 vector and nothing else, and that does what the kernel does on
    a few random rows. What comes in and goes out is float32 then, as it is where weights train in float32.
    """
    changed: list[nn.Module] = []
    try:
        for model in models:
            for module in model.modules():
                if (found := _fused(module)) is not None:
                    module.forward = found
                    changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            del module.forward


@torch.no_grad()
def _fused(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The kernel with what this module has, or None where it is no RMS norm."""
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    own = dict(module.named_parameters())
    if "forward" in vars(module) or list(own) != ["weight"] or any(True for _ in module.buffers()):
        return None  # a forward that somebody else put there stays
    if not isinstance(epsilon, float) or epsilon < 0.0:
        return None
    weight = own["weight"]
    if weight.dim() != 1 or weight.dtype != torch.float32 or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([*(size * epsilon**0.5 for size in _SIZES), 1.0, 1e3])
    x = (sizes[:, None] * torch.randn(len(sizes), len(weight), generator=generator))[None].to(weight.device)
    try:
        wanted = module.forward(x)  # without hooks, which are told of a model's passes
    except Exception:  # it takes something else, and says so in its own way
        return None
    for form in (_plain, _with_added_one):
        norm = partial(form, module, epsilon)
        if isinstance(wanted, Tensor) and torch.allclose(norm(x), wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
            return _or_own(norm, module.forward)
    return None


def _or_own(norm: Callable[[Tensor], Tensor], own: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel for float32, and the module's own forward for all else."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return norm(x) if x.dtype == torch.float32 and not args and not kwargs else own(x, *args, **kwargs)

    return forward
