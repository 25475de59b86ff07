"""Weights of the native path lie in large pages, where the system has them."""

from pathlib import Path

import pytest
import torch
from native_models import NO_LIBRARY, check_steps, sparse, tiny

from teal_cli.sparse import sparse_layers

_LARGE_PAGE = 2 << 20
_MAPS = Path("/proc/self/smaps")


def _flags_at(address: int) -> list[str]:
    """Of the part of memory that an address is in."""
    inside = False
    for line in _MAPS.read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(each, 16) for each in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise LookupError("an address that is not mapped")


@pytest.mark.skipif(
    not (_MAPS.is_file() and Path("/sys/kernel/mm/transparent_hugepage").is_dir()), reason="no large pages here"
)
@pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
@torch.no_grad()
def test_large_tables_are_asked_to_be_in_large_pages() -> None:
    model = sparse(tiny("llama", intermediate_size=16384))
    check_steps(model, [7], steps=1)
    layer = next(layer for name, layer in sparse_layers(model).items() if name.endswith("gate_proj"))
    table = layer.merged.table
    assert isinstance(table, torch.Tensor)
    size = table.numel() * table.element_size()
    assert size > 2 * _LARGE_PAGE
    assert "hg" in _flags_at(table.data_ptr() + size // 2)
