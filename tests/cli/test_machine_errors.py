"""What a machine cannot do: one line on stderr, exit code 4, nothing half written."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from command_line import calibrate_once, copied, fails

from teal_cli.errors import MachineError, artefact_error, as_teal_error


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("calibrated"), chat=False)


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


def test_full_disk_and_memory_below_other_errors() -> None:
    """Libraries wrap the system's error in their own."""
    for inner, message in ((OSError(errno.ENOSPC, "full"), "disk is full"), (MemoryError(), "out of memory")):
        try:
            try:
                raise inner
            except Exception as cause:
                raise ValueError("while writing the cache") from cause
        except ValueError as error:
            found = artefact_error(error, "text cannot be read")
        assert isinstance(found, MachineError)
        assert message in str(found)


def test_a_copy_onto_a_full_disk_names_what_it_writes() -> None:
    """Not what it reads, whose disk may have room. So `shutil.copyfile` fails, but for the last bytes of a file."""
    failed = OSError(errno.ENOSPC, "No space left on device", "dense/a.safetensors", None, "export/a.safetensors")
    assert "the disk is full (export/a.safetensors)" in str(as_teal_error(failed))


def test_no_gpu(tiny, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(
        capsys,
        4,
        "no GPU",
        "generate",
        "--model",
        tiny,
        "--prompt",
        "x",
        "--max-new-tokens",
        "4",
        "--device",
        "cuda",
        "--sparsity",
        "0",
    )


def test_backend_that_cannot_run(calibrated, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    fails(
        capsys,
        4,
        "needs a GPU",
        "generate",
        "--model",
        calibrated,
        "--prompt",
        "x",
        "--max-new-tokens",
        "4",
        "--backend",
        "triton",
    )


def test_kernels_that_a_machine_cannot_run(tiny, capsys, monkeypatch) -> None:
    from triton.runtime.errors import OutOfResources

    flags = ("generate", "--model", tiny, "--prompt", "x", "--sparsity", "0", "--max-new-tokens", "4")
    for error, message in (
        (OutOfResources(300_000, 232_448, "shared memory"), "cannot run a kernel (out of resource: shared memory"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "install gcc"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("teal_cli.decode.engine.Engine.prefill", lambda *a, e=error: (_ for _ in ()).throw(e))
            fails(capsys, 4, message, *flags)


@pytest.mark.parametrize(
    "flags", [("generate", "--prompt", "x", "--max-new-tokens", "4"), ("bench",), ("eval",), ("serve", "--port", "0")]
)
def test_a_backend_that_cannot_run_is_refused_before_a_calibration(flags, tiny, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    fails(capsys, 4, "needs a GPU", *flags, "--model", tiny, "--backend", "triton", "--device", "cpu")
    assert not Path("runs").exists()


def test_tuning_without_what_it_needs(calibrated, capsys, monkeypatch) -> None:
    flags = ("bench", "--model", calibrated, "--sparsity", "0.5", "--prompt-tokens", "8", "--new-tokens", "2")
    fails(capsys, 2, "give kernels (flag --kernels) too", *flags, "--tune")
    monkeypatch.setattr("teal_cli.steps.bench.prepare", lambda *_: pytest.fail("a model was loaded before"))
    fails(capsys, 4, "there is no GPU here", *flags, "--tune", "--kernels", "--device", "cpu")


def test_out_of_memory(tiny, capsys, monkeypatch) -> None:
    flags = ("generate", "--model", tiny, "--prompt", "x", "--sparsity", "0", "--max-new-tokens", "4")
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.models.loading.available_bytes", lambda device: 1000)
        fails(capsys, 4, "out of memory: ", *flags)
        fails(capsys, 4, "GiB free", "bench", "--model", "llama-3-70b", "--random-weights")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("can't allocate memory: 5"),
        MemoryError(),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("teal_cli.decode.engine.Engine.prefill", lambda *a, e=error: (_ for _ in ()).throw(e))
            fails(capsys, 4, "out of memory: use a smaller model", *flags)


def test_full_disk(calibrated, corpus, capsys, monkeypatch) -> None:
    """The old artefact stays whole and no temporary file is left."""
    before = {path: path.read_bytes() for path in Path("runs/tiny").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    flags = ("--model", calibrated, "--dataset", corpus, "--tokens", 512, "--seq-len", 64)
    fails(capsys, 4, "the disk is full", "calibrate", *flags)
    fails(capsys, 4, "the disk is full", "export", "--model", calibrated)
    assert {path: path.read_bytes() for path in Path("runs/tiny").iterdir()} == before


def test_a_limit_of_file_sizes(tiny, corpus, capsys) -> None:
    """As `ulimit -f` sets it."""
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ("--model", tiny, "--dataset", corpus, "--tokens", 64, "--seq-len", 64, "--sensitivity-tokens", 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        fails(capsys, 4, "larger than this process may write: raise the limit (ulimit -f)", "calibrate", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert list(Path("runs/tiny").iterdir()) == []
