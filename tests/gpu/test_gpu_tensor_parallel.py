"""Two GPUs that share a model, against one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from ranks_at_work import COUNT, run_ranks
from tiny_configs import ALL_MIXTURES

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < COUNT, reason=f"fewer than {COUNT} GPUs")
FAMILIES = ["llama", "llama-bias", "mistral", "qwen3", "olmo2", "granite_swa", *ALL_MIXTURES]
LOGITS = 1e-5
"""Relative; float32 sums in another order."""
GPU = {"TEAL_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        build_model(family).save_pretrained(folder / family)
    return run_ranks("families", folder, **GPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_counts_and_texts_are_those_of_one(family: str, divided: dict[str, Any]) -> None:
    found = divided[family]
    assert not isinstance(found, str), found
    assert max(found["dense"], found["general"], found["fused"]) < LOGITS, found
    assert all(found["realised"].values()), found
    assert found["wide"][1:] == pytest.approx([found["wide"][0]] * 2, abs=1e-12)
    assert found["texts"][1:] == [found["texts"][0]] * 2


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks("sums", tmp_path_factory.mktemp("nothing"), **GPU)


def test_the_fastest_way_is_taken(summed: dict[str, Any]) -> None:
    times = summed["microseconds"]
    assert "NCCL" in times
    assert summed["line"].endswith(f"{min(times, key=times.get)} is taken")


@pytest.mark.parametrize("way", ["NCCL", "one_shot_all_reduce", "inboxes"])
def test_sums_have_the_same_bits_on_all_ranks_and_in_all_runs(way: str, summed: dict[str, Any]) -> None:
    if way not in summed:
        pytest.skip("these GPUs cannot reach each other's memory")
    found = summed[way]
    assert found["alike"]
    assert found["repeats"]
    assert found["error"] < 6e-3  # bfloat16
    assert found["squares"] < 1e-5
    assert found["gathered"] == [0.0, 1.0, 1.0]


def test_a_rank_that_is_silent_is_found(tmp_path: Path) -> None:
    found = run_ranks("silent", tmp_path, **GPU, TEAL_TEST_SECONDS="15")
    assert found["said"]
    assert found["seconds"] < 50
