"""Tiny random models that are sparse by their activation, saved as such models lie on the hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import build_model, build_tokenizer
from torch import Tensor, nn
from torch.nn.functional import relu

THRESHOLD = 0.25


@dataclass(frozen=True)
class Kind:
    """A kind of model, as its config.json says it."""

    family: str
    """Whose weights and modules it has."""
    changes: dict[str, object]
    """To config.json."""
    hidden: Callable[[Tensor, Tensor], Tensor]
    """(gate product, up product) -> what down reads, written out here."""


_AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
_FAT = {"hidden_act": "fatrelu", "hidden_act_param": THRESHOLD}


def _fat(gate: Tensor, up: Tensor) -> Tensor:
    return torch.where(gate >= THRESHOLD, gate, 0.0) * up


KINDS = {
    "relu": Kind("llama", {"hidden_act": "relu"}, lambda gate, up: relu(gate) * up),
    "relu-bias": Kind("llama", {"hidden_act": "relu", "mlp_bias": True}, lambda gate, up: relu(gate) * up),
    "relu2": Kind("qwen3", {"hidden_act": "relu2"}, lambda gate, up: relu(gate) ** 2 * up),
    "fatrelu": Kind("llama", _FAT, _fat),
    "sparsellama": Kind(
        "llama",
        {
            **_FAT,
            "model_type": "sparsellama",
            "architectures": ["SparseLlamaForCausalLM"],
            "auto_map": _AUTO_MAP,
        },
        _fat,
    ),
    "bamboo": Kind(
        "mistral",
        {
            "hidden_act": "relu",
            "model_type": "bamboo",
            "architectures": ["BambooForCausalLM"],
            "auto_map": _AUTO_MAP,
        },
        lambda gate, up: relu(gate) * relu(up),
    ),
}


def save_kind(folder: Path, kind: str, *, tokenizer: bool = False) -> Path:
    """A tiny random model of this kind, with the config.json that such a model has on the hub."""
    wanted = KINDS[kind]
    model = build_model(wanted.family)
    if wanted.changes.get("mlp_bias"):
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                layer.bias = nn.Parameter(torch.randn(layer.out_features) * 0.1)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted.changes))
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder
