"""What is known of a product from several tables: one's own, that of the GPU, those of others."""

from dataclasses import replace

import pytest
import torch

from teal_kernels.triton_gemv import TileConfig
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import Entry, Provenance
from teal_kernels.tuning_files import keep_entries, table_of

pytestmark = pytest.mark.usefixtures("own_tables")
H100 = "NVIDIA H100 80GB HBM3"
DENSE = TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=1000, warps=1, dense=True)
SPARSE = replace(DENSE, dense=False)
GATED = (4096, (14336, 14336), "bfloat16", 4, "gated")
"""Gate and up of Llama-3-8B, of four rows."""


@pytest.fixture(autouse=True)
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)


def _tuned(sparsity: float, microseconds: float) -> None:
    """Keep what a search at one sparsity found, beside a dense read of 10 microseconds."""
    both = ((0.0, 10.0, DENSE), (sparsity, microseconds, SPARSE))
    keep_entries([Entry(*GATED, *measured) for measured in both], H100, Provenance())


def _choose(sparsity: float) -> TileConfig:
    inputs, parts, _, rows, epilogue = GATED
    product = {"inputs": inputs, "parts": parts, "rows": rows, "epilogue": epilogue}
    return choose_config(torch.device("cuda"), dtype=torch.bfloat16, sparsity=sparsity, **product)


def _known() -> dict[float, Entry]:
    return {entry.sparsity: entry for entry in table_of(H100) if entry.product == GATED}


def test_what_is_known_beyond_the_sparsity_that_was_tuned_is_kept() -> None:
    """Four rows do not skip at 50 %, and by the packaged table they do at 80 %."""
    packaged, chosen = _known(), _choose(0.8)
    assert not chosen.dense
    _tuned(0.5, 10.1)
    assert _choose(0.5) == DENSE
    assert _choose(0.8) == chosen
    found = _known()
    assert found[0.5].config == SPARSE
    assert found[0.8].cost == pytest.approx(10.0 * packaged[0.8].cost / packaged[0.0].cost, abs=0.01)
    assert found[0.8].microseconds == packaged[0.8].microseconds


def test_what_is_known_below_it_is_not() -> None:
    assert 0.5 in _known()
    _tuned(0.8, 5.0)
    assert list(_known()) == [0.0, 0.8]
