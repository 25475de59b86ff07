"""Whatever is wrong in an artefact: one line, or the result of the whole one. No traceback, and no other plan."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibrate_tiny, save_tiny
from safetensors.torch import load_file, save_file

from teal_cli.allocation import make_plan
from teal_cli.atomic import file_digest, sealed
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.export import check_checkpoint, write_checkpoint
from teal_cli.cli import run
from teal_cli.config import ExportConfig
from teal_cli.console import QUIET
from teal_cli.errors import ArtefactError, TealError
from teal_cli.model_source import find_model
from teal_cli.models.weights import tensor_header
from teal_cli.report.artefact_tables import inspect_tables
from teal_cli.report.contents import describe
from teal_cli.report.inputs import read_material
from teal_cli.report.page import Drawings, content_of, render
from teal_cli.report.plots import quality_plots, speed_plots
from teal_cli.steps.artefacts import calibration_for
from teal_cli.steps.inspect import inspect
from teal_cli.workspace import Workspace

_SPREAD = {"median": 10.0, "min": 9.0, "max": 11.0}
_MADE = {"model": "tiny", "device": "a CPU", "dtype": "float32", "versions": {"teal": "0"}, "config": {"model": "m"}}
_EVAL_RUN = {
    "dense_prefix": 32,
    "tokens": 60,
    "sequences": 2,
    "dense": {"perplexity": 9.0, "stderr": 0.1, "bytes_per_token": 4000},
    "sparse": {
        **{"perplexity": 9.5, "stderr": 0.1, "bytes_per_token": 2000, "allocation": "uniform"},
        **{"target_sparsity": 0.5, "realised_sparsity": 0.49, "kl": 0.1, "top1_agreement": 0.9},
    },
    "perplexity_ratio": 1.05,
    "perplexity_ratio_stderr": 0.01,
    "generation": {
        **{"prompts": 1, "prompt_tokens": 4, "new_tokens": 2, "identical": 0.0, "tokens_until_difference": 1.0},
        **{"top1_agreement": 0.5, "dense_text_perplexity": 2.0, "sparse_text_perplexity": 3.0},
        **{"realised_sparsity": 0.5},
        "samples": [{"prompt": "a", "dense": ["b"], "sparse": ["c"], "dense_choices": ["b"], "agrees": [False]}],
    },
    "tasks": {"task": {"dense": {"acc": 0.5}, "sparse": {"acc": 0.4}}},
}
_RESULTS: dict[str, dict[str, Any]] = {
    "eval": {
        **_MADE,
        **{"dataset": "text", "half": "evaluation", "seq_len": 64, "dense_bytes_per_token": 4000},
        **_EVAL_RUN,
        "runs": [_EVAL_RUN],
    },
    "bench": {
        **_MADE,
        **{"batch": 1, "prompt_tokens": 8, "new_tokens": 3, "repeats": 2, "general_because": None},
        "reading_gb_s": 100.0,
        "runs": [
            {
                **{"backend": backend, "allocation": allocation, "sparsity": sparsity, "realised_sparsity": sparsity},
                **{"tokens_per_second": _SPREAD, "speedup": 1.0, "bytes_per_token": 4000, "bandwidth_gb_s": 1.0},
                "limit_tokens_per_second": 100.0,
            }
            for backend, allocation, sparsity in (("dense", None, 0.0), ("reference", "uniform", 0.5))
        ],
        "kernels": [
            {
                **{
                    "out_features": 64,
                    "in_features": 64,
                    "backend": "dense",
                    "sparsity": 0.0,
                    "realised_sparsity": 0.0,
                },
                **{"microseconds": _SPREAD, "gb_s": 1.0, "speedup": 1.0},
            }
        ],
    },
    "generate": {
        **{"model": "tiny", "prompt": "a", "text": "b", "tokens": 1, "tokens_per_second": None},
        **{"target_sparsity": 0.5, "realised_sparsity": 0.5, "finished": "2026-01-31T12:00:00+00:00"},
    },
}


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


_VALUES = [
    *(None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), 1e308, "x", "0.5", "\ud800", "x" * 10_000),
    *([], {}, [1], {"a": 1}, [None], _nested(400), "2026-13-45", "0001-01-01T00:00:00+14:00"),
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from _places(entry, (*path, key))


def _damaged(content: dict[str, Any], seed: int, count: int) -> Iterator[str]:
    """The JSON with a value changed, scaled or taken away; with a bit flipped; or cut short."""
    generator = random.Random(seed)
    places = list(_places(content))
    for number in range(count):
        found = copy.deepcopy(content)
        *above, key = generator.choice(places)
        holder: Any = found
        for part in above:
            holder = holder[part]
        kind = number % 5
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * 10 + 1
        else:
            holder[key] = generator.choice(_VALUES)
        text = json.dumps(found if kind < 3 else content)
        if kind == 3:
            text = text[: generator.randrange(len(text))]
        elif kind == 4:
            where = generator.randrange(len(text))
            text = text[:where] + chr(ord(text[where]) ^ 1 << generator.randrange(5)) + text[where + 1 :]
        yield text


def _holds(read: Callable[[], object], expected: object, text: str) -> bool:
    """Whether reading ends in a line; otherwise it is what it was."""
    try:
        found, line = read(), ""
    except TealError as error:
        found, line = expected, str(error)
    assert found == expected, text
    assert len(line) < 1000
    return line != ""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN of a tiny model: a calibration with everything, two exports, results. Not to be changed."""
    home = tmp_path_factory.mktemp("made")
    model, folder = save_tiny(home / "tiny"), home / "runs" / "tiny"
    calibration = calibrate_tiny(model)
    blocks = {p.name.rpartition(".")[0].rpartition(".")[0]: 7 for p in calibration.projections}
    paths = {block: torch.linspace(0, 0.9, 10)[:, None].expand(10, count) for block, count in blocks.items()}
    calibration = replace(calibration, paths=paths, text=torch.randint(2, 200, (2, 64)))
    calibration_file.save(calibration, folder)
    for sparsity in (0.3, 0.5):
        plan = make_plan(calibration, sparsity, "uniform")
        write_checkpoint(model, plan, calibration, folder / f"uniform-{sparsity:.2f}", "copy")
    for verb, content in _RESULTS.items():
        (folder / f"{verb}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made.parents[1], tmp_path / "own") / "runs" / "tiny"


def _look(folder: Path) -> None:
    """What inspect prints and the report shows."""
    material = read_material(folder)
    found = describe(material)
    assert json.dumps(found)
    assert inspect_tables(found)
    quality_plots(material), speed_plots(material)
    assert render(content_of(material, Drawings([], [], [], {}, []))).encode()


@pytest.mark.parametrize("is_old", [False, True])
def test_calibration(own: Path, is_old: bool) -> None:
    file = own / "calibration.json"
    content = json.loads(file.read_text())
    if is_old:
        del content["content_sha256"]
    model = str(own.parents[1] / "tiny")
    config = ExportConfig(model=model, calibration=own)
    workspace = Workspace.of(config, QUIET)

    def plans() -> list[Any]:
        calibration = calibration_for(config, workspace, QUIET)
        return [make_plan(calibration, 0.5, name) for name in ("uniform", "greedy", "fisher", "fisher-site")]

    expected = plans()
    noticed = 0
    for text in _damaged(content, 1, 100):
        file.write_text(text)
        noticed += _holds(plans, expected, text)
        _holds(lambda: _look(own), None, text)
    assert noticed > (60 if is_old else 95)


@pytest.mark.parametrize("name", ["teal.json", "config.json"])
def test_checkpoint(own: Path, name: str) -> None:
    folder = own / "uniform-0.50"
    file = folder / name
    content = json.loads(file.read_text())
    inner = content if name == "teal.json" else content["quantization_config"]

    def plan() -> Any:
        assert find_model(str(folder)).is_teal_checkpoint
        return check_checkpoint(folder)

    expected = plan()
    for text in _damaged(inner, 2, 150):
        file.write_text(text if inner is content else json.dumps(content)[:-1] + f', "quantization_config": {text}}}')
        _holds(plan, expected, text)
        _holds(lambda: _look(folder), None, text)


@pytest.mark.parametrize("verb", sorted(_RESULTS))
def test_results(own: Path, verb: str) -> None:
    """Inspect and report read results of others."""
    file = own / f"{verb}.json"
    _look(own)
    for text in _damaged(_RESULTS[verb], 3, 100):
        file.write_text(text)
        _holds(lambda: _look(own), None, text)


@pytest.mark.parametrize("broken", [None, [], "teal", {}, {"quant_method": "teall"}, {"quant_method": ["teal"]}])
def test_a_checkpoint_that_lost_its_plan_is_no_dense_model(own: Path, broken: Any, capsys: Any) -> None:
    file = own / "uniform-0.50" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": broken}))
    for verb in (["generate", "--prompt", "x", "--model"], ["calibrate", "--model"], ["info", "--model"], ["inspect"]):
        assert run([*verb, str(file.parent)]) == 3
        assert "quantization_config" in (line := capsys.readouterr().err) or "carries no thresholds" in line


def test_the_plan_of_another_export_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(own / "uniform-0.30" / "config.json", own / "uniform-0.50" / "config.json")
    assert run(["generate", "--model", str(own / "uniform-0.50"), "--prompt", "x", "--max-new-tokens", "4"]) == 3
    assert "but another export's" in capsys.readouterr().err


def _with(calibration: Calibration, part: str, change: Callable[[torch.Tensor], None], run_folder: Path) -> None:
    """A calibration with figures that cannot be, under the right digests."""
    tensors = load_file(run_folder / "calibration.safetensors")
    change(tensors[part])
    save_file(tensors, run_folder / "calibration.safetensors")
    content = json.loads((run_folder / "calibration.json").read_text())
    del content["content_sha256"]
    digest = file_digest(run_folder / "calibration.safetensors")
    (run_folder / "calibration.json").write_text(json.dumps(sealed(content | {"tensors_sha256": digest})))


_SITE, _NAME, _BLOCK = "model.layers.0.mlp_input", "sensitivity/model.layers.0.mlp.up_proj", "greedy/model.layers.0"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (_SITE, lambda t: t.neg_(), "counts nothing, or less"),
        (_SITE, lambda t: t.zero_(), "counts nothing, or less"),
        (_SITE, lambda t: t.fill_(2**60), "counts nothing, or less"),
        (_NAME, lambda t: t.neg_(), "negative or not finite"),
        (_NAME, lambda t: t[3:4].fill_(torch.nan), "negative or not finite"),
        (_BLOCK, lambda t: t[-1].fill_(1.0), "does not rise from 0"),
        (_BLOCK, lambda t: t[1].fill_(torch.nan), "does not rise from 0"),
        (_BLOCK, lambda t: t[-1].fill_(0.1), "does not rise from 0"),
        ("text", lambda t: t.sub_(500), "its text is none"),
        ("text", lambda t: t.add_(10_000), "tokens that the model does not"),
    ],
)
def test_figures_that_cannot_be(own: Path, part: str, change: Any, message: str, capsys: Any) -> None:
    _with(calibration_file.load(own), part, change, own)
    flags = ["--model", str(own.parents[1] / "tiny"), "--calibration", str(own), "--out", "out"]
    assert run(["export", *flags]) == 3
    assert message in capsys.readouterr().err


def test_verify_tells_what_changed(own: Path) -> None:
    """The fingerprint samples 8 KiB of this tensor, which has 75."""
    folder, name = own / "uniform-0.50", "model.embed_tokens.weight"
    file = folder / "model.safetensors"
    raw, header = bytearray(file.read_bytes()), tensor_header(file)
    data = len(raw) - max(entry["data_offsets"][1] for entry in header.values())
    inspect(folder, verify=True)
    raw[data + header[name]["data_offsets"][0] + 5000] ^= 1
    file.write_bytes(raw)
    check_checkpoint(folder)
    with pytest.raises(ArtefactError, match=f"is not what was exported: {name} changed"):
        inspect(own, verify=True)


def test_a_calibration_is_the_earlier_or_the_new_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files cannot be renamed at once: here the process ends before each of its renames."""
    earlier = calibration_file.load(own)
    counts = {site: 2 * found for site, found in earlier.histograms.items()}
    newer = replace(earlier, info=replace(earlier.info, tokens=512), histograms=counts)
    rename = Path.replace
    seen = []
    for stop in range(5):
        calls = iter(range(9))

        def counted(path: Path, target: Path, calls: Iterator[int] = calls, stop: int = stop) -> Path:
            if next(calls) == stop:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", counted)
            calibration_file.save(newer, own)
        found = calibration_file.load(own)
        seen.append(found.info.tokens)
        assert torch.equal(found.histograms[_SITE], (newer if seen[-1] == 512 else earlier).histograms[_SITE])
        calibration_file.save(earlier, own)
        assert calibration_file.load(own).info == earlier.info
        assert not (own / ".calibration.next.safetensors").exists()
    assert seen == [256, 256, 512, 512, 512]


def test_pipes_and_devices_in_a_run_folder(own: Path) -> None:
    os.mkfifo(own / "pipe.json")
    (own / "zero.json").symlink_to("/dev/zero")
    said: list[str] = []
    assert len(read_material(own, say=said.append).results) == 3
    assert len(said) == 2
