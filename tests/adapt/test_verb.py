"""`teal adapt` through the command line: what it writes is a model like any other, and says what it came from."""

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import calibrate_once, copied, fails
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from warm import environment, warm

import teal_cli
import teal_cli.hf
from teal_cli.adapt import memory
from teal_cli.adapt.fitted import fit_bytes, tokens_of_fit
from teal_cli.adapt.loop import Run
from teal_cli.adapt.recipe import Added, Setting
from teal_cli.adapt.recipes.lte import Lte
from teal_cli.checkpoint.adapted import read_record
from teal_cli.cli import run
from teal_cli.config import AdaptConfig
from teal_cli.config.recipes.lte import Options
from teal_cli.console import Reporter
from teal_cli.errors import MachineError
from teal_cli.models import loading
from teal_cli.models.aliases import require_alias
from teal_cli.report.inputs import read_material
from teal_cli.report.page import Drawings, content_of, render
from teal_cli.report.training import training_plots
from teal_cli.steps import adapt as step
from teal_cli.steps.run import _whole
from teal_cli.workspace import Workspace

_SIZE = ("--tokens", 512, "--seq-len", 32, "--batch-size", 4, "--held-out-tokens", 64, "--evaluate-every", 2)


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("calibrated"), chat=False)


@pytest.fixture
def dense(home: Path, tmp_path: Path) -> Path:
    return copied(home, tmp_path)


def _adapt(dense: Path, corpus: Path, *flags: object) -> int:
    return _teal("adapt", "--model", dense, "--dataset", corpus, "--sparsity", 0.6, "--quiet", *_SIZE, *flags)


def _eval(folder: Path, corpus: Path) -> dict:
    size = ("--tokens", 128, "--seq-len", 64, "--quiet", "--json", "eval.json")
    assert _teal("eval", "--model", folder, "--text", corpus, *size) == 0
    return _json(Path("eval.json"))


def test_what_comes_out_is_a_checkpoint_compared_with_the_original(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learning = ("--learning-rate", "5e-3", "--text-weight", 5)  # of random weights, the text teaches the most
    assert _adapt(dense, corpus, *learning, "--patience", 0, "--json", "a.json") == 0
    folder = Path("runs/tiny/recover-0.60")
    assert [each.name for each in folder.parent.iterdir() if "recover" in each.name] == [folder.name]
    assert _keys(folder) == _keys(dense)
    record = read_record(folder)
    assert _json(Path("a.json"))["folder"] == str(folder)
    assert (record.recipe, record.tokens, record.steps) == ("recover", 512, 4)
    assert record.best["step"] > 0
    assert record.source.folder == str(dense.resolve())
    assert [used.dataset for used in record.text] == [str(corpus)]
    assert record.after.realised_sparsity == pytest.approx(0.6, abs=0.08)
    assert record.after.bytes_per_token < record.after.dense_bytes_per_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(8).view(1, -1)
    assert not torch.allclose(model(ids).logits, AutoModelForCausalLM.from_pretrained(dense)(ids).logits, atol=1e-2)
    unread = Path(shutil.copy(corpus, "unread.txt"))  # by neither, so that all of it is evaluated
    own, found = _eval(dense, unread), _eval(folder, unread)
    assert found["compared_with"] == "tiny"
    assert found["dense"]["perplexity"] == pytest.approx(own["dense"]["perplexity"], rel=1e-4)
    assert _teal("generate", "--model", folder, "--prompt", "the", "--max-new-tokens", 4, "--quiet") == 0
    assert _teal("inspect", folder, "--verify", "--quiet") == 0
    capsys.readouterr()
    shutil.move(dense, dense.with_name("away"))
    assert _teal("eval", "--model", folder, "--text", corpus, "--tokens", 128, "--seq-len", 64) == 0
    assert "neither in" in capsys.readouterr().err


def test_vectors_become_biases(dense: Path, corpus: Path) -> None:
    assert _adapt(dense, corpus, "--options", "vectors=true", "--out", "out") == 0
    new = _keys(Path("out")) - _keys(dense)
    assert {name.rpartition(".")[2] for name in new} == {"bias"}
    assert _json(Path("out/config.json"))["mlp_bias"] is True
    assert _teal("generate", "--model", "out", "--prompt", "the", "--max-new-tokens", 4, "--quiet") == 0


def test_from_python_with_adapters(dense: Path, corpus: Path) -> None:
    summary = teal_cli.adapt_model(
        dense, lora=2, sparsity=0.6, dataset=str(corpus), tokens=256, seq_len=32, batch_size=4, held_out_tokens=32
    )
    assert summary.folder == "runs/tiny/recover-0.60-lora2"
    assert _keys(Path(summary.folder)) == _keys(dense)
    assert summary.record.steps == 2


def test_a_recipe_runs_it_once_and_measures_what_it_made(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"tokens": 256, "seq_len": 32, "batch_size": 4, "held_out_tokens": 64}
    stages = {
        "adapt": {"dataset": str(corpus), "sparsity": 0.6, **size},
        "eval": {"dataset": str(corpus), "tokens": 128, "seq_len": 64},
    }
    recipe = {"model": str(dense), "stages": ["adapt", "eval"], **stages}
    Path("recipe.json").write_text(json.dumps(recipe))
    Path("recipe.yaml").write_text(Path("recipe.json").read_text())  # JSON is YAML
    assert _teal("run", "recipe.yaml", "--json", "r.json") == 0
    result = _json(Path("r.json"))
    assert result["eval"]["model"] == "recover-0.60"
    assert result["eval"]["compared_with"] == "tiny"
    assert result["eval"]["runs"][0]["sparse"]["allocation"] == "recover, fisher"
    capsys.readouterr()
    assert _teal("run", "recipe.yaml") == 0
    assert capsys.readouterr().err.count("done before, kept") == 2
    config, stage = AdaptConfig(model=str(dense)), Path("runs/tiny/adapt.json")
    workspace = Workspace.of(config, Reporter(quiet=True))
    assert _whole("adapt", config.model_copy(update={"out": Path("elsewhere")}), workspace, stage)
    changed = Path("changed.json")
    changed.write_text(json.dumps({**_json(stage), "seconds": 1.5}))  # of a later run in its place
    assert not _whole("adapt", config, workspace, changed)
    material = read_material(Path("runs/tiny"))
    page = render(content_of(material, Drawings([], [], training_plots(material), {}, [])))
    assert 'id="training"' in page
    after = result["adapt"]["after"]
    assert f"{after['perplexity_ratio']:.3f} times dense" in page  # in the table
    assert f"recover-0.60 after: {after['perplexity_ratio']:.3f} at " in page  # in the words of the plot


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipe", "recove"), "did you mean 'recover'?"),
        (("--options", "gradients=masked"), "recipe recover has no option 'gradients'; did you mean 'gradient'?"),
        (("--options", "gradient=none"), "options (flag --options): gradient: "),
        (("--options", "vectors=true", "--lora", 4), "leave out lora (flag --lora)"),
        (("--tokens", 16), "is less than one step"),
        (("--held-out-tokens", 8), "is less than one sequence"),
        (("--dataset", "sotu=0"), "a number above 0"),
        (("--quantise", "int8"), "adapt it first, then quantise"),
        (("--recipe", "prosparse", "--sparsity", 0.5), "sparsity (flag --sparsity) has no part in recipe prosparse"),
        (("--recipe", "lte", "--options", "group=4", "--dense-prefix", 2), "dense_prefix (flag --dense-prefix) has no"),
        (("--recipe", "relu", "--allocation", "greedy"), "allocation (flag --allocation) has no part in recipe relu"),
        (("--recipe", "relu", "--no-recalibrate"), "recalibrate (flag --recalibrate) has no part in recipe relu"),
        (("--recipe", "prosparse", "--options", "zeros=0.8,growth=fixed"), "leave out option growth"),
        (("--recipe", "lte", "--options", "routers=random,eta=2"), "leave out option eta"),
        (("--recipe", "lte", "--options", "soft=0.3"), "leave out option soft, or take routers=learned"),
        (("--recipe", "lte", "--options", "shares=even,eta=2"), "even shares are steered: leave out option eta"),
        (("--dataset", "a=1,a=3"), "names a dataset twice"),
    ],
)
def test_wrong_options_are_refused(
    dense: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    fails(capsys, 2, message, "adapt", "--model", dense, *_SIZE, *flags)


def test_nothing_else_is_replaced(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("kept")
    fails(capsys, 3, "is no adapted model", "adapt", "--model", dense, "--dataset", corpus, *_SIZE, "--out", "mine")
    assert Path("mine/notes.txt").read_text() == "kept"


def test_memory_is_checked_before_anything_is_loaded(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda device: 300 << 20)
    fails(capsys, 4, "GiB free; adapters need less", "adapt", "--model", dense, "--dataset", corpus, "--batch-size", 64)


def test_estimate_counts_what_trains(dense: Path) -> None:
    empty = loading.outline(dense)
    size = {"tokens": 128, "recompute": False, "activation_itemsize": 4, "device": torch.device("cpu")}
    counts = [memory.trained_parameters(empty, lora=lora, frozen=bool(lora)) for lora in (0, 2)]
    whole = memory.estimate(empty, trained=counts[0], frozen_itemsize=4, teacher_itemsize=4, **size)
    adapters = memory.estimate(empty, trained=counts[1], frozen_itemsize=4, teacher_itemsize=0, **size)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    embeddings = empty.get_input_embeddings().weight.numel() + empty.get_output_embeddings().weight.numel()
    assert counts[0] == parameters - embeddings
    assert whole.training == 12 * counts[0]
    assert whole.teacher == 4 * parameters
    assert adapters.training == 12 * counts[1] < whole.training / 4
    assert adapters.teacher == 0
    assert whole.checkpoints == 20 * counts[0]


def test_an_estimate_asks_the_recipe_whether_it_is_its_own_teacher(
    dense: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def keep(estimate: memory.Estimate, device: torch.device) -> None:
        found.append(estimate)
        raise MachineError("enough")

    monkeypatch.setattr(memory, "require", keep)
    for recipe in (("lte", "--options", "group=4"), ("drelu",)):
        _teal("adapt", "--model", dense, "--dataset", corpus, *_SIZE, "--lora", 2, "--recipe", *recipe)
    assert found[0].teacher > 0
    assert found[1].teacher == 0


def test_an_estimate_counts_routers_and_their_fits(dense: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def keep(estimate: memory.Estimate, device: torch.device) -> None:
        found.append(estimate)
        raise MachineError("enough")

    monkeypatch.setattr(memory, "require", keep)
    for routers in ("fitted", "random", "learned"):
        _adapt(dense, corpus, "--device", "cpu", "--recipe", "lte", "--options", f"group=4,routers={routers}")
    _teal("adapt", "--model", dense, "--dataset", corpus, *_SIZE, "--device", "cpu", "--recipe", "drelu")
    fitted, random, learned, none = found
    routers = 2 * (64 + 1) * 25  # of two MLPs of 64 inputs and 100 neurons
    a_fit = fit_bytes(tokens_of_fit(4 * 32), (64, 100, 25), 4)
    assert (none.added, random.added, learned.added) == (0, 4 * routers, 16 * routers)
    assert fitted.added == 4 * routers + 8 * routers + a_fit
    assert [each.checkpoints - none.checkpoints for each in (fitted, random, learned)] == [
        12 * routers,
        0,
        20 * routers,
    ]
    assert all(each.total - each.added - each.checkpoints == none.total - none.checkpoints for each in found)


def test_an_estimate_makes_room_for_what_is_measured_first() -> None:
    """There are neither gradients nor activations then: where these are small, it counts."""
    empty = loading.outline(require_alias("smollm2-135m"))
    size = {"frozen_itemsize": 2, "teacher_itemsize": 0, "activation_itemsize": 2, "recompute": True}
    size |= {"tokens": 64, "device": torch.device("cpu")}
    plain = memory.estimate(empty, trained=0, **size)
    found = memory.estimate(empty, trained=0, **size, added=Added(of_pass=5, of_measuring=1 << 40))
    assert found.added == (1 << 40) - plain.activations
    assert memory.estimate(empty, trained=0, **size, added=Added(of_pass=5, of_measuring=6)).added == 5


def test_routers_of_an_8b_are_counted() -> None:
    recipe = Lte(Setting(Options(), 0, 0.5, 0))
    empty = loading.outline(require_alias("llama-3-8b"))
    added = recipe.adds(empty, tokens=4096, measured=16384, itemsizes=(2, 4))
    assert added.fixed == 32 * 3584 * 4097
    assert added.copied == 2 * added.fixed


def test_a_state_of_another_form_is_that_of_another_run(
    dense: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted routers had less in it once, and were trained: such a run begins anew."""
    found: list[str] = []

    def keep(setup: Run) -> None:
        found.append(setup.key)
        raise MachineError("enough")

    monkeypatch.setattr(step, "run", keep)
    for routers in ("fitted", "random"):
        _adapt(dense, corpus, "--recipe", "lte", "--options", f"group=4,routers={routers}")
    monkeypatch.setattr(Lte, "form", 0, raising=False)
    for routers in ("fitted", "random"):
        _adapt(dense, corpus, "--recipe", "lte", "--options", f"group=4,routers={routers}")
    assert len(found) == 4
    assert found[0] != found[2]
    assert found[1] == found[3]


@pytest.mark.parametrize(
    "flags", [("--options", "vectors=true"), ("--lora", 2, "--recipe", "lte", "--options", "group=4")]
)
def test_frozen_weights_in_bfloat16_stay_as_they_are(dense: Path, corpus: Path, flags: tuple[object, ...]) -> None:
    """Without autocast they are float32 while others train, and are written as they were."""
    AutoModelForCausalLM.from_pretrained(dense).bfloat16().save_pretrained(dense)
    size = ("--dataset", corpus, "--tokens", 128, "--seq-len", 64, "--sink-tokens", 2)
    assert _teal("calibrate", "--model", dense, *size, "--quiet") == 0
    assert _adapt(dense, corpus, *flags, "--out", "out") == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (dense, "out"))
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16
    frozen = before if "vectors=true" in flags else ("model.embed_tokens.weight",)
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_looks_may_be_closer_than_points_of_the_curve(
    dense: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_LOGS", 1)
    size = ("--model", dense, "--dataset", corpus, *_SIZE)
    assert _teal("adapt", *size, "--recipe", "drelu", "--out", "out", "--quiet") == 0
    assert [point["step"] for point in read_record(Path("out")).curve if "held_out_loss" in point] == [0, 2, 4]


def test_steps_of_all_stages_are_counted(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--model", dense, "--dataset", corpus, *_SIZE)
    learned = ("--recipe", "lte", "--options", "group=4,routers=learned", "--patience", 0)
    assert _teal("adapt", *size, *learned, "--out", "out") == 0
    record = read_record(Path("out"))
    assert (record.steps, record.tokens) == (4, 512)
    assert "step 4 of 4" in capsys.readouterr().err


def test_the_result_of_another_run_is_not_replaced(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("adapt", "--model", dense, "--dataset", corpus, *_SIZE, "--recipe", "relu", "--out", "out", "--quiet")
    assert _teal(*own) == 0
    before = read_record(Path("out"))
    fails(capsys, 2, "(learning_rate differ): name another folder", *own, "--learning-rate", 1e-3)
    assert read_record(Path("out")) == before
    assert _teal(*own) == 0
    assert read_record(Path("out")).seconds != before.seconds


def test_two_processes_train_one_model(dense: Path, corpus: Path) -> None:
    """The sums are those of one process, but for their order; the first alone writes and talks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["adapt", "--model", dense, "--dataset", corpus, "--sparsity", 0.6, *_SIZE, "--patience", 0]
    arguments = [*map(str, flags), "--device", "cpu", "--out", "two"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        warm().start(arguments, env=environment() | place | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "written to two" in said[0]
    assert said[1] == ""
    assert _adapt(dense, corpus, "--patience", 0, "--out", "one") == 0
    losses = [[point["loss"] for point in read_record(Path(out)).curve if "loss" in point] for out in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
