"""Quantised experts: packed in memory, in a checkpoint, and counted."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny
from quantised_pair import check_packed, packed_pair, tokens

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.cli import run
from teal_cli.config import CalibrateConfig
from teal_cli.model_loading import load_dense, load_model
from teal_cli.models.architectures import find_projections
from teal_cli.sparse.quantised_experts import QuantisedExperts
from teal_cli.sparse.weight_bytes import weight_bytes_per_token


@pytest.mark.parametrize(
    ("family", "scheme", "output"),
    [("mixtral", "int8", False), ("mixtral", "int4:32", False), ("qwen3_moe", "int4:32", True)],
)
def test_packed_is_the_quantised_network(family: str, scheme: str, output: bool) -> None:
    check_packed(family, scheme, output)


def test_bytes_of_a_token_of_experts() -> None:
    """Two of four experts: codes of half of them."""
    plain, packed, _ = packed_pair("mixtral", "int8", False)
    layer = packed.get_submodule("model.layers.0.mlp.experts.down_proj")
    before, after = weight_bytes_per_token(plain, {}), weight_bytes_per_token(packed, {})
    changed = [packed.get_submodule(projection.name) for projection in find_projections(plain)]
    dense = sum(module.in_features * module.out_features * 4 * getattr(module, "copies", 2) // 2 for module in changed)
    codes = sum(module.packed.nbytes * (1 if hasattr(module, "copies") else 2) // 2 for module in changed)
    assert before - after == dense - codes
    assert layer.qweight.shape == (4, 100, 16)
    name = "model.layers.0.mlp.experts.down_proj"
    assert after - weight_bytes_per_token(packed, {name: 0.5}) == layer.qweight.nbytes // 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_a_checkpoint_with_experts(family: str, corpus: Path, tmp_path: Path) -> None:
    """Files have each expert by itself, or all under another name; the checkpoint has codes of all together."""
    dense = save_tiny(tmp_path / "tiny", family)
    shared = ["--model", str(dense), "--quantise", "int4:32", "--dtype", "float32"]
    text = ["--dataset", str(corpus), "--tokens", "128", "--seq-len", "32", "--sensitivity-tokens", "0"]
    assert run(["calibrate", *shared, *text]) == 0
    out = tmp_path / "out"
    assert run(["export", *shared, "--sparsity", "0.4", "--allocation", "uniform", "--out", str(out)]) == 0
    assert (out / "model.safetensors").stat().st_size < 0.75 * (dense / "model.safetensors").stat().st_size
    model = load_model(out, device="cpu", dtype="float32")
    experts = [module for module in model.modules() if isinstance(module, QuantisedExperts)]
    assert len(experts) == (2 if family == "qwen3_moe" else 4)
    config = CalibrateConfig(model=str(dense), quantise="int4:32", device="cpu", dtype="float32")
    plain, _ = load_dense(dense, config, calibration_file.load(Path("runs/tiny-int4-32")))
    ids = tokens(20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", device="cpu", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
