"""What tests of vLLM run: models that it takes, exported, and the texts of `teal generate`."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import export_tiny, save_tiny
from tiny_configs import FAMILIES

from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.steps.generate import Generator

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

TOKENS = 24
PROMPTS = ["the quick brown fox", "seven wise men count the stars above a quiet harbour", "x y z"]
_WIDER = {"hidden_size": 128, "intermediate_size": 200}


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs vLLM on the CPU."""
    of_tests = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return of_tests | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **more}


def exported(home: Path, family: str, allocation: str) -> Path:
    """An export at 50 % of a tiny model, whose heads have the 32 dimensions that vLLM's attention needs.

    By fisher each projection has a sparsity of its own, and the output layer too.
    """
    shape = {name: value for name, value in FAMILIES[family].items() if name != "head_dim"}
    wider = shape | _WIDER if "hidden_size" in shape else shape
    with patch.dict(FAMILIES, {family: wider}):
        dense = save_tiny(home / family, family, chat=True)
    output_layer = None if allocation == "fisher" else False
    return export_tiny(dense, home / f"{family}-{allocation}", allocation=allocation, output_layer=output_layer)[0]


def whole(text: str) -> str:
    """Without half a character at the end, which vLLM holds back."""
    return text.rstrip("\ufffd")


def generator(model: Path, *, chat: bool = False, **options: object) -> Generator:
    """`teal generate`, greedy."""
    shared = {"model": str(model), "dtype": "float32", "device": "cpu", "backend": "cpu", "chat": chat}
    return Generator(GenerateConfig(**{"max_new_tokens": TOKENS, **shared, **options}), QUIET)


def generated(model: Path, **options: object) -> list[str]:
    """Its texts."""
    of_model = generator(model, **options)
    return [whole(of_model.reply([{"role": "user", "content": prompt}]).text) for prompt in PROMPTS]
