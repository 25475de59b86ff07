"""What can go wrong: one line on stderr, the right exit code, nothing half written."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from command_line import calibrate_once, copied, fails
from conftest import save_tiny, write_corpus
from safetensors.torch import load_file, save_file

from teal_cli import api
from teal_cli.cli import run
from teal_cli.errors import ArtefactError


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("calibrated"), chat=False)


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


def test_unknown_alias(capsys) -> None:
    fails(capsys, 3, "did you mean 'llama-3-8b'?", "calibrate", "--model", "lama-3-8b")


def test_unknown_flag_verb_and_nothing(capsys) -> None:
    fails(capsys, 2, "--sparsity", "export", "--sparsty", "0.5")
    fails(capsys, 2, "calibrat", "calibrat")
    fails(capsys, 2, "recipe", "run")


def test_folder_without_weights(tmp_path, capsys) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    fails(capsys, 3, "no config.json", "calibrate", "--model", folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    fails(capsys, 3, "no usable weights", "calibrate", "--model", folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    fails(capsys, 3, "never loads", "calibrate", "--model", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    fails(capsys, 3, "model-1.safetensors is missing", "calibrate", "--model", folder)


def test_truncated_weights(tiny, capsys) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    fails(capsys, 3, "truncated or damaged", "generate", "--model", tiny, "--prompt", "x")
    weights.write_bytes(b"\xff" * 100)
    fails(capsys, 3, "truncated or damaged", "generate", "--model", tiny, "--prompt", "x")


def test_weights_that_lack_tensors(tiny, capsys) -> None:
    """transformers would fill them with random numbers."""
    tensors = load_file(tiny / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, tiny / "model.safetensors")
    flags = ("generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "4", "--sparsity", "0")
    fails(capsys, 3, "lack 3 tensors of the right shape, model.layers.1.mlp.down_proj.weight first", *flags)


def test_configuration_that_does_not_fit_the_weights(tiny, capsys) -> None:
    path = tiny / "config.json"
    config = json.loads(path.read_text())
    flags = ("generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "4", "--sparsity", "0")
    path.write_text(json.dumps(config | {"intermediate_size": 96}))
    fails(capsys, 3, "", *flags)
    path.write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    fails(capsys, 3, "num_hidden_layers is 'two', not a whole number from 1 on", *flags)


def test_weights_changed_after_the_export(calibrated, capsys) -> None:
    assert run(["export", "--model", str(calibrated), "--out", "out", "--weights", "copy"]) == 0
    weights = bytearray(Path("out/model.safetensors").read_bytes())
    weights[-4000:] = bytes(4000)
    Path("out/model.safetensors").write_bytes(weights)
    said = "are not those that its thresholds were made for"
    fails(capsys, 3, said, "generate", "--model", "out", "--prompt", "x", "--max-new-tokens", "4")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m teal_cli info | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_folder_without_tokenizer(tiny, capsys) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).unlink()
    fails(capsys, 3, "no usable tokenizer", "calibrate", "--model", tiny)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("llamba", "of a type that transformers does not know"), ("mamba", "lack 22 tensors of the right shape")],
)
def test_model_type_of_other_weights(tiny, capsys, model_type: str, message: str) -> None:
    """A type that is in no table is looked at (tests/models/test_discovery.py), if it can be loaded."""
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    fails(capsys, 3, message, "calibrate", "--model", tiny)


def test_architecture_file_of_another_model(tiny, tmp_path, capsys) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("phi: {blocks: model.layers, sites: {mlp_input: [mlp.fc1]}}")
    fails(
        capsys,
        2,
        "has no row 'llama', which is the type of this model",
        "calibrate",
        "--model",
        tiny,
        "--architecture",
        path,
    )


_ROW = """llama:
  blocks: model.layers
  sites:
    attention_input: [self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]
    attention_output: [self_attn.o_proj]
    mlp_input: [mlp.gate_proj, mlp.up_proj]
"""


@pytest.mark.parametrize("row", ["  dense: [mlp.down_proj]\n", "    other: [mlp.down_proj]\n"])
def test_calibration_of_another_architecture(calibrated, tmp_path, capsys, row) -> None:
    """Fewer projections, and the same ones at another site."""
    file = tmp_path / "rows.yaml"
    file.write_text(_ROW + "    mlp_intermediate: [mlp.down_proj]\n")
    flags = ("export", "--model", calibrated, "--no-recalibrate", "--architecture", file)
    assert run([str(flag) for flag in flags]) == 0  # the packaged row, in other words
    file.write_text(_ROW + row)
    wanted = "another architecture, which differs at model.layers.0.mlp.down_proj: run `teal calibrate` again"
    fails(capsys, 3, wanted, *flags)


def test_truncated_calibration(calibrated, capsys) -> None:
    tensors = Path("runs/tiny/calibration.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    fails(capsys, 3, "truncated or was altered: calibrate again", "export", "--model", calibrated)
    altered = bytearray(whole)
    altered[-8] ^= 1
    tensors.write_bytes(altered)
    fails(capsys, 3, "truncated or was altered: calibrate again", "export", "--model", calibrated)
    tensors.unlink()
    fails(capsys, 3, "is missing: calibrate again", "export", "--model", calibrated)


def test_damaged_calibration_meta(calibrated, capsys) -> None:
    meta = Path("runs/tiny/calibration.json")
    content = json.loads(meta.read_text())
    meta.write_text(meta.read_text()[:100])
    fails(capsys, 3, "not valid JSON", "export", "--model", calibrated)
    meta.write_text(json.dumps(content | {"format_version": 99}))
    fails(capsys, 3, "format version 99, this teal reads 2", "export", "--model", calibrated)
    meta.write_text(json.dumps(content | {"projections": content["projections"][:3]}))
    fails(capsys, 3, "was altered: calibrate again", "export", "--model", calibrated)
    del content["content_sha256"]  # as older versions wrote it
    meta.write_text(json.dumps(content | {"projections": content["projections"][:3]}))
    fails(capsys, 3, "do not match its histograms", "export", "--model", calibrated)
    del content["seed"]
    meta.write_text(json.dumps(content))
    fails(capsys, 3, "is damaged (seed: Field required)", "export", "--model", calibrated)


def test_calibration_of_another_model(calibrated, tmp_path, capsys) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    fails(capsys, 3, "made with another model (tiny", "export", "--model", other, "--calibration", "runs/tiny")
    fails(capsys, 3, "no calibration in nowhere", "export", "--model", other, "--calibration", "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2, this teal reads 1"),
        ({"projections": {}}, "is damaged (projections: "),
        ({"projections": {"a": {"sparsity": 1.5, "threshold": 0.1}}}, "(projections.a.sparsity: Input should be less"),
        ({"projections": {"a": {"sparsity": 0.5, "threshold": -1}}}, "(projections.a.threshold: Input should be gr"),
        ({"projections": {"a": {"sparsity": 0.5}}}, "(projections.a.threshold: Field required)"),
        ({"architecture": None}, "was altered"),
        ({"target_sparsity": 0.4}, "were altered"),
        ({"projections": {"a": {"sparsity": 0.5, "threshold": 0.1}}}, "were altered"),
    ],
)
def test_tampered_checkpoint(calibrated, capsys, change, message) -> None:
    assert run(["export", "--model", str(calibrated), "--out", "out"]) == 0
    path = Path("out/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    fails(capsys, 3, message, "generate", "--model", "out", "--prompt", "x")
    fails(capsys, 3, message, "eval", "--model", "out")


@pytest.mark.parametrize("value", ["1", "-0.1", "1.5", "nan", "half"])
def test_sparsity_out_of_range(capsys, value) -> None:
    for verb in ("export", "generate", "bench", "eval"):
        fails(capsys, 2, "sparsity", verb, f"--sparsity={value}")


def test_text_shorter_than_one_sequence(tiny, tmp_path, capsys) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    fails(capsys, 3, "fewer than one sequence of 1024", "calibrate", "--model", tiny, "--dataset", text)


def test_no_network_and_not_cached(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    fails(capsys, 3, "not cached and the hub cannot be reached", "calibrate", "--model", "nobody/nothing")
    fails(capsys, 3, "not cached and the hub cannot be reached", "generate", "--model", "llama-3-8b", "--prompt", "x")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    mistyped = "there is no folder runs/tinny here; as a model of the hub: runs/tinny is not cached"
    fails(capsys, 3, mistyped, "eval", "--model", "runs/tinny")
    fails(capsys, 3, mistyped, "info", "--model", "runs/tinny")


def test_result_that_cannot_be_written(calibrated, capsys) -> None:
    fails(capsys, 2, "is a folder", "export", "--model", calibrated, "--json", ".")
    fails(capsys, 2, "a file, not to stdout", "info", "--json", "-")
    fails(capsys, 2, "no ordinary file", "calibrate", "--model", "nowhere", "--json", "/dev/null")
    fails(capsys, 2, "/proc/tiny: it cannot be written", "calibrate", "--model", calibrated, "--runs", "/proc")
    Path("file").write_text("")
    fails(capsys, 2, "it cannot be written (Not a directory)", "export", "--model", calibrated, "--out", "file/below")


def test_generate_needs_a_prompt(tiny, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    fails(capsys, 2, "no prompt", "generate", "--model", tiny)
    fails(capsys, 2, "is empty", "generate", "--model", tiny, "--prompt", " ")


def test_context_overflow(tiny, capsys) -> None:
    flags = ("generate", "--model", tiny, "--prompt", "stars", "--sparsity", "0", "--max-new-tokens", "300")
    fails(capsys, 3, "exceed the model's context of 256", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("generate", "--prompt", "stars", "--max-new-tokens", "256"),
        ("bench", "--prompt-tokens", "200", "--new-tokens", "57"),
        ("eval", "--generate", "--tokens", "300", "--seq-len", "256", "--prompt-tokens", "200", "--new-tokens", "57"),
    ],
    ids=lambda flags: flags[0],
)
def test_context_overflow_before_a_calibration(tiny, capsys, flags: tuple[str, ...]) -> None:
    fails(capsys, 3, "257 positions", *flags, "--model", tiny)


def _no_work(*arguments: object, **options: object) -> NoReturn:
    raise AssertionError("the work has begun")


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("artefacts", "run"):
        monkeypatch.setattr(f"teal_cli.steps.{step}.calibrate", _no_work)


_LONG = ("--prompt", "stars and rivers " * 40, "--max-new-tokens", 200)


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("of_ranks", [(), ("--tensor-parallel", 2, "--device", "cpu")], ids=["alone", "ranks"])
def test_a_long_prompt_is_refused_before_a_calibration(tiny, capsys, monkeypatch, of_ranks: tuple[str, ...]) -> None:
    monkeypatch.setattr("teal_cli.ranks.group.check_devices", lambda count, device: None)
    said = "prompt tokens and 200 new ones exceed the model's context of 256"
    fails(capsys, 3, said, "generate", "--model", tiny, *_LONG, *of_ranks)


@pytest.mark.usefixtures("no_calibration")
def test_a_long_prompt_on_stdin_is_refused_before_a_calibration(tiny, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("stars and rivers " * 40))
    flags = ("--prompt", "-", "--max-new-tokens", 200)
    fails(capsys, 3, "200 new ones exceed the model's context of 256", "generate", "--model", tiny, *flags)


@pytest.mark.usefixtures("no_calibration")
def test_a_long_prompt_is_refused_before_a_calibration_in_python(tiny) -> None:
    with pytest.raises(ArtefactError, match="200 new ones exceed the model's context of 256"):
        api.generate("stars and rivers " * 40, tiny, max_new_tokens=200)


@pytest.mark.usefixtures("no_calibration")
def test_a_long_prompt_is_refused_before_the_first_stage(tiny, capsys) -> None:
    recipe = {"model": str(tiny), "calibrate": {"dataset": str(write_corpus(Path("corpus.txt")))}}
    recipe["generate"] = {"prompt": _LONG[1], "max_new_tokens": 200}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    fails(capsys, 3, "200 new ones exceed the model's context of 256", "run", "recipe.yaml")


@pytest.mark.usefixtures("no_calibration")
def test_a_long_real_prompt_is_refused_before_a_calibration(tiny, capsys) -> None:
    flags = ("--speculate", "sparse", "--prompt-tokens", 8, "--new-tokens", 244)
    fails(capsys, 3, "lower --new-tokens, or leave out --speculate", "bench", "--model", tiny, *flags)


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    "flags",
    [("eval", "--tokens", 300, "--text", "corpus.txt"), ("adapt", "--recipe", "recover", "--dataset", "corpus.txt")],
    ids=lambda flags: flags[0],
)
def test_sequences_beyond_a_table_of_positions_are_refused_before_a_calibration(
    tmp_path, capsys, flags: tuple[object, ...]
) -> None:
    write_corpus(Path("corpus.txt"))
    model = save_tiny(tmp_path / "gpt2", "gpt2")
    said = "seq_len (257, flag --seq-len) exceeds the 256 positions of this model"
    fails(capsys, 2, said, *flags, "--model", model, "--seq-len", 257)


def test_a_prompt_that_no_context_holds(tiny, capsys) -> None:
    """Refused by its characters, before it is encoded."""
    flags = ("generate", "--model", tiny, "--sparsity", "0", "--max-new-tokens", "1", "--prompt", "stars " * 200_000)
    fails(capsys, 3, "1,200,000 characters exceeds the model's context of 256 tokens", *flags)


def test_recipe_without_prompt(tiny, capsys) -> None:
    Path("r.yaml").write_text(f"model: {tiny}\n")
    fails(capsys, 2, "needs a prompt", "run", "r.yaml")
    fails(capsys, 2, "does not exist", "run", "none.yaml")


def test_ctrl_c_in_a_real_process(tiny, corpus) -> None:
    """SIGINT while calibrating: exit 130, one line, nothing half written."""
    code = (
        "import os, signal, sys, teal_cli.steps.calibrate as step\n"
        # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from teal_cli.cli import main\n"
        "original = step.collect\n"
        "def collect(*a, **k):\n    os.kill(os.getpid(), signal.SIGINT)\n    return original(*a, **k)\n"
        "step.collect = collect\n"
        f"sys.argv = ['teal', 'calibrate', '--model', {str(tiny)!r}, '--dataset', {str(corpus)!r}, "
        "'--tokens', '256', '--seq-len', '64']\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr.strip().splitlines()[-1] == "teal: interrupted"
    assert "Traceback" not in result.stderr
    assert not list(Path("runs").rglob("*calibration*"))


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys) -> None:
    assert run(["calibrate", "--model", "lama", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_export_does_not_replace_what_it_did_not_make(calibrated, capsys) -> None:
    before = sorted(calibrated.iterdir())
    fails(
        capsys, 3, "is not a TEAL checkpoint: it is not replaced", "export", "--model", calibrated, "--out", calibrated
    )
    fails(
        capsys, 3, "is not a TEAL checkpoint: it is not replaced", "export", "--model", calibrated, "--out", "runs/tiny"
    )
    assert sorted(calibrated.iterdir()) == before
    assert run(["export", "--model", str(calibrated), "--out", "new"]) == 0
    assert run(["export", "--model", str(calibrated), "--out", "new", "--sparsity", "0.3"]) == 0


@pytest.mark.parametrize(
    ("part", "verb"), [("model", "calibrate"), ("model", "info"), ("model", "generate"), ("tokenizer", "generate")]
)
def test_code_of_a_model_folder_is_never_run(tiny, capsys, monkeypatch, verb, part) -> None:
    """transformers asks whether to run it: even a yes must not count."""
    if part == "model":
        path, names = tiny / "config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    else:
        path, names = tiny / "tokenizer_config.json", {"AutoTokenizer": ["evil.T", None]}
    changed = {"model_type": "unheard_of"} if part == "model" else {"tokenizer_class": "T"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed | {"auto_map": names}))
    ran = tiny / "ran"
    (tiny / "evil.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class C(LlamaConfig): model_type = 'unheard_of'\n"
        "class M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    flags = ("--prompt", "x", "--sparsity", "0") if verb == "generate" else ()
    fails(capsys, 3, "code of its own, which teal never runs", verb, "--model", tiny, *flags)
    assert not ran.exists()
