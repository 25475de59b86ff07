"""Launching Triton kernels one right behind the other."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from threading import BoundedSemaphore, Lock
from typing import Any

import torch

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: F401

    TRITON_MISSING: str | None = None
except ImportError as error:  # pragma: no cover - triton has no wheels for some systems
    TRITON_MISSING = f"triton cannot be imported ({error})"


EMPTY = -0x3F2153
"""A place for a partial sum that holds none: the bits of a NaN that no arithmetic makes."""


LEAST_TILE = 16
"""The shortest side of a tile that tensor cores take."""
ACTIVATIONS = {
    **{"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5, "fatrelu": 6, "drelu": 7},
    **{"xielu": 8, "clamped_swiglu": 9},
}
"""What a product's epilogue makes of it, by the number that kernels know it by. Of `drelu` and `clamped_swiglu` up is
changed too."""
HEAD_NORMS = {"none": 0, "heads": 1, "rotated_heads": 2, "all_heads": 3}
"""What RMS norms of attention normalise, by the number that kernels know it by: nothing; each head, before or after the
rotary embedding; all heads at once, before it."""
MOST_COMPARED = 128
"""Experts of which a router compares each with each, in registers; more are chosen one after the other."""
FIRST_PARTIALS = 4
"""Split-KV partials that are read at a time: at first those of a short context."""
_MOST_THREADS = 16
"""That compile: a container may have fewer cores than it sees."""
_COMPILED: ContextVar[set[object] | None] = ContextVar("compiled", default=None)
"""What `compiling` was given already; None outside of it."""


def uses_fma(rows: int, bits: int) -> bool:
    """Whether rows of a batch are multiplied by FMA instructions, not on tensor cores.

    Two rows of codes are: on an H100 a dense token of Llama-3-8B then takes 0.65 of the time in int4, 0.88 in int8.
    """
    return rows == 1 or (rows == 2 and bits < 16)


def interpreting() -> bool:
    """True where kernels run in triton's interpreter, on CPU tensors (set before first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=16)
def hopper_or_later(device: torch.device) -> bool:
    """Whether a kernel can begin before the one in front of it has ended."""
    return device.type == "cuda" and not interpreting() and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class DeviceFacts:
    """What planning a launch must know of a device."""

    multiprocessors: int
    """0 where programs run one after the other: without a GPU, and in the interpreter."""
    shared_memory: int
    """Bytes of a multiprocessor."""
    interpreter: bool = False


@lru_cache(maxsize=16)
def device_facts(device: torch.device) -> DeviceFacts:
    """Of a GPU; of others that they are none."""
    if device.type != "cuda" or interpreting():
        return DeviceFacts(multiprocessors=0, shared_memory=0, interpreter=interpreting())
    shared_memory = int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
    return DeviceFacts(multiprocessors(device), shared_memory)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@contextmanager
def compiling(threads: int | None = None, *, raising: bool = False) -> Iterator[None]:
    """Inside, launches of this thread only compile: several kernels at a time, and all of them by the end.

    A kernel takes about half a second, of which a third holds Python's lock. Triton 3.6 then compiles some C for 0.4
    seconds, once for kernels of the same signature. Inside another `compiling` it adds to the outer one.

    Args:
        threads: that compile; by default one for each core that this process may use, and at most 16.
        raising: raise what the compiler raises. Else a kernel that does not compile says so when it is launched.
    """
    if _COMPILED.get() is not None:
        yield
        return
    from triton.runtime import driver
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    count = threads or min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    # No job waits in a queue: an end of the process, which waits for all jobs, waits for those under way.
    room = BoundedSemaphore(count)
    same_signature: dict[str, Lock] = {}

    class WithLaunchers(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Callable[[], Any], *rest: Any) -> Any:
            def run() -> Any:
                try:
                    kernel = compile_kernel()
                    with same_signature.setdefault(str(kernel.src.signature), Lock()):  # the first leaves it on disk
                        driver.active.launcher_cls(kernel.src, kernel.metadata)
                    return kernel
                finally:
                    room.release()

            if key not in self.future_kernels:
                room.acquire()
            return super().submit(key, run, *rest)

    pool = ThreadPoolExecutor(count, thread_name_prefix="compiling")
    mode = WithLaunchers(pool, ignore_errors=not raising)
    outside = _COMPILED.set(set())
    try:
        with mode:
            yield
    finally:
        _COMPILED.reset(outside)
        if active_mode.get() is mode:  # triton 3.6 leaves it after Ctrl-C
            active_mode.set(None)
        pool.shutdown(wait=False)  # what is under way ends by itself, and its kernels are found


def _kind_of(argument: Any) -> object:
    """The same for arguments that need no other kernel. Of whole numbers triton asks less than which they are."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return type(argument), *map(_kind_of, argument)
    return type(argument), None if isinstance(argument, float) else argument


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int,
    pdl: bool,
    **constants: Any,
) -> None:
    """Launch a kernel; inside `compiling` it is compiled.

    Args:
        kernel: a `triton.jit` function.
        grid: programs.
        arguments: in the kernel's order.
        warps: of a program.
        pdl: programmatic dependent launch: begin while the kernel before still runs, up to the
            kernel's own wait. For compute capability 9.0 and up.
        constants: the kernel's compile-time arguments but `PDL`.
    """
    # Said, since from triton 3.10 on products and sums are not fused by default; 3.9 warns of it at a user's terminal.
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True, "PDL": pdl, **constants}
    if pdl:  # older GPUs and the interpreter do not know the option
        options["launch_pdl"] = True
    if (compiled := _COMPILED.get()) is not None:
        # A step launches a kernel once a block, and triton would ask for its key each time.
        if (key := (kernel, _kind_of(arguments), tuple(options.items()))) not in compiled:
            compiled.add(key)
            kernel.warmup(*arguments, grid=grid, **options)
        return
    kernel[grid](*arguments, **options)
