"""What can be served: an export, a dense model, one that is sparse by itself, a tokenizer without a chat template."""

from pathlib import Path

import openai
import pytest
from conftest import export_tiny, save_tiny
from live_server import serving

from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.steps.generate import Generator


def _generated(model: Path, **options: object) -> str:
    shared = {"model": str(model), "dtype": "float32", "device": "cpu", "max_new_tokens": 8}
    return Generator(GenerateConfig(**shared, **options), QUIET).reply([{"role": "user", "content": "the fox"}]).text


@pytest.mark.parametrize(
    ("kind", "options", "levels", "mode"),
    [
        ("export", {}, [0.0, 0.4], "calibrated"),
        ("dense", {"sparsity": [0.0]}, [0.0], "calibrated"),
        ("relu", {"mode": "intrinsic"}, None, "intrinsic"),
    ],
)
def test_other_models_are_served(tmp_path: Path, kind: str, options: dict, levels: list | None, mode: str) -> None:
    model = save_tiny(tmp_path / "tiny", "opt" if kind == "relu" else "llama")
    if kind == "export":
        model, _ = export_tiny(model, tmp_path / "export", 0.4)
    wanted = _generated(model, **(options | ({"sparsity": 0.0} if kind == "dense" else {})))
    hosts = {"allowed_hosts": ["teal.example"]}
    with serving(model, tmp_path / "runs", context=64, max_new_tokens=32, **options, **hosts) as live:
        served = live.service.served.describe()
        assert served["mode"] == mode
        assert served["chat"] is False
        assert len(served["sparsity"]) == 2 if levels is None else served["sparsity"] == levels
        with live.client() as client:
            asked = {"model": live.name, "max_tokens": 8, "temperature": 0, "prompt": "the fox"}
            found = client.completions.create(extra_headers={"Host": "teal.example"}, **asked)
            assert found.choices[0].text == wanted
            with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
                client.chat.completions.create(model=live.name, messages=[{"role": "user", "content": "x"}])
