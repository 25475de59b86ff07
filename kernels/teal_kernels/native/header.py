"""src/teal_native.h for ctypes: its constants, enums and structures, in its order.

What the fields mean stands there. Pointers are addresses, so a structure does not know what it points into; `holds`
keeps that alive.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

ABI = 9
"""TEAL_ABI of the header that this file mirrors."""
MAX_ROWS = 8
MAX_PARTS = 4
KEY_BLOCK = 16
"""Positions whose keys lie side by side."""


class Dtype(IntEnum):
    """teal_dtype."""

    F32 = 0
    BF16 = 1
    F16 = 2
    INT8 = 3
    INT4 = 4


class Layout(IntEnum):
    """teal_layout."""

    INPUT_MAJOR = 0
    ROW_MAJOR = 1


class NormKind(IntEnum):
    """teal_norm_kind."""

    RMS_NORM = 0
    LAYER_NORM = 1
    NO_NORM = 2


class Epilogue(IntEnum):
    """teal_epilogue."""

    PLAIN = 0
    GATED = 1
    ACTIVATED = 2
    GATE_FIRST = 3
    RESIDUAL = 4
    ROUTED = 5


class Activation(IntEnum):
    """teal_activation."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4
    FATRELU = 5
    DRELU = 6
    XIELU = 7
    CLAMPED_SWIGLU = 8


class HeadNorms(IntEnum):
    """teal_head_norms."""

    HEADS_FIRST = 0
    HEADS_LAST = 1
    ALL_HEADS = 2


class StepKind(IntEnum):
    """teal_step_kind."""

    NORM = 0
    PRODUCT = 1
    ATTENTION = 2
    ROUTE = 3


class Scores(IntEnum):
    """teal_scores."""

    SOFTMAX = 0
    SPARSEMIXER = 1


class Structure(ctypes.Structure):
    """One of the header's."""

    holds: tuple[object, ...] = ()
    """What it points to. A copy, such as a part of a product, has none: its owner holds the original."""


class Weight(Structure):
    """teal_weight; `weight_of` makes one."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("bias", c_void_p),
        ("thresholds", c_void_p),
        ("row_bytes", c_int64),
        ("scale_stride", c_int64),
        ("zero_stride", c_int64),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("dtype", c_int32),
        ("layout", c_int32),
        ("scale_dtype", c_int32),
        ("group", c_int32),
        ("threshold", c_float),
        ("expected", c_float),
        ("counter", c_int32),
        ("levels", c_int32),
    )


class Norm(Structure):
    """teal_norm; `norm_of` makes one."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32), ("aside", c_int32))


class Router(Structure):
    """teal_router; `structures.router_of` makes one."""

    _fields_ = (("first", c_void_p), ("logits", c_void_p), ("group", c_int32), ("whole", c_int32))


class Product(Structure):
    """teal_product; `product_of` makes one."""

    _fields_ = (
        ("parts", Weight * MAX_PARTS),
        ("norm", c_void_p),
        ("input_norm", c_void_p),
        ("n_parts", c_int32),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("activation_threshold", c_float),
        ("curve", c_float * 3),
        ("stream_scale", c_float),
        ("aside", c_int32),
        ("experts", c_int32),
        ("interleaved", c_int32),
        ("scaled_by", c_void_p),
        ("router", c_void_p),
    )


class Route(Structure):
    """teal_route; `experts.route_of` makes one."""

    _fields_ = (
        ("router", c_void_p),
        ("top_k", c_int32),
        ("scores", c_int32),
        ("normalised", c_int32),
        ("jitter", c_float),
    )


class Attention(Structure):
    """teal_attention; `attention_of` makes one."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("v_norm", c_void_p),
        ("q_bias", c_void_p),
        ("k_bias", c_void_p),
        ("bias", c_void_p),
        ("sinks", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("query_scale", c_void_p),
        ("positions", c_int64),
        ("sequences", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("rotary", c_int32),
        ("dtype", c_int32),
        ("window", c_int32),
        ("neighbours", c_int32),
        ("norms", c_int32),
        ("norm_kind", c_int32),
        ("keys_as_values", c_int32),
        ("grouped", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("cap", c_float),
        ("clip", c_float),
    )


class Step(Structure):
    """teal_step; `program_of` makes them."""

    _fields_ = (("of", c_void_p), ("kind", c_int32), ("unused", c_int32))


class Program(Structure):
    """teal_program; `program_of` makes one."""

    vocabulary: int = 0
    """Outputs of its output layer."""

    _fields_ = (
        ("steps", c_void_p),
        ("embedding", c_void_p),
        ("position_embedding", c_void_p),
        ("embedding_norm", c_void_p),
        ("norm", c_void_p),
        ("output", c_void_p),
        ("position_offset", c_int64),
        ("n_steps", c_int32),
        ("hidden", c_int32),
        ("counters", c_int32),
        ("embedding_scale", c_float),
        ("logits_scale", c_float),
        ("logits_cap", c_float),
    )
