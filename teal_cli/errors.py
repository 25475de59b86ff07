"""The errors a user can cause or meet, each with the exit code of its kind.

A message is one line: what is wrong, where, and what to do. `cli.main` prints it and exits.
"""

import errno
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class TealError(Exception):
    """Base class; `exit_code` is the process's."""

    exit_code = 1


class UsageError(TealError):
    """Wrong flags, YAML or a contradiction between them."""

    exit_code = 2


class ArtefactError(TealError):
    """A model, text or artefact is missing, damaged or does not fit."""

    exit_code = 3


class MachineError(TealError):
    """This machine cannot: no GPU, out of memory, disk full, backend absent."""

    exit_code = 4


EXIT_INTERRUPTED = 130

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 120, 120, 60
_LONGEST_NAME = 100
_MOST_NAMES = 50
_LONGEST_REASON = 300
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(value: object) -> str:
    """A value in a message: its repr, cut to a few hundred characters whatever its size."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters and escape sequences written as `\\x1b`.

    Line breaks and tabs stay. Applies to whatever a model, an artefact or a library names itself; overrides of the
    direction of text are written out too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in "\n\t" or not (char in _DIRECTIONS or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"))
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def shortened(text: str, most: int) -> str:
    """A text in a message, cut after so many characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the known names where none is close; of many the first."""
    names = sorted(known)
    close = get_close_matches(name[:_LONGEST_NAME], names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return f"; known: {', '.join(names[:_MOST_NAMES])}{more}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine's or the GPU's memory was not enough."""
    if isinstance(error, MemoryError) or _system_error(error) == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError is a RuntimeError; the CPU allocator and its mmap raise plain ones.
    text = str(error)
    return isinstance(error, RuntimeError | OSError | ImportError) and any(said in text for said in _NO_MEMORY)


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
)
_SYSTEM = {
    errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
    errno.EFBIG: ("a file would become larger than this process may write", "raise the limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close some programs"),
    errno.EAGAIN: (
        "this machine refuses further threads or processes",
        "raise the limit (ulimit -u), or set OMP_NUM_THREADS=1",
    ),
    errno.EROFS: ("the file system is read-only", "write elsewhere (flags --runs, --out, --json)"),
    errno.EIO: ("the disk or device reports an error", "look at its health, and run the same command again"),
    errno.EBADF: ("stdin or stdout cannot be used as it was opened", "redirect it otherwise"),
}
"""What an operating system says that is no fault of a file -> what is wrong, and what to do."""
_NO_THREAD = "can't start new thread"


def _system_error(error: BaseException) -> int | None:
    """The number of the operating system's error; Rust and C++ libraries have it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if _NO_THREAD in str(error):
        return errno.EAGAIN
    found = re.search(r"\(os error (\d+)\)|\[errno (\d+)\]", str(error)[:10_000], re.IGNORECASE)
    return int(found[1] or found[2]) if found else None


def as_teal_error(error: BaseException) -> TealError | None:
    """The TealError that an exception from below stands for, by itself or by its cause; None for a defect of ours."""
    found = _translated(error)
    cause = error.__cause__ or error.__context__
    return found if found is not None or cause is None else as_teal_error(cause)


def artefact_error(error: BaseException, message: str, advice: str = "") -> TealError:
    """What to raise where reading an artefact failed, unless the machine is at fault.

    Args:
        error: what a library raised.
        message: what cannot be used; the reason is added.
        advice: what to do; stands behind the reason.
    """
    machine = as_teal_error(error)
    if isinstance(machine, MachineError):
        return machine
    reason = _reason(error)
    return ArtefactError(f"{message} ({reason}): {advice}" if advice else f"{message}: {reason}")


def _reason(error: BaseException) -> str:
    """The first line of what a library said, without advice to do what teal never does."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return "it comes with code of its own, which teal never runs"
    if "weights_only" in text:
        return "it holds more than tensors, and teal unpickles nothing else"
    return shortened(text.splitlines()[0], _LONGEST_REASON)


def _translated(error: BaseException) -> TealError | None:
    if isinstance(error, TealError):
        return error
    if is_out_of_memory(error):
        return MachineError(
            "out of memory: use a smaller model, --dtype bfloat16, or a shorter --seq-len or --max-new-tokens"
        )
    number = _system_error(error)
    if number in _SYSTEM:
        wrong, advice = _SYSTEM[number]
        named = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy, what it writes
        where = f" ({named})" if named else ""
        return MachineError(f"{wrong}{where}: {advice}")
    text = str(error)
    if "No space left on device" in text:
        return MachineError(": ".join(_SYSTEM[errno.ENOSPC]))
    if "No usable temporary directory" in text:
        return MachineError("no folder for temporary files can be written: name one in TMPDIR")
    if "Failed to find C compiler" in text:
        return MachineError("triton needs a C compiler to launch kernels: install gcc, or use --backend reference")
    if type(error).__module__.startswith("triton.") and type(error).__name__ in ("OutOfResources", "PTXASError"):
        return MachineError(f"this GPU cannot run a kernel ({_reason(error)}): tune for it, or use --backend reference")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return ArtefactError(f"{error.filename}: {error.strerror}")
    return None


@contextmanager
def reading(what: str, path: object, *expected: type[Exception]) -> Iterator[None]:
    """Turn the expected ways of failing to read an artefact into one ArtefactError, or the machine's fault."""
    try:
        yield
    except expected as error:
        raise artefact_error(error, f"{what} {path} cannot be read", "make it again") from error


@contextmanager
def blame(message: str) -> Iterator[None]:
    """Turn whatever a library raises on somebody's file or template into one ArtefactError.

    Only around calls into other people's code: transformers and tokenizers raise any class of exception for a
    damaged file, tokenizers' panics are not even an `Exception`. A TealError and the machine's faults stay what
    they are.

    Args:
        message: what cannot be used; the reason is added.

    Raises:
        TealError: see above.
    """
    try:
        yield
    except TealError:
        raise
    except Exception as error:
        raise artefact_error(error, message) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Ctrl-C and the like
            raise
        raise ArtefactError(f"{message}: its library panicked ({_reason(error)})") from error
