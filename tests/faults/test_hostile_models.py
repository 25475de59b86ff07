"""Model folders with wrong values in any place end with exit 3 or 4 and one line, or run."""

import json
import random
from pathlib import Path

import pytest
from attack import attack, each_damaged
from conftest import save_tiny

_GENERATE = ("--sparsity", "0", "--prompt", "a quick fox", "--max-new-tokens", "2", "--device", "cpu", "--quiet")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", chat=True)


@pytest.mark.parametrize(
    ("name", "values", "bits"),
    [
        ("config.json", 60, 6),
        ("generation_config.json", 10, 2),
        ("tokenizer_config.json", 12, 3),
        ("tokenizer.json", 16, 4),
        ("model.safetensors", 0, 6),
    ],
)
def test_damage(model: Path, capsys: pytest.CaptureFixture[str], name: str, values: int, bits: int) -> None:
    def then(what: str) -> None:
        outcome = attack(capsys, "generate", "--model", model, *_GENERATE)
        assert outcome.code in (0, 3, 4), what

    each_damaged(model / name, random.Random(name), values=values, bits=bits, then=then)


def _header(model: Path) -> tuple[dict, bytes]:
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(model: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None},
        {"dtype": "F99"},
        {"shape": [-1, 64]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": "64"},
        {"data_offsets": [4, 0]},
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": None},
        {"data_offsets": {"a": 1}},
    ],
    ids=str,
)
def test_weight_headers(model: Path, capsys: pytest.CaptureFixture[str], change: dict) -> None:
    header, data = _header(model)
    header["model.layers.0.self_attn.q_proj.weight"] |= change
    _write(model, header, data)
    assert attack(capsys, "generate", "--model", model, *_GENERATE).code == 3


def test_two_weights_swapped(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tensors of different shapes exchanged: neither is believed."""
    header, data = _header(model)
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    header[first], header[second] = header[second], header[first]
    _write(model, header, data)
    assert attack(capsys, "generate", "--model", model, *_GENERATE).code == 3


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 1 / 0 }}", "{% include 'x' %}", "{{ undefined.x.y }}", "{% for x in %}", "{{ messages[9].content }}"),
        *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 10000000000 }}"),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ raise_exception('\x1b[31mno') }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '%999999999d' | format(1) }}",
    ],
    ids=lambda text: text[:30],
)
def test_chat_templates(model: Path, capsys: pytest.CaptureFixture[str], template: str) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (model / name).is_file():
            (model / name).unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    assert attack(capsys, "generate", "--model", model, *_GENERATE).code in (2, 3)
