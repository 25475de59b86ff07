"""The weights that codes stand for, in a dense model."""

from typing import Any

import torch
from torch import nn

from teal_cli.models.layers import StackedLinear
from teal_kernels.experts import expert_of
from teal_kernels.packing import Packed, dequantised


@torch.no_grad()
def dequantise_(model: Any, packs: dict[str, Packed]) -> None:
    """Give a dense model the weights that codes stand for. An output layer that was tied gets its own.

    Args:
        model: a transformers model.
        packs: by module path.
    """
    for name, packed in packs.items():
        layer = model.get_submodule(name)
        if isinstance(layer, StackedLinear):
            for nth in range(layer.copies):
                layer.weight[nth].copy_(dequantised(expert_of(packed, nth), layer.weight.dtype).t())
            continue
        values = dequantised(packed, layer.weight.dtype).t()
        if layer.weight is model.get_input_embeddings().weight:
            layer.weight = nn.Parameter(values.contiguous(), requires_grad=False)
        else:
            layer.weight.copy_(values)
