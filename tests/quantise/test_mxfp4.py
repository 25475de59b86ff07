"""Experts in MXFP4, as gpt-oss is published: dequantised to the bit as transformers has them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.quantise import mxfp4
from teal_cli.resources import teal_home

EXPERTS = "model.layers.{}.mlp.experts.{}"


def _random_codes(experts: int, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales, of numbers about as large as weights are, and of the least and largest that there are."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(119, 123, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def _publish(folder: Path) -> dict[str, Tensor]:
    """Put codes in the place of the experts' weights of a tiny model; the weights, as transformers dequantises them."""
    shape = {**FAMILIES["gpt_oss"], "intermediate_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            key = EXPERTS.format(layer, name)
            experts, inputs, outputs = tensors.pop(key).shape
            blocks, scales = _random_codes(experts, outputs, inputs, seed=layer)
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = blocks, scales
            expected[key] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def test_a_published_folder_becomes_a_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several shards, once; and transformers' names of experts."""
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))  # where no other test has converted the same weights
    monkeypatch.setattr(mxfp4, "_SHARD_BYTES", 1 << 17)
    expected = _publish(tmp_path / "published")
    said: list[str] = []
    source = find_model(str(tmp_path / "published"), said.append)
    assert source.name == "published"
    assert source.folder.is_relative_to(teal_home())
    assert "quantization_config" not in source.config
    assert len(list(source.folder.glob("model-*.safetensors"))) > 2
    assert len(said) == 1
    assert find_model(str(tmp_path / "published"), said.append).folder == source.folder
    assert len(said) == 1
    model = load_model(source.folder, device="cpu", dtype="bfloat16")
    weights = model.state_dict()
    for key, weight in expected.items():
        assert torch.equal(weights[key], weight), key


def test_every_code_and_scale() -> None:
    """The least scale too, at which values leave the range of ordinary numbers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for scale in (0, 1, 100, 127, 128, 240):
        scales = torch.full((1, 1, 16), scale, dtype=torch.uint8)
        assert torch.equal(mxfp4.dequantised_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales)), scale


@pytest.mark.parametrize("damage", ["no scales", "other scales", "no codes"])
def test_codes_that_do_not_belong_together(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    _publish(folder)
    tensors = load_file(folder / "model.safetensors")
    key = EXPERTS.format(1, "down_proj_scales")
    if damage == "other scales":
        tensors[key] = tensors[key][:, 1:].contiguous()
    elif damage == "no scales":
        del tensors[key]
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("_blocks")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = "they hold no codes" if damage == "no codes" else "down_proj of shape .* do not belong together"
    with pytest.raises(ArtefactError, match=wanted):
        find_model(str(folder))
