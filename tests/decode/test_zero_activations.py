"""dReLU and FATReLU as keys of any family's configuration, in mode intrinsic on the native and the fused path."""

import pytest
import torch
from fused_pair import use_small_tiles
from native_models import NO_LIBRARY, check_steps, tiny

from teal_cli.sparse import make_intrinsic_
from teal_cli.sparse.gate_first import GateFirstMLP

KEYS: dict[str, dict[str, object]] = {"drelu": {}, "fatrelu": {"hidden_act_param": [0.1, 0.4]}}
ZEROS_ALONE = {"phi3", "mixtral"}
"""Gate and up are one projection there."""


def _intrinsic(family: str, name: str) -> object:
    key = "hidden_activation" if family == "gemma2" else "hidden_act"
    model = tiny(family, **{key: name}, **KEYS[name])
    make_intrinsic_(model)
    assert any(isinstance(module, GateFirstMLP) for module in model.modules()) == (family not in ZEROS_ALONE)
    return model


@torch.no_grad()
@pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_native_steps(family: str, name: str) -> None:
    """Logits and counts against float64."""
    check_steps(_intrinsic(family, name), [12, 5], 2)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "qwen3_moe"])
def test_fused_steps(family: str, name: str, own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in Triton's interpreter."""
    use_small_tiles(monkeypatch)
    check_steps(_intrinsic(family, name), [12], 2, path="fused")
