"""Never worse: where sparse steps are slower than dense ones, `auto` decodes dense and says so."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_family, build_model, export_tiny, save_tiny
from fused_pair import half_plan, random_tokens, use_small_tiles

from teal_cli.cli import run
from teal_cli.config import ServeConfig
from teal_cli.console import Reporter
from teal_cli.decode import choice
from teal_cli.decode.choice import Choice
from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import DENSE
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.sparse import apply_plan_, sparse_layers, sparsify_
from teal_cli.steps.serve import load

GREEDY = SamplingConfig()
LINE = "sparse decoding took 1.9 ms a token, dense 0.8: decoding dense (--backend cpu decodes sparse all the same)"


class Clock:
    """In place of the real times: seconds of a sparse and of a dense step, and how many were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float) -> None:
        self.sparse, self.dense, self.steps = sparse, dense, 0
        monkeypatch.setattr(choice, "seconds_of", self._seconds)
        monkeypatch.setattr(choice, "LEAST_BYTES", 0)

    def _seconds(self, work: Any, device: torch.device) -> float:
        work()
        self.steps += 1
        # The first is slow, as a compiler is, and one is disturbed: neither may decide.
        disturbed = 100.0 if self.steps in (1, 2, 7) else 0.0
        return disturbed + (self.sparse if work.__self__._engine.control.decodes_sparse else self.dense)


def _sparse(never_worse: bool = True) -> Engine:
    model = build_family("llama")
    sparsify_(model, half_plan(model))
    return Engine(model, path="general", never_worse=never_worse)


def _text(engine: Engine) -> list[int]:
    return list(engine.generate(random_tokens(1, 16), max_new_tokens=8, sampling=GREEDY))


def test_slower_sparse_steps_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, sparse=0.0019, dense=0.0008)
    engine = _sparse()
    assert engine.control is not None
    with engine.control.counting() as counter:
        written = _text(engine)
    assert counter.model_wide() is None
    assert written == _text(Engine(build_model("llama"), path="general"))
    assert written != _text(_sparse(never_worse=False))
    assert engine.choose(random_tokens(1, 16)) == Choice("dense", "cpu", 0.0019, 0.0008)
    assert engine.choose(random_tokens(1, 16)).line == LINE
    assert engine.control.decodes_sparse  # nothing is left switched


def test_faster_sparse_steps_are_taken_and_noise_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, sparse=1.0, dense=2.0)
    engine = _sparse()
    assert _text(engine) == _text(_sparse(never_worse=False))
    assert engine.choose(random_tokens(1, 16)).line is None
    for sparse, decodes in ((1.04, "sparse"), (1.06, "dense")):
        clock.sparse, clock.dense = sparse, 1.0
        assert choice.choose(engine, random_tokens(1, 16)).decodes == decodes


def test_slower_tokens_of_the_fused_path_are_not_taken(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tuning tables say of products."""
    Clock(monkeypatch, sparse=1.06, dense=1.0)
    use_small_tiles(monkeypatch)
    engine = Engine(_sparse().model, path="fused", never_worse=True)
    assert engine.choose(random_tokens(1, 16)).decodes == "dense"


def test_it_is_measured_once_for_a_plan_and_a_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, sparse=1.0, dense=2.0)
    engine = _sparse()
    once = 2 * (choice.REPEATS + 1)
    for _ in range(2):
        _text(engine)
    assert clock.steps == once
    engine.choose(random_tokens(3, 16))
    assert clock.steps == 2 * once
    apply_plan_(engine.model, half_plan(engine.model, 1.5))
    engine.choose(random_tokens(3, 16))
    assert clock.steps == 3 * once


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0008, "0.8"), (0.9994, "999"), (0.9999, "1000"), (1.0, "1000"), (12.3456, "12346")]
)
def test_milliseconds_have_no_exponent(seconds: float, said: str) -> None:
    line = Choice("dense", "cpu", seconds, 0.0001).line
    assert line is not None
    assert f"sparse decoding took {said} ms a token" in line


@pytest.mark.parametrize("what", ["small", "switched off", "short context", "dense model"])
def test_where_nothing_is_measured(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, sparse=2.0, dense=1.0)
    engine, expected = _sparse(), Choice("sparse")
    assert engine.control is not None
    if what == "small":
        size = sum(layer.weight.nbytes for layer in sparse_layers(engine.model).values())
        monkeypatch.setattr(choice, "LEAST_BYTES", size + 1)
    elif what == "switched off":
        engine.control.enabled, expected = False, Choice("dense")
    elif what == "short context":
        engine.model.config.max_position_embeddings = choice.PROMPT + choice.REPEATS
    else:
        engine, expected = Engine(build_model("llama"), never_worse=True), Choice("dense")
    assert engine.choose(random_tokens(1, 16)) == expected
    assert clock.steps == 0


def test_a_layer_that_is_really_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true clock."""
    monkeypatch.setattr(choice, "LEAST_BYTES", 0)
    engine = _sparse()
    control = engine.control
    assert control is not None

    def dawdle(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        if control.decodes_sparse and args[0].shape[-2] == 1:
            time.sleep(0.004)

    for layer in sparse_layers(engine.model).values():
        layer.register_forward_pre_hook(dawdle)
    found = engine.choose(random_tokens(1, 16))
    assert found.decodes == "dense"
    assert found.sparse_seconds is not None
    assert found.sparse_seconds > 14 * 0.004


def _generate(folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["generate", "--model", str(folder), "--prompt", "the stars", "--max-new-tokens", "4"]
    assert run([*arguments, "--json", "g.json", *more]) == 0
    found: dict[str, Any] = json.loads(Path("g.json").read_text())
    return found


def test_generate_says_what_it_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    Clock(monkeypatch, sparse=0.0019, dense=0.0008)
    reply = _generate(out)
    assert (reply["decodes"], reply["realised_sparsity"]) == ("dense", None)
    assert capsys.readouterr().err.count(LINE) == 1
    reply = _generate(out, "--backend", "cpu")  # asked for by name: as asked
    assert reply["decodes"] == "sparse"
    assert reply["realised_sparsity"] > 0.3
    assert "decoding dense" not in capsys.readouterr().err
    reply = _generate(out, "--sparsity", "0")
    assert reply["decodes"] == "dense"
    assert "decoding dense" not in capsys.readouterr().err


def test_bench_measures_what_was_asked_and_says_what_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    Clock(monkeypatch, sparse=0.0019, dense=0.0008)
    arguments = ["bench", "--model", str(out), "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"]
    for more, decodes in (([], ["dense", "dense"]), (["--backend", "cpu"], ["dense", "sparse"])):
        assert run([*arguments, "--json", "b.json", *more]) == 0
        runs = json.loads(Path("b.json").read_text())["runs"]
        assert [entry["decodes"] for entry in runs] == decodes
        assert runs[1]["realised_sparsity"] > 0.3
        assert (LINE in capsys.readouterr().err) == (not more)


@pytest.mark.parametrize(
    ("more", "default", "measured"),
    [({}, DENSE, True), ({"sparsity": [0.5]}, 0.5, False), ({"backend": "cpu"}, 0.5, False)],
    ids=["auto", "a level by name", "a backend by name"],
)
def test_serve_says_what_it_decodes_by_default(
    more: dict[str, Any],
    default: float,
    measured: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    clock = Clock(monkeypatch, sparse=0.0019, dense=0.0008)
    config = ServeConfig(model=str(out), dtype="float32", device="cpu", **more)
    assert load(config, Reporter()).scheduler.levels.default == default
    assert ((LINE in capsys.readouterr().err), clock.steps > 0) == (measured, measured)
