"""Models without weights for vLLM: folders of configurations, and a load format that fills them with random numbers."""

import os
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import build_random_model

GROUP, SEED = 128, 0
LOAD_FORMAT, ALIAS_VARIABLE = "teal_random", "TEAL_RANDOM_ALIAS"
"""The format's name, and the environment variable with the alias whose weights it makes."""


def register_loader() -> None:
    """Entry point of a plugin of vLLM: a load format with the weights that `teal bench --random-weights` has."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            device = next(model.parameters()).device.type
            usual = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)  # as where ours are built: with another the numbers drawn differ
            try:
                alias = require_alias(os.environ[ALIAS_VARIABLE])
                with torch.no_grad():
                    made = build_random_model(alias, device=device, dtype="bfloat16", seed=SEED)
            finally:
                torch.set_default_dtype(usual)
            state = made.state_dict()
            if made.config.tie_word_embeddings:
                del state["lm_head.weight"]
            model.load_weights(iter(state.items()))


def write_plugin(work: Path) -> None:
    """What makes `register_loader` an entry point wherever `work` is on the path, without an installation."""
    folder = work / "teal_random_loader-0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: teal-random-loader\nVersion: 0\n")
    entry = f"teal_random = {Path(__file__).stem}:{register_loader.__name__}"
    (folder / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")


def write_models(work: Path, shape: dict[str, Any], architecture: str, plan: dict[str, Any]) -> None:
    """Folders of three models as vLLM reads them, without weights.

    Args:
        work: the folder for them.
        shape: the configuration of the dense model.
        architecture: the name of its class.
        plan: of sparsity, as `teal export` puts it into a configuration.
    """
    shape = {**shape, "architectures": [architecture], "dtype": "bfloat16"}
    shape.pop("quantization_config", None)
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    scheme |= {"observer": "minmax", "observer_kwargs": {}, "dynamic": False, "actorder": None}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    int4 = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    for name, quantisation in {"dense": None, "teal": plan, "int4": int4}.items():
        (work / name).mkdir(parents=True, exist_ok=True)
        more = {} if quantisation is None else {"quantization_config": quantisation}
        write_json(work / name / "config.json", {**shape, **more})
