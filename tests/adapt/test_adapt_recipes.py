"""What every recipe has, and models of other kinds."""

from pathlib import Path

import pytest
from conftest import save_tiny, write_corpus
from safetensors import safe_open

from teal_cli.adapt.recipes import recipe_class
from teal_cli.cli import run
from teal_cli.config.recipes import RecipeOptions, options_of, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_class_and_its_options(name: str) -> None:
    assert recipe_class(name).name == name
    options = options_of(name)
    assert issubclass(options, RecipeOptions)
    options()  # each has a default
    assert all(field.description for field in options.model_fields.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_other_kinds_of_layers_are_written_under_their_keys(tmp_path: Path, family: str) -> None:
    """Experts, which transformers renames, and layers that hold their weights the other way round."""
    dense, corpus = save_tiny(tmp_path / "tiny", family), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--quiet"]
    assert run(["calibrate", *text, "--tokens", "128", "--seq-len", "64"]) == 0
    size = ["--tokens", "128", "--seq-len", "32", "--batch-size", "2", "--held-out-tokens", "32", "--patience", "0"]
    assert run(["adapt", *text, *size, "--learning-rate", "1e-2", "--out", "out"]) == 0
    keys = []
    for folder in (dense, Path("out")):
        with safe_open(folder / "model.safetensors", "pt") as file:
            keys.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118  (no mapping)
    assert keys[0] == keys[1]
    assert run(["generate", "--model", "out", "--prompt", "the", "--max-new-tokens", "2", "--quiet"]) == 0
