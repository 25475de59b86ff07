"""The packaged recipes run from end to end: on a tiny model, on little text, with everything else as they say."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny

from teal_cli.cli import run
from teal_cli.config_files import recipe_names
from teal_cli.resources import CONFIGS

_LESS = {
    "calibrate": {"tokens": 256, "seq_len": 64, "sensitivity_tokens": 128, "batch_size": 2},
    "eval": {"tokens": 256, "seq_len": 64, "prompt_tokens": 8, "new_tokens": 4},
    "adapt": {
        "tokens": 512,
        "seq_len": 32,
        "batch_size": 2,
        "accumulate": 1,
        "held_out_tokens": 128,
        "evaluate_every": 4,
    },
    "bench": {"new_tokens": 3, "prompt_tokens": 8, "repeats": 1},
    "generate": {"max_new_tokens": 4},
}


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe(name: str, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    stages = recipe.get("stages", ["calibrate", "export", "eval", "bench", "generate"])
    for section, values in _LESS.items():
        if section in stages:
            recipe[section] = {**recipe.get(section, {}), **values}
            if "dataset" in recipe[section]:
                recipe[section]["dataset"] = str(corpus)
    if "eval" in stages:
        recipe["eval"]["dataset"] = str(corpus)
    recipe["model"] = str(save_tiny(tmp_path / "tiny", chat=True))
    Path("less.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["run", "less.yaml", "--device", "cpu", "--json", "r.json"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert list(result) == stages
    made = result["adapt" if "adapt" in stages else "export"]
    if "export" in stages:
        assert made["target_sparsity"] == recipe["sparsity"]
        assert made["propagated"] is (name != "llama-3-70b")
        assert 0.2 < result["generate"]["realised_sparsity"] < 0.8
        assert f"next: teal generate --model {made['folder']}" in capsys.readouterr().err
    assert (Path(made["folder"]) / "config.json").is_file()


def test_a_recipe_goes_on_from_measures_that_are_no_number(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has null for infinity."""
    model = save_tiny(tmp_path / "tiny")
    Path("r.yaml").write_text(
        f"model: {model}\nstages: [calibrate, eval]\ndataset: {corpus}\ntokens: 256\nseq_len: 64\ndevice: cpu\n"
    )
    assert run(["run", "r.yaml", "--quiet"]) == 0
    file = Path("runs/tiny/eval.json")
    content = json.loads(file.read_text())
    for entry in [content, *content["runs"]]:
        entry["sparse"]["perplexity"] = entry["perplexity_ratio"] = None
    file.write_text(json.dumps(content))
    assert run(["run", "r.yaml"]) == 0
    assert "nan" in capsys.readouterr().out
