"""Products of 16-bit numbers in float32, on a processor that has no instructions for them.

PyTorch multiplies bfloat16 and float16 by plain loops where oneDNN has no instructions for them (bfloat16 without
AVX-512, float16 without AMX or AVX-512 FP16): twenty times slower than float32, or worse. A prompt then takes longer
than its answer. Here such products are computed in float32, weights a piece at a time, and rounded once at the end,
as oneDNN does it.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from threading import local
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from teal_cli.threads import in_one_thread

_PIECE = 1 << 19
"""Weights that are converted at once, 2 MB of float32: they stay in a processor's caches. Of 14336 x 4096 weights and
64 states, pieces of 128 rows took a third of the time of the whole."""
_SLOW = 3.0
"""Times float32's: measured 7 and more where there are no instructions, about 1 where there are."""
_active = local()


def widen_products_(model: nn.Module) -> None:
    """Have a model's forward, and that of each of its blocks, multiply in float32 where its own dtype is slow here.

    Nothing changes for a model on a GPU, of float32, or on a processor that multiplies its dtype. Compiled code is left
    alone.
    """
    narrow = {tensor.dtype for tensor in model.parameters() if tensor.device.type == "cpu" and _is_narrow(tensor.dtype)}
    if any(is_slow(dtype) for dtype in narrow):
        for module in (model, *_blocks(model)):
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


@cache
@in_one_thread
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of a dtype far more slowly than float32; measured once, in 0.1 s.

    In one thread: where others take the processors, two threads wait for one another, and every product took 8 to 20
    milliseconds.
    """
    return _seconds(dtype) > _SLOW * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        F.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of modules: calibration calls them one by one."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    modes = _active.__dict__.setdefault("modes", [])
    modes.append(None if modes else InFloat32())
    if modes[-1] is not None:
        modes[-1].__enter__()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    mode = _active.modes.pop()
    if mode is not None:
        mode.__exit__(None, None, None)


class InFloat32(TorchFunctionMode):
    """Within it, products of 16-bit tensors on the CPU are computed in float32; each gives its inputs' dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of torch's protocol."""
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is None or not args or "out" in kwargs:  # nobody writes products of a model so
            return func(*args, **kwargs)
        if not _is_narrow(args[0].dtype) or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        return product(func, *args, **kwargs)


class _Product(torch.autograd.Function):
    """(..., in) times (out, in), both of one 16-bit dtype; only they are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        flat = grad.flatten(0, -2)
        of_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _product(flat.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        of_bias = flat.float().sum(0).to(grad.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wide, rows = x.float(), max(1, _PIECE // weight.shape[1])
    biases: Any = [None] * len(weight) if bias is None else bias.float().split(rows)
    pieces = zip(weight.split(rows), biases, strict=False)
    return torch.cat([F.linear(wide, piece.float(), own).to(x.dtype) for piece, own in pieces], dim=-1)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  (torch's name)
    found: Tensor = _Product.apply(input, weight, bias)
    return found


def _grouped(func: Any, x: Tensor, weight: Tensor, *, offs: Tensor | None = None, **kwargs: Any) -> Any:
    """Of experts, (rows, in) sorted by them and (experts, in, out): those that no row chose are not read."""
    if weight.dim() != 3 or x.dim() != 2 or offs is None or any(value is not None for value in kwargs.values()):
        return func(x, weight, offs=offs, **kwargs)
    ends = offs.tolist()
    spans = zip([0, *ends[:-1]], ends, weight, strict=True)
    parts = [_Product.apply(x[start:end], own.t(), None) for start, end, own in spans if end > start]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def _cast(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other product: of activations, whose copies are small."""
    dtype = args[0].dtype

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    return func(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()}).to(dtype)


_CAST = (
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, F.scaled_dot_product_attention),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
)
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys(_CAST, _cast),
    **dict.fromkeys((torch._grouped_mm, F.grouped_mm), _grouped),
}
