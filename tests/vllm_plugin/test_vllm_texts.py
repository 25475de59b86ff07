"""vLLM with the plugin writes what `teal generate` writes: several families, compiled, and by two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_models import PROMPTS, TOKENS, environment, exported, generated, whole

EXPORTS = {
    "one threshold for q, k and v": ("llama", "uniform"),
    "a threshold for each projection, and the output layer": ("llama", "fisher"),
    "biases, and an output layer that is tied": ("llama-bias", "fisher"),
    "other names": ("gpt2", "fisher"),
    "merged in the checkpoint": ("phi3", "uniform"),
}
PATIENCE = 900.0


def by_vllm(models: list[Path], environ: dict[str, str], **options: object) -> list[list[str]]:
    """Texts of each model."""
    request = {"models": list(map(str, models)), "prompts": PROMPTS, "tokens": TOKENS, "options": options}
    script = [sys.executable, str(Path(__file__).with_name("vllm_texts.py"))]
    result = subprocess.run(
        script, input=json.dumps(request), env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return [[whole(text) for text in of_model] for of_model in json.loads(result.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def models(home: Path) -> dict[str, Path]:
    return {what: exported(home, *of) for what, of in EXPORTS.items()}


@pytest.fixture(scope="module")
def texts(models: dict[str, Path], home: Path) -> dict[str, list[str]]:
    """Of the exports, and under `dense` of the first one's dense model. Eager, in one process."""
    environ = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    found = by_vllm([*models.values(), home / "llama"], environ, enforce_eager=True)
    return dict(zip([*models, "dense"], found, strict=True))


@pytest.mark.parametrize("what", EXPORTS)
def test_texts_are_those_of_teal_generate(what: str, models: dict[str, Path], texts: dict[str, list[str]]) -> None:
    assert texts[what] == generated(models[what])


def test_inputs_are_skipped(texts: dict[str, list[str]]) -> None:
    sparse = texts["one threshold for q, k and v"]
    assert all(one != dense for one, dense in zip(sparse, texts["dense"], strict=True))


@pytest.mark.parametrize(
    ("environ", "options"),
    [({}, {}), ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"tensor_parallel_size": 2, "enforce_eager": True})],
    ids=["compiled", "tensor parallel"],
)
def test_the_same_texts_another_way(
    environ: dict[str, str], options: dict[str, object], models: dict[str, Path], texts: dict[str, list[str]]
) -> None:
    what = "a threshold for each projection, and the output layer"
    assert by_vllm([models[what]], environment(**environ), **options) == [texts[what]]
