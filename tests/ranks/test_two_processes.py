"""Two processes that share a model through Gloo, against one: eagerly, and the fused path in the interpreter."""

from pathlib import Path
from typing import Any

import pytest
from conftest import build_model
from ranks_at_work import run_ranks
from tiny_configs import ALL_MIXTURES

FUSED = ["cohere", "gemma2", "llama-bias", "granitemoeshared"]
OTHERS = [
    *("llama", "mistral", "phi3", "qwen3", "granite_swa", "olmo2"),
    *(family for family in ALL_MIXTURES if family not in FUSED),
]
"""On the general path alone: the interpreter takes seconds for each. The tests for GPUs have all fused."""
DIVIDED = [*FUSED, *OTHERS]
REFUSED = {"falcon": "has an attention", "bloom": "has no block program", "bitnet": "has products"}
LIMIT = 1e-5
"""Relative; float32 sums in another order give 6e-7."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    for family in [*DIVIDED, *REFUSED]:
        build_model(family).save_pretrained(folder / family)
    home = str(tmp_path_factory.mktemp("home"))
    return run_ranks("families", folder, TRITON_INTERPRET="1", TEAL_TEST_FUSED=",".join(FUSED), TEAL_HOME=home)


def ways_of(family: str) -> list[str]:
    return ["general", *(["fused"] if family in FUSED else [])]


@pytest.mark.parametrize("family", DIVIDED)
def test_logits_are_those_of_one(family: str, found: dict[str, Any]) -> None:
    assert not isinstance(found[family], str), found[family]
    for way in ("dense", *ways_of(family)):
        assert found[family][way] < LIMIT, way


@pytest.mark.parametrize("family", DIVIDED)
def test_realised_sparsity_is_that_of_one(family: str, found: dict[str, Any]) -> None:
    assert found[family]["realised"] == dict.fromkeys(ways_of(family), True)
    first, *others = found[family]["wide"]
    assert first > 0.2
    assert others == pytest.approx([first] * len(ways_of(family)), abs=1e-12)


@pytest.mark.parametrize("family", DIVIDED)
def test_greedy_texts_are_those_of_one(family: str, found: dict[str, Any]) -> None:
    first, *others = found[family]["texts"]
    assert len(first) == 8
    assert others == [first] * len(ways_of(family))


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_in_one_line(family: str, found: dict[str, Any]) -> None:
    assert REFUSED[family] in found[family]
    assert "\n" not in found[family]


def test_four_ranks_share_two_key_heads(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "llama")
    found = run_ranks("families", tmp_path, count=4, TRITON_INTERPRET="0")["llama"]
    assert max(found["dense"], found["general"]) < LIMIT
    one, four = found["wide"]
    assert four == pytest.approx(one, abs=1e-12)
    assert found["texts"][1] == found["texts"][0]


def test_sums_have_the_same_bits_on_all_ranks_and_in_all_runs(tmp_path: Path) -> None:
    found = run_ranks("sums", tmp_path, TRITON_INTERPRET="1")["Gloo"]
    assert found["alike"]
    assert found["repeats"]
    assert found["error"] < 1e-2  # the interpreter cuts bfloat16 off
    assert found["gathered"] == [0.0, 1.0, 1.0]


def test_a_rank_that_is_silent_is_found(tmp_path: Path) -> None:
    found = run_ranks("silent", tmp_path, TRITON_INTERPRET="1")
    assert found["said"] == "another process of --tensor-parallel has ended or hangs"
    assert found["seconds"] < 30
