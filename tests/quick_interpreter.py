"""Triton's interpreter without what it repeats. Import it when TRITON_INTERPRET is set."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton import language
from triton.runtime import interpreter

core = language.core


def quicken() -> None:
    """Leave out what Triton's interpreter repeats: more than three quarters of the time of our kernels.

    It patches the whole language again for every launch and whenever one kernel function calls another, follows every
    whole-number sum in 64 bits to see whether it overflows, and makes the types of each value anew, with their names.
    """
    interpreter._patch_attr = _call_directly
    names = {"tl": language, "core": core}  # as our kernels and triton's own functions import them
    patched = interpreter._patch_lang(SimpleNamespace(__globals__=names))
    interpreter._patch_lang = lambda _: type(patched)()  # with nothing to take back
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _dtype_of
    interpreter._convert_float = _convert
    interpreter.TensorHandle.__init__ = _init_handle
    core.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block
    core.block_type.name = property(lambda block: f"<{block.shape}, {block.element_ty}>")
    core.block_type.to_ir = lambda block, builder: block
    core.dtype.__eq__ = _same_dtype
    core.tuple.__ne__ = _other_values


_BUILTIN = core.builtin(lambda: None).__code__
_np_dtype, _convert_float, _equal = interpreter._get_np_dtype, interpreter._convert_float, core.dtype.__eq__
_SCALAR = core.tuple([]), core.constexpr(1)
_DTYPES: dict[str, Any] = {}
_SHAPES: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}


def _call_directly(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A function of the language for the interpreter: called without what looks for the compiler's argument."""
    plain = member.__wrapped__ if member.__code__ is _BUILTIN else member

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return plain(*arguments, **named)

    scope.set_attr(holder, name, call)


def _dtype_of(dtype: Any) -> Any:
    """numpy's, of values of a scalar, pointer or block type."""
    element = dtype.scalar
    if element.name not in _DTYPES:
        _DTYPES[element.name] = _np_dtype(element)
    return _DTYPES[element.name]


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Bits of another type: those of bfloat16 are the upper half of float32's, rounded towards zero as there."""
    if rounding is None and source == language.bfloat16 and target == language.float32:
        return values.astype(np.uint32) << 16
    if rounding is None and source == language.float32 and target == language.bfloat16:
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return _convert_float(values, source, target, rounding)


def _init_handle(handle: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
    handle.data, handle.dtype, handle.attr = data, dtype, {} if attr is None else attr


def _init_tensor(tensor: Any, handle: Any, type: Any) -> None:  # noqa: A002  (callers may name it)
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = type.of_tensor if type.is_block() else _SCALAR


def _init_block(block: Any, element_ty: Any, shape: Sequence[Any]) -> None:
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    if sizes not in _SHAPES:
        numel = core.validate_block_shape(sizes)
        _SHAPES[sizes] = core.tuple(sizes), numel, (core.tuple(map(core.constexpr, sizes)), core.constexpr(numel))
    block.element_ty = element_ty
    block.shape, block.numel, block.of_tensor = _SHAPES[sizes]


def _same_dtype(dtype: Any, other: Any) -> Any:
    return dtype is other or _equal(dtype, other)


def _other_values(values: Any, other: Any) -> bool:
    return values.values != other if type(other) is list else not values.__eq__(other)
