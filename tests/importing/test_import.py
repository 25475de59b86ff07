"""`teal import` on folders in the reference's layout, measured here on a tiny model."""

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, calibrate_tiny, save_tiny

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.cli import run

_HOOKED = {
    "self_attn.q_proj": ("self_attn", "h1"),
    "self_attn.o_proj": ("self_attn", "h2"),
    "mlp.gate_proj": ("mlp", "h1"),
    "mlp.down_proj": ("mlp", "h2"),
}
_COLUMNS = ("q", "k", "v", "o", "gate", "up", "down")
_BINS = 1000


def _hidden_states(model: torch.nn.Module) -> dict[tuple[int, str, str], torch.Tensor]:
    found = {}
    for number, block in enumerate(model.model.layers):
        for path, place in _HOOKED.items():
            key = (number, *place)
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, args, key=key: found.__setitem__(key, args[0].flatten())
            )
    with torch.no_grad():
        model(input_ids=torch.randint(2, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(3)))
    return found


def _counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.sort().values
    tail = max(1, len(values) // 100)
    inner = torch.linspace(float(values[tail]), float(values[-tail]), _BINS - 1)
    edges = torch.cat([values[:1], inner, values[-1:]])
    return torch.histogram(values, edges).hist, (edges[:-1] + edges[1:]) / 2


def _published(folder: Path, family: str = "llama") -> dict[tuple[int, str, str], torch.Tensor]:
    """FOLDER/histograms and FOLDER/lookup of a tiny model; what was counted."""
    states = _hidden_states(build_model(family))
    for (number, part, key), x in states.items():
        path = folder / "histograms" / f"layer-{number}" / part / "histograms.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = torch.load(path, weights_only=True) if path.exists() else {}
        content[key], content[f"{key}_centers"] = _counted(x)
        torch.save(content, path)
    for number in range(2):
        path = folder / "lookup" / f"layer-{number}" / "results.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["Effective Sparsity", "Activation Error", "Baseline Error", *_COLUMNS])
            for step in range(1, 20):
                # down goes first and past 1, as steps of the reference may.
                row = [min(0.05 * step, 0.9) for _ in _COLUMNS[:-1]] + [0.08 * step]
                writer.writerow([0.5, 0.1, 0.2, *row])
    return states


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def test_the_calibration_is_that_of_the_files(tiny: Path, tmp_path: Path, capsys) -> None:
    states = _published(tmp_path / "teal")
    assert _teal("import", tmp_path / "teal", "--model", tiny, "--json", "i.json") == 0
    said = capsys.readouterr()
    assert "have no sensitivities" in said.err
    assert f"--allocation {Path('runs/tiny/lookup-0.50.yaml')}" in said.err
    assert "next: teal export --model" in said.err
    found = calibration_file.load(Path("runs/tiny"))
    assert found.info.imported == str(tmp_path / "teal")
    assert found.info.tokens == 512
    assert found.projections == calibrate_tiny(tiny).projections
    for projection in found.projections:
        block, site = projection.site.rsplit(".", 1)
        place = {"attention_input": 0, "attention_output": 1, "mlp_input": 2, "mlp_intermediate": 3}[site]
        x = states[int(block.rsplit(".", 1)[1]), *list(_HOOKED.values())[place]]
        values = x.sort().values
        width = float(values[-len(x) // 100] - values[len(x) // 100]) / (_BINS - 2)
        exact = float(x.abs().quantile(0.5))
        assert found.threshold(projection, 0.5) == pytest.approx(exact, abs=width + exact / 256)
    result = json.loads(Path("i.json").read_text())
    assert (result["imported"], result["tokens"]) == (str(tmp_path / "teal"), 512)
    assert result["allocations"] == ["runs/tiny/lookup-0.50.yaml"]


def test_the_chain_goes_on_from_it(tiny: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    _published(tmp_path / "teal")
    assert _teal("import", tmp_path / "teal", "--model", tiny, "--sparsity", "0.3,0.5,0.125") == 0
    assert Path("runs/tiny/lookup-0.125.yaml").is_file()
    capsys.readouterr()
    assert _teal("export", "--model", tiny, "--sparsity", 0.3) == 0
    said = capsys.readouterr().err
    assert "allocation greedy in place of fisher" in said
    assert "which does not hold the text" in said
    assert Path("runs/tiny/greedy-0.30/config.json").is_file()
    flags = ("--text", corpus, "--tokens", 256, "--seq-len", 64, "--json", "v.json")
    assert _teal("eval", "--model", tiny, "--allocation", "runs/tiny/lookup-0.30.yaml,uniform", *flags) == 0
    by_lookup, uniform = json.loads(Path("v.json").read_text())["runs"]
    # Random tokens were counted and English is read: near, but not the same.
    assert by_lookup["sparse"]["realised_sparsity"] == pytest.approx(0.3, abs=0.08)
    assert uniform["sparse"]["realised_sparsity"] == pytest.approx(0.5, abs=0.08)
    assert _teal("export", "--model", tiny, "--allocation", "fisher") == 2
    assert "has no sensitivities" in capsys.readouterr().err
    assert _teal("export", "--model", tiny, "--recalibrate") == 3
    generate = ("generate", "--model", tiny, "--sparsity", 0.3, "--prompt", "the stars", "--max-new-tokens", 2)
    capsys.readouterr()
    assert _teal(*generate) == 0
    assert "exporting it" not in capsys.readouterr().err
    assert _teal(*generate, "--recalibrate") == 3


def test_the_lookup_is_optional_and_may_end_early(tiny: Path, tmp_path: Path, capsys) -> None:
    _published(tmp_path / "teal")
    assert _teal("import", tmp_path / "teal", "--model", tiny, "--sparsity", 0.97) == 2
    assert "does not reach sparsity 0.97: the path ends at 0.9" in capsys.readouterr().err
    assert not Path("runs").exists()
    shutil.rmtree(tmp_path / "teal" / "lookup")
    assert _teal("import", tmp_path / "teal" / "histograms", "--model", tiny) == 0
    assert sorted(path.name for path in Path("runs/tiny").iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
    ]
    capsys.readouterr()
    assert _teal("export", "--model", tiny) == 0
    assert "allocation uniform in place of fisher" in capsys.readouterr().err


def _fails(capsys, code: int, message: str, *arguments: object) -> None:
    capsys.readouterr()
    assert _teal(*arguments) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teal: ")]
    assert message in line
    assert not list(Path().rglob("calibration*"))


def test_histograms_of_another_model(tiny: Path, tmp_path: Path, capsys) -> None:
    """As the published ones of Llama-3-8B, which are Llama-2-7B's: same layers, same hidden state, another MLP."""
    config = json.loads((tiny / "config.json").read_text())
    _published(tmp_path / "teal")
    models = Path("configs/models")
    models.mkdir(parents=True)
    shape = "{model_type: llama, hidden_size: 64, intermediate_size: 100, num_hidden_layers: 2}"
    (models / "whose.yaml").write_text(f"hub_id: a/b\nshape: {shape}\n")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    message = "layers.0.mlp_intermediate would be 100 wide, and is 96; whose would fit"
    _fails(capsys, 3, message, "import", tmp_path / "teal", "--model", other)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    _fails(capsys, 3, "has 2 layers and the model 3", "import", tmp_path / "teal", "--model", other)
    assert _teal("import", tmp_path / "teal", "--model", tiny) == 0
    assert "could as well be those of whose" in capsys.readouterr().err


def test_damaged_files(tiny: Path, tmp_path: Path, capsys) -> None:
    teal = tmp_path / "teal"
    _fails(capsys, 3, "name a folder of TEAL's histograms", "import", tmp_path, "--model", tiny)
    _published(teal)
    path = teal / "histograms/layer-1/mlp/histograms.pt"
    content = torch.load(path, weights_only=True)
    for damaged, message in (
        ({**content, "h2": content["h2"][:-1]}, "counts of (999,)"),
        ({key: value for key, value in content.items() if key != "h2_centers"}, "h2_centers"),
        ([1, 2], "cannot be read"),
    ):
        torch.save(damaged, path)
        _fails(capsys, 3, message, "import", teal, "--model", tiny)
    path.write_bytes(b"no archive")
    _fails(capsys, 3, "cannot be read", "import", teal, "--model", tiny)
    torch.save(content, path)
    table = teal / "lookup/layer-1/results.csv"
    text = table.read_text()
    for damaged, message in (
        (text.replace("gate", "gates"), "no column 'gate'"),
        (text.replace("0.2,0.05", "0.2,0.95"), "a path that rises from 0"),
        (text.replace("0.2,0.05", "0.2,much"), "could not convert"),
        (text + "0.9\n", "cannot be read"),
        (text + "9" * 200_000, "field larger than field limit"),
    ):
        table.write_text(damaged)
        _fails(capsys, 3, message, "import", teal, "--model", tiny)
    for pipe in (table, path):  # which would be waited for
        pipe.unlink()
        os.mkfifo(pipe)
        _fails(capsys, 3, f"{pipe} is not an ordinary file", "import", teal, "--model", tiny)


def test_a_file_that_unpacks_to_much(tiny: Path, tmp_path: Path, capsys) -> None:
    """torch stores its parts as they are; a few bytes that stand for many would fill the memory."""
    teal = tmp_path / "teal"
    _published(teal)
    file = next((teal / "histograms").rglob("histograms.pt"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(70 << 20))
    assert file.stat().st_size < 1 << 20
    _fails(capsys, 3, "unpacks to 73,400,320 bytes", "import", teal, "--model", tiny)


def test_artefacts_of_before_imports_still_count(tiny: Path, corpus: Path, capsys) -> None:
    """They lack `imported` and a digest: the calibration is read, and its export is not made again."""
    flags = ["--dataset", corpus, "--tokens", 256, "--seq-len", 64]
    assert _teal("calibrate", "--model", tiny, *flags) == 0
    assert _teal("export", "--model", tiny) == 0
    for path in (Path("runs/tiny/calibration.json"), Path("runs/tiny/fisher-0.50/teal.json")):
        content = json.loads(path.read_text())
        del content.get("calibration", content)["imported"], content["content_sha256"]
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert _teal("generate", "--model", tiny, "--sparsity", 0.5, "--prompt", "a", "--max-new-tokens", 2) == 0
    assert "exporting it" not in capsys.readouterr().err
    assert calibration_file.load(Path("runs/tiny")).info.imported == ""


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_run(tiny: Path, tmp_path: Path, capsys) -> None:
    _published(tmp_path / "teal")
    torch.save({"h1": _Evil()}, tmp_path / "teal/histograms/layer-0/mlp/histograms.pt")
    wanted = "histograms.pt cannot be read: it holds more than tensors, and teal unpickles nothing else"
    _fails(capsys, 3, wanted, "import", tmp_path / "teal", "--model", tiny)
    assert not Path("executed").exists()


def test_a_measured_calibration_stays(tmp_path: Path, capsys) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    _published(tmp_path / "teal")
    calibration_file.save(calibrate_tiny(tiny), Path("runs/tiny"))
    assert _teal("import", tmp_path / "teal", "--model", tiny) == 3
    assert "was measured, and knows more: give another --out" in capsys.readouterr().err
    assert calibration_file.load(Path("runs/tiny")).sensitivities
    assert _teal("import", tmp_path / "teal", "--model", tiny, "--out", "other") == 0
    assert _teal("import", tmp_path / "teal", "--model", tiny, "--out", "other") == 0
