"""`--tensor-parallel 2` of the command line: what it prints and writes, and how it ends when a rank does."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from command_line import calibrate_once, copied, fails
from conftest import save_tiny
from warm import COMMAND, environment, warm

from teal_cli.cli import run
from teal_cli.ranks.workers import own_folder

FLAGS = ("--device", "cpu", "--dtype", "float32")
TWO = ("--tensor-parallel", "2")
WORDS = ("--prompt", "the quick", "--max-new-tokens", "12", "--compile", "never")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("home"), chat=True)


def teal(*arguments: object, code: int = 0, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    """A command that ends with this code and says at most one line that is an error. Its processes are forked."""
    return checked(warm().run(list(map(str, arguments)), env=environment(), input=stdin), code)


def started_teal(*arguments: object, code: int = 0, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    """The same, whose processes are started as users start them."""
    words = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600, input=stdin)
    return checked(done, code)


def checked(done: "subprocess.CompletedProcess[str]", code: int) -> "subprocess.CompletedProcess[str]":
    assert done.returncode == code, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("teal: ")]) == (code != 0), done.stderr
    return done


def alone(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints as one process: this one, which has imported torch."""
    capsys.readouterr()
    assert run(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_text_and_figures_are_those_of_one_process(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied(home, tmp_path)
    Path("queue.py").write_text("raise ImportError('a rank imports what lies in the working directory')\n")
    # By the same path in both: the native one counts every step.
    asked = (*("generate", "--model", model, *FLAGS, "--sparsity", "0.4", "--backend", "reference"), *WORDS)
    two = started_teal(*asked, *TWO, "--json", "two.json")
    assert two.stdout == alone(capsys, *asked, "--json", "one.json")
    results = [json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two")]
    assert results[1]["text"] == results[0]["text"]
    assert results[1]["realised_sparsity"] == pytest.approx(results[0]["realised_sparsity"], abs=1e-12)
    assert "sums over ranks by Gloo" in two.stderr


def test_perplexity_is_that_of_one_process(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(home, tmp_path)
    asked = ("eval", "--model", model, *FLAGS, "--sparsity", "0.4", "--tokens", "256", "--seq-len", "64")
    asked = (*asked, "--text", home / "corpus.txt")
    teal(*asked, *TWO, "--json", "two.json")
    alone(capsys, *asked, "--json", "one.json")
    one, two = (json.loads(Path(f"{name}.json").read_text())["runs"][0] for name in ("one", "two"))
    assert two["sparse"]["perplexity"] == pytest.approx(one["sparse"]["perplexity"], rel=1e-5)
    assert two["sparse"]["realised_sparsity"] == pytest.approx(one["sparse"]["realised_sparsity"], abs=1e-12)


def test_bench_of_quantised_weights(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(home, tmp_path)
    asked = ("bench", "--model", model, *FLAGS, "--sparsity", "0.4", "--quantise", "int4:32", "--prompt-tokens", "8")
    asked = (*asked, "--new-tokens", "4", "--repeats", "1", "--backend", "reference")
    teal(*asked, *TWO, "--json", "two.json")
    alone(capsys, *asked, "--json", "one.json")
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["tensor_parallel"], two["tensor_parallel"]) == (1, 2)
    assert two["sums"] == ["sums over ranks by Gloo"]
    for ours, theirs in zip(two["runs"], one["runs"], strict=True):
        assert ours["realised_sparsity"] == pytest.approx(theirs["realised_sparsity"], abs=0.01)
        assert ours["bytes_per_token"] >= theirs["bytes_per_token"]  # norms and the row of the embedding, on both


def test_quantised_experts(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "moe", "qwen2_moe")
    Path("short.yaml").write_text(f"calibrate: {{dataset: {home / 'corpus.txt'}, tokens: 512, seq_len: 64}}\n")
    asked = ("generate", "--config", "short.yaml", "--model", model, *FLAGS, "--sparsity", "0.4", "--quantise", "int8")
    asked = (*asked, *WORDS, "--backend", "reference", "--json", "a.json")
    assert teal(*asked, *TWO).stdout == alone(capsys, *asked)


def ranks_of(launcher: int) -> list[int]:
    """Processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def started(home: Path, tmp_path: Path, *more: str, **variables: str) -> tuple["subprocess.Popen[str]", list[int]]:
    """A long reply by two ranks, which have begun it. Its processes are forked."""
    model = copied(home, tmp_path)
    asked = ("generate", "--model", model, *FLAGS, *TWO, *more, "--sparsity", "0", "--prompt", "the quick")
    words = [*map(str, asked), "--max-new-tokens", "200", "--temperature", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = warm().start(words, env=environment() | variables, **pipes)
    assert process.stdout is not None
    process.stdout.read(1)  # a reply is under way
    found = ranks_of(process.pid)
    assert len(found) == 2
    return process, found


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(_runs(pid) for pid in pids):
        time.sleep(0.1)
    return not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_that_dies_ends_all(home: Path, tmp_path: Path) -> None:
    process, pids = started(home, tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed < 15
    assert process.returncode == 4
    assert [line for line in said.splitlines() if line.startswith("teal: ")] == [
        "teal: rank 1 died of SIGKILL: all ranks have been ended"
    ]
    assert gone(pids, 5)


def test_a_rank_that_hangs_is_found(home: Path, tmp_path: Path) -> None:
    process, pids = started(home, tmp_path, "--peer-timeout", "5")
    os.kill(pids[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 4
    assert said.splitlines()[-1] == "teal: another process of --tensor-parallel has ended or hangs"
    assert gone(pids, 5)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_command(signal_: int, home: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process, pids = started(home, tmp_path, TMPDIR=str(temporary))
    if signal_ == signal.SIGKILL:
        os.kill(pids[1], signal.SIGSTOP)  # else both would soon be done with their reply, and end by themselves
    process.send_signal(signal_)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if signal_ == signal.SIGKILL else 130)
    assert gone(pids, 10)
    left = list(temporary.glob("teal-ranks-*"))
    assert bool(left) == (signal_ == signal.SIGKILL)


_DRAINS = """
import os, pathlib, signal, time
told = pathlib.Path(os.environ["RANK"])
signal.signal(signal.SIGTERM, lambda *_: told.write_text("told"))
told.write_text("waits")
time.sleep(300)
"""


def test_a_second_signal_ends_ranks_that_drain(tmp_path: Path) -> None:
    """At once: they heed no other signal, and are not asked again."""
    ranks = f"run_workers(2, ['-c', {_DRAINS!r}], drains=True)"
    program = f"import sys; from teal_cli.ranks.workers import run_workers; sys.exit({ranks})"
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment())
    files = [tmp_path / str(rank) for rank in range(2)]

    def said() -> list[str]:
        return [file.read_text() if file.exists() else "" for file in files]

    for wanted in (["waits", "waits"], ["told", "waits"]):
        while said() != wanted:
            assert launcher.poll() is None
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 130
    assert said() == wanted


def test_a_folder_that_a_killed_launcher_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new, locked = (tmp_path / f"teal-ranks-{name}" for name in ("old", "new", "locked"))
    for folder in (old, new, locked):
        (folder / "inside").mkdir(parents=True)
    for folder in (old, locked):
        os.utime(folder, (1, 1))
    descriptor = os.open(locked, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with own_folder() as own:
        assert Path(own).is_dir()
        assert [folder.exists() for folder in (old, new, locked)] == [False, True, True]
    os.close(descriptor)
    assert not Path(own).exists()


def test_what_ranks_do_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, 2, "needs a prompt", "generate", *TWO)
    fails(capsys, 2, "leave out tensor_parallel", "eval", "--tasks", "piqa", *TWO)
    fails(capsys, 2, "is measured in one process", "bench", "--kernels", *TWO)
    fails(capsys, 2, "mode intrinsic", "generate", "--mode", "intrinsic", "--prompt", "a", *TWO)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tensor-parallel", "3"), "4 heads and 2 key heads cannot be divided by 3"),
        (("--tensor-parallel", "4", "--quantise", "int4"), "cannot be divided by 4"),
    ],
)
def test_a_model_that_cannot_be_divided_is_not_calibrated(
    more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    fails(capsys, 2, said, "generate", "--model", home / "tiny", *FLAGS, *more, "--prompt", "a")
    assert not Path("runs").exists()


def test_fewer_gpus_than_ranks_are_refused_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    asked = ("generate", "--model", home / "tiny", "--device", "cuda", *TWO, "--prompt", "a")
    fails(capsys, 4, "needs a GPU a rank; there are 1", *asked)
    assert not Path("runs").exists()


def test_dense_models_of_ranks(home: Path, tmp_path: Path) -> None:
    model = copied(home, tmp_path)
    dense = ("--model", model, *FLAGS, "--sparsity", "0", *TWO)
    teal("generate", *dense, "--quantise", "int8", *WORDS)
    assert [folder.name for folder in Path("runs/tiny-int8").iterdir() if folder.is_dir()] == ["uniform-0.00"]
    shutil.rmtree("runs")
    more = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--backend", "reference")
    text = f"calibrate: {{dataset: {home / 'corpus.txt'}, tokens: 512, seq_len: 64}}\n"
    Path("short.yaml").write_text(text)
    teal("bench", *dense, *more, "--config", "short.yaml")
    assert Path("runs/tiny/calibration.json").is_file()


def test_a_prompt_on_stdin(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "--model", copied(home, tmp_path), *FLAGS, "--sparsity", "0", "--max-new-tokens", "8")
    asked = (*asked, "--compile", "never", "--backend", "reference", "--prompt", "-")
    two = teal(*asked, *TWO, "--json", "two.json", stdin="the quick\nbrown é")
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick\nbrown é"))
    assert two.stdout == alone(capsys, *asked)
    assert json.loads(Path("two.json").read_text())["prompt"] == "the quick\nbrown é"


def test_what_a_job_scheduler_sets(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is alone is no rank, whatever is in its environment, and one of several needs all of it."""
    asked = ("generate", "--model", copied(home, tmp_path), *FLAGS, "--sparsity", "0", *WORDS, "--json", "one.json")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = alone(capsys, *asked, "--backend", "reference")
    assert json.loads(Path("one.json").read_text())["text"] == said.removesuffix("\n")
    fails(capsys, 2, "MASTER_ADDR is not", *asked, *TWO)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is no whole number"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is not below WORLD_SIZE"),
    ],
)
def test_what_a_launcher_says_wrong(
    variables: dict[str, str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    fails(capsys, 2, said, "generate", "--model", "nowhere", "--prompt", "a", *TWO)
    fails(capsys, 3, "nowhere", "generate", "--model", "nowhere", "--prompt", "a")  # one process looks at none of them


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_first(prompt: str, capsys: pytest.CaptureFixture[str], home: Path) -> None:
    fails(capsys, 2, "is empty", "generate", "--model", home / "tiny", *TWO, "--prompt", prompt)
    assert not Path("runs").exists()


def test_an_empty_prompt_on_stdin_is_refused_first(home: Path) -> None:
    started_teal("generate", "--model", home / "tiny", *FLAGS, *TWO, "--prompt", "-", code=2, stdin=" ")
    assert not Path("runs").exists()


def test_one_rank_of_torchrun_writes(home: Path, tmp_path: Path) -> None:
    asked = ("generate", "--model", copied(home, tmp_path), *FLAGS, *TWO, "--sparsity", "0", *WORDS, "--json", "a.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "teal_cli", *map(str, asked)], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == json.loads(Path("a.json").read_text())["text"] + "\n"
