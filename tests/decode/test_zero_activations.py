"""dReLU and FATReLU as keys of any family's configuration, in mode intrinsic on the native and the fused path."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny
from fused_pair import random_tokens, use_small_tiles
from native_models import NO_LIBRARY, check_steps, tiny

from teal_cli.adapt.recipe import Setting
from teal_cli.adapt.recipes import recipe_class
from teal_cli.adapt.write import write_adapted
from teal_cli.config.recipes import options_of
from teal_cli.decode.engine import Engine
from teal_cli.model_loading import load_model
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


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), [("phi3", "drelu"), ("qwen3_moe", "drelu"), ("qwen3_moe", "fatrelu")])
def test_fused_steps(family: str, name: str, own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in Triton's interpreter."""
    use_small_tiles(monkeypatch)
    check_steps(_intrinsic(family, name), [12], 2, path="fused")


@torch.no_grad()
@pytest.mark.parametrize("name", ["prosparse", "drelu"])
def test_what_a_recipe_leaves_behind_decodes_on_every_path(
    name: str, tmp_path: Path, own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's model gives the logits of the one that was trained, and each path its steps."""
    use_small_tiles(monkeypatch)
    source, ids = save_tiny(tmp_path / "source", "qwen3"), random_tokens(2, 32)
    model = load_model(source, device="cpu", dtype="auto")
    recipe = recipe_class(name)(Setting(options_of(name)(), 0, None, 0))
    recipe.operate_(model, recipe.measure(model, ids))
    for parameter in model.parameters():  # training
        parameter.add_(torch.randn_like(parameter), alpha=0.01)
    outcome = recipe.finish_(model, ids)
    expected = model(ids).logits
    write_adapted(source, tmp_path / "out", model, outcome, {}, None)  # type: ignore[arg-type]  # nothing is calibrated
    paths = ["general", "fused"] if NO_LIBRARY is not None else ["general", "native", "fused"]
    for path in paths:
        loaded = load_model(tmp_path / "out", device="cpu", dtype="auto")
        assert torch.equal(loaded(ids).logits, expected)
        make_intrinsic_(loaded)
        if path == "general":
            engine = Engine(loaded, path=path)
            cache = engine.new_cache(32)
            engine.prefill(ids[:, :31], cache)
            torch.testing.assert_close(engine.step(ids[:, 31:], cache), expected[:, -1].float(), rtol=1e-4, atol=1e-4)
        else:
            check_steps(loaded, [12], 2, path=path)
