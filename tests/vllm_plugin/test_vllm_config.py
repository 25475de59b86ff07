"""What vLLM's quantisation method makes of a `quantization_config`, in vLLM's process."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from vllm_models import exported

from teal_cli.errors import ArtefactError


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = exported(tmp_path_factory.mktemp("exports"), "llama", "uniform")
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def test_vllm_finds_the_method_by_the_plugin(content: dict) -> None:
    (plugin,) = (each for each in entry_points(group="vllm.general_plugins") if each.name == "teal")
    for _ in range(2):  # vLLM may call it again
        plugin.load()()
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("teal").from_config(content)
    assert config.get_name() == "teal"
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert len(config.planned.rules_of("model.layers.0.self_attn.qkv_proj", packed)) == 3


def test_what_vllm_cannot_run_is_refused(content: dict) -> None:
    from teal_cli.vllm_plugin.method import TealConfig

    with pytest.raises(ArtefactError, match="altered"):
        TealConfig.from_config({**content, "target_sparsity": 0.4})
    with pytest.raises(ArtefactError, match="format version"):
        TealConfig.from_config({**content, "version": 9})
