"""Triton's interpreter without what it repeats. Import it when TRITON_INTERPRET is set."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton import language
from triton.language import semantic
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
    semantic.TritonSemantic.binary_op_type_checking_impl = _alike
    semantic.TritonSemantic.broadcast_impl_value = _of_one_shape
    core._unwrap_if_constexpr = _unwrapped


_BUILTIN = core.builtin(lambda: None).__code__
_np_dtype, _convert_float, _equal = interpreter._get_np_dtype, interpreter._convert_float, core.dtype.__eq__
_SCALAR = core.tuple([]), core.constexpr(1)
_DTYPES: dict[str, Any] = {}
_SHAPES: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}
_check_types = semantic.TritonSemantic.binary_op_type_checking_impl
_broadcast = semantic.TritonSemantic.broadcast_impl_value
_unwrap = core._unwrap_if_constexpr
_NUMBERS: dict[tuple[Any, ...], Any] = {}


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


def _alike(
    own: Any,
    left: Any,
    right: Any,
    left_pointer: bool = False,
    right_pointer: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> tuple[Any, Any]:
    """Operands in one type and shape: most are so already. A number beside a block becomes a block, which is kept."""
    flags = left_pointer, right_pointer, arithmetic_check, div_or_mod
    if type(left) is core.tensor and arithmetic_check and not div_or_mod and not left.dtype.is_ptr():
        if type(right) is core.tensor:
            if left.dtype is right.dtype:
                return _of_one_shape(own, left, right)
        elif right or type(right) is int:  # of two zeros that are no whole numbers one has a sign
            key = right, type(right), left.dtype.name, id(left.shape)
            if key not in _NUMBERS:
                found = _check_types(own, left, right, *flags)
                if found[0] is not left:
                    return found
                found[1].handle.data.setflags(write=False)
                _NUMBERS[key] = found[1]
            return left, _NUMBERS[key]
    return _check_types(own, left, right, *flags)


def _of_one_shape(own: Any, left: Any, right: Any) -> tuple[Any, Any]:
    return (left, right) if left.shape is right.shape else _broadcast(own, left, right)


def _unwrapped(value: Any) -> Any:
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind is core.tensor or kind is int else _unwrap(value)
