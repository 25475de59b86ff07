"""`generate` of a loaded checkpoint uses a cache, without which nothing would run sparse."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import export_tiny, save_tiny
from transformers import AutoModelForCausalLM

import teal_cli.hf  # noqa: F401  (registers the format)
from teal_cli.sparse import control_of

PROMPT = torch.arange(2, 12)[None]


def _without_cache(folder: Path, *files: str) -> None:
    """As training with checkpointing leaves a configuration, nested ones too."""
    for name in files:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {"eos_token_id": 1}
        content["use_cache"] = False
        for inner in content.values():
            if isinstance(inner, dict) and "hidden_size" in inner:
                inner["use_cache"] = False
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("files", [["config.json"], ["config.json", "generation_config.json"]])
def test_use_cache_false_in_a_configuration_does_not_make_it_dense(
    tmp_path: Path, family: str, files: list[str]
) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense", family), tmp_path / "sparse")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(out).generate(PROMPT, **options)
    _without_cache(out, *files)
    model = AutoModelForCausalLM.from_pretrained(out)
    with control_of(model).counting() as counter:
        found = model.generate(PROMPT, **options)
    assert torch.equal(found, expected)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.2)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()).get("use_cache", True)


def test_use_cache_false_of_a_caller_is_dense_and_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(out))
    model.generate(PROMPT, max_new_tokens=2)
    with control_of(model).switched_off():  # dense is what was asked for
        model.generate(PROMPT, max_new_tokens=2, use_cache=False)
    assert not [warning for warning in recwarn if "use_cache" in str(warning.message)]
    with control_of(model).counting() as counter, pytest.warns(UserWarning, match="use_cache=False runs dense"):
        model.generate(PROMPT, max_new_tokens=3, use_cache=False)
    assert counter.model_wide() is None
    model.generation_config.use_cache = False
    with pytest.warns(UserWarning, match="use_cache=False runs dense"):
        model.generate(PROMPT, max_new_tokens=3)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_every_parameter_gets_the_dtype_that_is_asked_for(tmp_path: Path, family: str) -> None:
    """Experts too, whose keys transformers renames: 5.17 leaves those of a checkpoint in float32 as they are."""
    out, _ = export_tiny(save_tiny(tmp_path / "tiny", family), tmp_path / "teal")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[3, 4]])).logits.isfinite().all()
