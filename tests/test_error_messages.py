"""Messages that are bounded and safe to show; what a library raises, and whose fault it is."""

import errno
import os

import pytest

from teal_cli.errors import (
    ArtefactError,
    MachineError,
    UsageError,
    artefact_error,
    as_teal_error,
    blame,
    nearest,
    printable,
    reading,
    shortened,
    shown,
)

_BOMB: list[object] = ["x" * 1_000]
for _ in range(40):
    _BOMB = [_BOMB, _BOMB]


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, _BOMB, 10**5_000, {"k" * 500: _BOMB}, b"y" * 10**6, object()],
    ids=["text", "bomb", "number", "mapping", "bytes", "object"],
)
def test_values_in_messages_are_short(value: object) -> None:
    assert len(shown(value)) < 500


def test_short_values_are_written_in_full() -> None:
    assert [shown(value) for value in ("a'b", 1.5, [1, "x"])] == ['"a\'b"', "1.5", "[1, 'x']"]
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 3) == "abc... (4 more characters)"
    assert nearest("sparsty" + "y" * 10**6, ["sparsity", "seed"]) == "; known: seed, sparsity"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain é 中 😀\ttab\nline", "plain é 中 😀\ttab\nline"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m\x7f\r\0", "\\x9b31m\\x7f\\r\\x00"),
        ("a\u202eb\u2066c\u2028d\udcff", "a\\u202eb\\u2066c\\u2028d\\udcff"),
    ],
)
def test_a_terminal_shows_and_does_not_obey(text: str, wanted: str) -> None:
    assert printable(text) == wanted


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (ValueError("first\nsecond"), ArtefactError, "tokenizer: first"),
        (Exception(""), ArtefactError, "tokenizer: Exception"),
        (RuntimeError("z" * 10_000), ArtefactError, "more characters"),
        (PanicException("index out of range"), ArtefactError, "its library panicked (index out of range)"),
        (PanicException(), ArtefactError, "its library panicked"),
        (UsageError("as it was"), UsageError, "as it was"),
        (RuntimeError("can't allocate memory: 5"), MachineError, "out of memory"),
    ],
)
def test_blame(error: BaseException, wanted: type, message: str) -> None:
    with pytest.raises(wanted) as caught, blame("tokenizer"):
        raise error
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_nobody_is_blamed_for_an_interruption(error: BaseException) -> None:
    with pytest.raises(type(error)), blame("tokenizer"):
        raise error


class _LibraryError(Exception):
    """As of a library in Rust, which has the system's error as text."""


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.EROFS, "read-only"),
        (errno.ENOMEM, "out of memory"),
        (errno.EBADF, "stdin or stdout"),
    ],
)
def test_what_the_system_refuses_is_the_machines_fault(number: int, message: str) -> None:
    said = os.strerror(number)
    for error in (
        OSError(number, said),
        OSError(number, said, "weights.bin"),
        _LibraryError(f"I/O error: {said} (os error {number})"),
        _LibraryError(f"[Errno {number}] Error writing bytes"),
    ):
        found = as_teal_error(error)
        assert isinstance(found, MachineError), error
        assert message in str(found)
    with pytest.raises(MachineError), reading("plan", "p", OSError):
        raise OSError(number, said)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("can't start new thread"), "OMP_NUM_THREADS=1"),
        (RuntimeError("unable to mmap 9 bytes from file <w>: Cannot allocate memory (12)"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
    ],
)
def test_limits_that_libraries_put_into_words(error: Exception, message: str) -> None:
    found = as_teal_error(error)
    assert isinstance(found, MachineError)
    assert message in str(found)


def test_other_errors_of_files_name_them_and_defects_stay_defects() -> None:
    found = as_teal_error(PermissionError(errno.EACCES, "Permission denied", "runs/m.json"))
    assert isinstance(found, ArtefactError)
    assert str(found) == "runs/m.json: Permission denied"
    assert as_teal_error(ValueError("no such thing (os error 2)")) is None
    assert as_teal_error(IndexError("list index out of range")) is None


@pytest.mark.parametrize(
    "advice",
    [
        "Weights only load failed. (1) Re-running `torch.load` with `weights_only` set to `False` will likely succeed",
        "Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
    ],
)
def test_advice_to_run_code_is_not_passed_on(advice: str) -> None:
    for error in (artefact_error(ValueError(advice), "histogram h"), _read(ValueError(advice))):
        assert "teal" in str(error)
        assert not any(word in str(error) for word in ("False", "trust_remote_code", "weights_only"))


def _read(error: Exception) -> Exception:
    with pytest.raises(ArtefactError, match="histogram h cannot be read .*: make it again") as caught:  # noqa: SIM117
        with reading("histogram", "h", ValueError):
            raise error
    return caught.value
