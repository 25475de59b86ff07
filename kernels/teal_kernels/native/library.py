"""Finds, loads and calls the native library (src/teal_native.h, built by build.py)."""

import ctypes
import os
import weakref
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from teal_kernels.native.build import is_as_built, library_file
from teal_kernels.native.structures import ABI, MAX_ROWS, Program, Weight
from teal_kernels.ops import BackendUnavailableError

SETTING = "TEAL_NATIVE"
"""The environment variable: `off` is as if there were no library, a variant's name takes that one."""
_BUILD = "`python -m teal_kernels.native.build` builds it, with a C compiler or with `pip install ziglang`"
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "teal_abi": (c_int32, []),
    "teal_variants": (c_char_p, []),
    "teal_pool_open": (c_void_p, [c_int32]),
    "teal_pool_close": (None, [c_void_p]),
    "teal_pool_borrow": (c_void_p, [c_void_p, c_int32]),
    "teal_session_open": (c_void_p, [c_void_p, c_void_p, c_int32, c_char_p, c_char_p, c_int64]),
    "teal_session_close": (None, [c_void_p]),
    "teal_session_step": (c_int32, [c_void_p] * 7),
    "teal_session_kept": (None, [c_void_p] * 2),
    "teal_linear": (c_int32, [c_void_p, c_char_p, c_void_p, c_int32, c_void_p, c_void_p]),
}


@dataclass(frozen=True)
class Native:
    """The library, loaded."""

    variants: tuple[str, ...]
    """That this processor can run, the fastest first."""
    variant: str
    """The one that runs where nobody asks for another."""
    path: Path
    functions: Any
    """Those of the header, by name."""


def load() -> Native | None:
    """The library; None where it is absent, does not fit or is switched off (`unavailable_reason`).

    Raises:
        BackendUnavailableError: TEAL_NATIVE names a variant that cannot run here.
    """
    return _loaded()[0]


def unavailable_reason() -> str | None:
    """Why the library cannot be used and what mends it, in one line; None where it can.

    Raises:
        BackendUnavailableError: TEAL_NATIVE names a variant that cannot run here.
    """
    return _loaded()[1]


def _loaded() -> tuple[Native | None, str | None]:
    setting = os.environ.get(SETTING, "")
    if setting == "off":
        return None, f"switched off by {SETTING}=off"
    native, reason = _opened(library_file())
    if not setting:
        return native, reason
    if native is None:
        raise BackendUnavailableError(f"{SETTING}={setting} names a variant of the native library: {reason}")
    return Native(native.variants, _checked(native, setting, f"{SETTING}="), native.path, native.functions), None


# A library that was loaded stays so; one that is built while a process runs is found by the next.
@lru_cache
def _opened(path: Path) -> tuple[Native | None, str | None]:
    if not path.exists():
        return None, f"the native library is not built; {_BUILD}"
    try:
        if not is_as_built(path):
            return None, f"{path} is damaged, or another file than was built; {_BUILD}"
        functions = ctypes.CDLL(str(path))
        functions.teal_abi.restype = c_int32
        abi = functions.teal_abi()
        if abi != ABI:
            return None, f"{path} is of another version (interface {abi}, not {ABI}); {_BUILD}"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{path} is no native library for this machine ({error}); {_BUILD}"
    variants = tuple(functions.teal_variants().decode().split())
    return Native(variants, variants[0], path, functions), None


def _checked(native: Native, variant: str, what: str = "native variant ") -> str:
    if variant not in native.variants:
        raise BackendUnavailableError(f"{what}{variant} cannot run here, only {', '.join(native.variants)}")
    return variant


def _needed() -> Native:
    native, reason = _loaded()
    if native is None:
        raise BackendUnavailableError(str(reason))
    return native


def default_threads() -> int:
    """As many as torch takes, and no more than the processors that this process may run on."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux has it
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), processors))


class _Handle:
    """An object of the library in this process, closed when it is collected or at exit.

    Threads do not survive a fork: a child opens its own, and leaves its parent's alone.
    """

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._handle, close = self._opened()
        self._finalizer = weakref.finalize(self, _close_in, self._process, close, self._handle)

    def _opened(self) -> tuple[int, Callable[[int], None]]:
        """Its address, and what closes it."""
        raise NotImplementedError

    def handle(self) -> int:
        """Its address.

        Raises:
            RuntimeError: it was closed.
        """
        if not self._finalizer.alive:
            raise RuntimeError(f"the {type(self).__name__} was closed")
        if self._process != os.getpid():
            self._finalizer.detach()
            self._open()
        return self._handle

    def close(self) -> None:
        """At once, rather than when it is collected. Twice does no harm."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _close_in(process: int, close: Callable[[int], None], handle: int) -> None:
    if os.getpid() == process:
        close(handle)


class Pool(_Handle):
    """Threads that wait for work, the caller of a step being one of them.

    Raises:
        BackendUnavailableError: there is no library.
        MemoryError: no memory or no threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        super().__init__()

    def _opened(self) -> tuple[int, Callable[[int], None]]:
        self.lock = Lock()  # a pool runs one step at a time; a child's copy may be locked for ever
        functions = _needed().functions
        handle = self._new(functions)
        if not handle:
            raise MemoryError(f"no memory or threads for a native pool of {self.threads}")
        return handle, functions.teal_pool_close

    def _new(self, functions: Any) -> int | None:
        found: int | None = functions.teal_pool_open(self.threads)
        return found


class BorrowedPool(Pool):
    """PyTorch's own threads, for products between its operators (`linear`); no session runs on them.

    Threads of ours would wait for the processors on which PyTorch's spin after an operator. Where PyTorch's are bound
    to processors, as vLLM binds them, ours would all be on one.

    Raises:
        BackendUnavailableError: there is no library, or PyTorch has several threads and no OpenMP like GNU's.
        MemoryError: no memory.
    """

    def _new(self, functions: Any) -> int | None:
        if self.threads == 1:
            return super()._new(functions)
        # What importing torch made global is what its own calls go to, a library in LD_PRELOAD before all others.
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if parallel is None:
            raise BackendUnavailableError("PyTorch's threads cannot be borrowed here: no OpenMP has GOMP_parallel")
        found: int | None = functions.teal_pool_borrow(ctypes.cast(parallel, c_void_p), self.threads)
        return found


@lru_cache
def shared_pool(threads: int) -> Pool:
    """One for each number of threads, which all sessions share; nobody closes it."""
    return Pool(threads)


class Session(_Handle):
    """A program with its buffers, on a pool.

    Args:
        program: as `program_of` makes it.
        pool: whose threads run it.
        rows: sequences, 1 to MAX_ROWS.
        variant: the name of one; None for the library's choice.

    Raises:
        BackendUnavailableError: there is no library, or the variant cannot run here.
        ValueError: the library cannot run the program; why, in its words.
    """

    def __init__(self, program: Program, pool: Pool, rows: int = 1, variant: str | None = None) -> None:
        self.program, self.pool, self.rows = program, pool, rows
        native = _needed()
        self.variant = native.variant if variant is None else _checked(native, variant)
        super().__init__()

    def _opened(self) -> tuple[int, Callable[[int], None]]:
        functions = self._functions = _needed().functions
        error = ctypes.create_string_buffer(512)
        handle = functions.teal_session_open(
            ctypes.addressof(self.program), self.pool.handle(), self.rows, self.variant.encode(), error, len(error)
        )
        if not handle:
            raise ValueError(error.value.decode())
        return handle, functions.teal_session_close

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        logits: Tensor | None,
        best: Tensor,
        levels: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """One token of every row.

        Args:
            tokens: (rows,) int64.
            positions: (rows,) int64, where each token stands in its sequence.
            logits: (rows, vocabulary) float32, written; None where nobody reads them: none are computed.
            best: (rows,) int64, written with the logits: where they are largest.
            levels: (rows,) int32, which of the thresholds of weights with several is a row's; None for the first.
            sequences: (rows,) int32, of which sequence of the cache each row is a token; None for one each.

        Raises:
            ValueError: a token, position, level or sequence is out of range, or two rows stand at one place, and
                nothing was done; or a tensor does not fit.
        """
        row = (self.rows,)
        at = [_address(table, row, torch.int64) for table in (tokens, positions, best)]
        of_levels, of_sequences = (
            None if given is None else _address(given, row, torch.int32) for given in (levels, sequences)
        )
        onto = None if logits is None else _address(logits, (self.rows, self.program.vocabulary), torch.float32)
        handle = self._running()
        with self.pool.lock:
            refused = self._functions.teal_session_step(handle, at[0], at[1], of_levels, of_sequences, onto, at[2])
        if refused:
            given = {"levels": levels, "sequences": sequences}
            of = "".join(f", {name} {own.tolist()}" for name, own in given.items() if own is not None)
            raise ValueError(f"token or position out of range: {tokens.tolist()} at {positions.tolist()}{of}")

    def _running(self) -> int:
        self.pool.handle()  # a session outlives its pool only in order to be closed
        return self.handle()

    def kept(self) -> Tensor:
        """(counters,) int64: inputs kept so far, summed over rows; of a gate first's `up`, outputs kept."""
        counts = torch.zeros(self.program.counters, dtype=torch.int64)
        self._functions.teal_session_kept(self.handle(), counts.data_ptr())
        return counts


class Linear:
    """Products alone, with little to do around each.

    Args:
        pool: whose threads multiply.
        variant: the name of one; None for the library's choice.

    Raises:
        BackendUnavailableError: there is no library, or the variant cannot run here.
    """

    def __init__(self, pool: Pool, variant: str | None = None) -> None:
        native = _needed()
        self._pool, self._function = pool, native.functions.teal_linear
        self._variant = (native.variant if variant is None else _checked(native, variant)).encode()

    def __call__(self, weight: Weight, x: Tensor, y: Tensor) -> None:
        """Multiply.

        Args:
            weight: as `weight_of` makes it.
            x: (rows, in) float32, contiguous, of at most MAX_ROWS rows.
            y: (rows, out) float32, contiguous, written; with the bias.

        Raises:
            ValueError: a tensor does not fit, or the library refuses the weight.
        """
        rows = x.shape[0]
        read = _address(x, (rows, weight.inputs), torch.float32)
        written = _address(y, (rows, weight.outputs), torch.float32)
        handle = self._pool.handle()
        with self._pool.lock:
            refused = self._function(handle, self._variant, ctypes.addressof(weight), rows, read, written)
        if refused:
            raise ValueError("the native library refuses this weight")


def linear(weight: Weight, x: Tensor, threads: int | None = None, variant: str | None = None) -> Tensor:
    """A product alone, for tests and measurements.

    Args:
        weight: as `weight_of` makes it.
        x: (..., in) float32.
        threads: how many; None for `default_threads`.
        variant: the name of one; None for the library's choice.

    Returns:
        (..., out) float32, with the bias.

    Raises:
        BackendUnavailableError: there is no library, or the variant cannot run here.
        ValueError: x does not fit, or the library refuses the weight.
    """
    multiply = Linear(shared_pool(threads or default_threads()), variant)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(rows.shape[0], weight.outputs)
    for x_rows, y_rows in zip(rows.split(MAX_ROWS), y.split(MAX_ROWS), strict=True):
        multiply(weight, x_rows, y_rows)
    return y.view(*x.shape[:-1], weight.outputs)


def _address(table: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if table.shape != shape or table.dtype != dtype or not table.is_contiguous() or table.device.type != "cpu":
        raise ValueError(f"{table.dtype} {tuple(table.shape)} on {table.device}, not contiguous {dtype} {shape}")
    return table.data_ptr()
