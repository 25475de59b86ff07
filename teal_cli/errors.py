"""The errors a user can cause or meet, each with the exit code of its kind.

A message is one line: what is wrong, where, and what to do. `cli.main` prints it and exits.
"""

import errno
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
_LONGEST_REASON = 400
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


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the known names where none is close."""
    names = sorted(known)
    close = get_close_matches(name[:_LONGEST_NAME], names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine's or the GPU's memory was not enough."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError; the CPU allocator raises a plain one.
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def as_teal_error(error: BaseException) -> TealError | None:
    """The TealError that an exception from below stands for, by itself or by its cause; None for a defect of ours."""
    found = _translated(error)
    cause = error.__cause__ or error.__context__
    return found if found is not None or cause is None else as_teal_error(cause)


def artefact_error(error: Exception, message: str) -> TealError:
    """What to raise where reading an artefact failed: `message` and the reason, unless the machine is at fault."""
    machine = as_teal_error(error)
    if isinstance(machine, MachineError):
        return machine
    reason = str(error.__cause__ or error).strip() or type(error).__name__
    if "trust_remote_code" in reason:  # what transformers advises is what we never do
        reason = "it comes with code of its own, which teal never runs"
    return ArtefactError(f"{message}: {_cut(reason.splitlines()[0])}")


def _cut(line: str) -> str:
    """A line of a library's, which may repeat a value of any size."""
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _translated(error: BaseException) -> TealError | None:
    if isinstance(error, TealError):
        return error
    if is_out_of_memory(error):
        return MachineError(
            "out of memory: use a smaller model, --dtype bfloat16, or a shorter --seq-len or --max-new-tokens"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return MachineError(f"the disk is full{where}: free some space and run the same command again")
    # safetensors reports the operating system's error only as text.
    if "No space left on device" in str(error):
        return MachineError("the disk is full: free some space and run the same command again")
    if "Failed to find C compiler" in str(error):
        return MachineError("triton needs a C compiler to launch kernels: install gcc, or use --backend reference")
    if type(error).__module__.startswith("triton.") and type(error).__name__ in ("OutOfResources", "PTXASError"):
        reason = str(error).strip().splitlines()[0]
        return MachineError(f"this GPU cannot run a kernel ({reason}): tune for it, or use --backend reference")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return ArtefactError(f"{error.filename}: {error.strerror}")
    return None


@contextmanager
def reading(what: str, path: object, *expected: type[Exception]) -> Iterator[None]:
    """Turn the expected ways of failing to read an artefact into one ArtefactError."""
    try:
        yield
    except expected as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtefactError(f"{what} {path} cannot be read ({_cut(detail)}): make it again") from error


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
        raise ArtefactError(f"{message}: its library panicked ({str(error).strip().splitlines()[0][:200]})") from error
