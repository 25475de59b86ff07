"""Adapting a model whose blocks lie on several devices; here they are all the CPU, with hooks between them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from conftest import build_model, save_tiny

from teal_cli.adapt.hidden import hidden_loss
from teal_cli.checkpoint.adapted import read_record
from teal_cli.cli import run
from teal_cli.config import AdaptConfig
from teal_cli.console import Reporter
from teal_cli.errors import MachineError
from teal_cli.models.loading import check_memory
from teal_cli.models.offload import is_spread, spread_
from teal_cli.sparse import replace_projections_
from teal_cli.steps import adapt

SIZE = ["--tokens", "512", "--seq-len", "32", "--batch-size", "2", "--held-out-tokens", "64"]


@pytest.mark.parametrize(
    "flags",
    [(), ("--lora", "2"), ("--lora", "2", "--recompute", "--text-weight", "1"), ("--options", "vectors=true")],
    ids=["weights", "adapters", "recomputed", "vectors"],
)
def test_it_learns_what_it_does_on_one_device(
    flags: tuple[str, ...], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    spread: list[bool] = []

    def hooked(model: Any, *, to_train: bool) -> None:
        names = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
        dispatch_model(model, device_map=dict.fromkeys(names, "cpu"), force_hooks=True, main_device="cpu")
        spread.append(to_train)

    monkeypatch.setattr("teal_cli.steps.adapt.spread_", hooked)
    text = ["--model", str(tiny), "--dataset", str(corpus), "--dtype", "float32", "--quiet"]
    assert run(["calibrate", *text, "--tokens", "256", "--seq-len", "64"]) == 0
    curves = []
    for where in ("one", "auto"):
        place = ["--device-map", where, "--out", where]
        assert run(["adapt", *text, *SIZE, "--learning-rate", "2e-3", *flags, *place]) == 0
        curves.append(read_record(Path(where)).curve)
    # The dense model, which is the teacher where all weights train, and the student; else it comes back at the end.
    assert spread == [True, True] + [True] * bool(flags)
    assert curves[0] == curves[1]
    weights = [Path(where, "model.safetensors").read_bytes() for where in ("one", "auto")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--recipe", "relu"), "does not go with recipe relu"),
        (("--dataset", "self"), "does not go with dataset self"),
        (("--device", "cpu"), "does not go with device cpu"),
    ],
)
def test_what_it_does_not_go_with(
    flags: tuple[str, ...], reason: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["adapt", "--model", str(tiny), "--device-map", "auto", *flags]) == 2
    assert reason in capsys.readouterr().err


def test_stacked_experts_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = save_tiny(tmp_path / "experts", "mixtral")
    assert run(["adapt", "--model", str(experts), "--device-map", "auto"]) == 2
    assert "does not know stacked experts" in capsys.readouterr().err


def test_all_devices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.models.loading.available_bytes", lambda device: 1 << 30)
    two = [torch.device("cuda", number) for number in range(2)]
    check_memory(3 << 29, two, "this run")
    with pytest.raises(Exception, match=r"needs 3.0 GiB and 2 of cuda have 2.0 GiB free"):
        check_memory(3 << 30, two, "this run")


def test_it_is_spread_over_more_than_one_device() -> None:
    model = build_model("llama")
    spread_(model, {"": "cpu"}, to_train=True)
    assert not is_spread(model)
    model.hf_device_map = {"a": 0, "b": 1}
    assert is_spread(model)


def test_blocks_of_student_and_teacher_may_lie_elsewhere() -> None:
    """The meta device is another one, though nothing is computed there."""
    here, there = torch.ones(1, 2, 4), torch.ones(1, 2, 4, device="meta")
    assert hidden_loss([there, here], [here, here]).is_meta
    assert float(hidden_loss([here, 2 * here], [here, here])) == 0.5


def test_a_sparse_output_layer_is_given_its_input_where_its_weights_are() -> None:
    """Tied to the embedding it lies on the first device, and the last block on another."""
    model = build_model("llama-bias")
    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True, main_device="cpu")
    model.lm_head.to("meta")._hf_hook.execution_device = "meta"
    replace_projections_(model, ["lm_head"])
    assert model.lm_head(torch.ones(1, 2, model.config.hidden_size)).is_meta


def test_a_model_that_fits_beside_but_not_by_blocks_is_compared_with_from_main_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the run would fail once it is trained, and again whenever it is taken up."""
    model, asked = build_model("llama"), AdaptConfig(model="tiny", device_map="auto", dtype="float32")
    workspace: Any = SimpleNamespace(architecture=lambda config: None, source=SimpleNamespace(folder=Path("tiny")))

    def full(*args: Any) -> Any:
        raise MachineError("out of memory")

    offloaded: list[Any] = []
    monkeypatch.setattr(adapt, "_load", full)
    monkeypatch.setattr(adapt, "_stored", lambda workspace: "float32")
    monkeypatch.setattr(adapt, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(adapt, "devices", lambda device: [device])
    monkeypatch.setattr(adapt, "available_bytes", lambda device: 1 << 60)
    monkeypatch.setattr(adapt, "load_model", lambda *args, **kwargs: model)
    monkeypatch.setattr(adapt, "offload_", lambda model, device: offloaded.append(model))
    assert adapt._load_beside(model, asked, workspace, Reporter(quiet=True)) is model
    assert offloaded == [model]
