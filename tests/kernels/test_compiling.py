"""Kernels that are compiled before they are launched, for a GPU that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

SCRIPT = """
import signal
import time
from contextlib import suppress
from threading import current_thread

import torch
import triton
import triton.language as tl
from compile_kernels import NoGPU
from triton.runtime._async_compile import active_mode

from teal_kernels.launching import compiling, launch


@triton.jit
def good(x, SIZE: tl.constexpr, PDL: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), 1.0)


@triton.jit
def bad(x, SIZE: tl.constexpr, PDL: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), unknown)


def compiled(kernel):
    return sum(isinstance(one, triton.compiler.CompiledKernel) for one in kernel.device_caches[0][0].values())


def start(kernel, size):
    launch(kernel, (1,), torch.zeros(64), SIZE=size, warps=1, pdl=False)


class Counting(NoGPU):
    launchers = []
    inside = set()

    def launcher_cls(self, source, metadata):
        signature = str(source.signature)
        if not current_thread().name.startswith("compiling"):
            return
        assert signature not in self.inside  # one at a time, so that it is compiled once
        self.inside.add(signature)
        time.sleep(0.05)
        self.launchers.append(signature)
        self.inside.remove(signature)


gpu = Counting(90)
triton.runtime.driver.set_active(gpu)
with compiling(threads=2):
    start(good, 16)
    start(bad, 16)
    with compiling():
        start(good, 32)
    start(good, 16)
    start(good, 64)
    launch(good, (1,), torch.zeros(65)[1:], SIZE=16, warps=1, pdl=False)  # elsewhere in memory
    launch(good, (1,), torch.zeros(64).half(), SIZE=16, warps=1, pdl=False)
    assert compiled(good) == 0  # all at the end
assert compiled(good) == 5, good.device_caches
assert compiled(bad) == 0
assert len(gpu.launchers) == 5, gpu.launchers
assert len(set(gpu.launchers)) == 2
try:
    with compiling(raising=True):
        start(bad, 32)
except triton.CompilationError as error:
    assert "unknown" in str(error)
else:
    raise AssertionError("it does not compile")
with suppress(KeyboardInterrupt), compiling(threads=1):
    for size in (1, 2, 4, 8):
        start(good, size)
    raise KeyboardInterrupt
assert active_mode.get() is None
assert compiled(good) == 9
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
with suppress(KeyboardInterrupt), compiling(threads=1):
    start(good, 128)
    signal.setitimer(signal.ITIMER_REAL, 0.01)  # while it waits for the end
assert active_mode.get() is None
for size in (16, 128):
    try:
        start(good, size)  # there is no GPU to launch it
    except AttributeError as error:
        assert "launcher_cls" not in str(error), error
    else:
        raise AssertionError("it was launched")
assert compiled(good) == 10
"""


def test_launches_compile_and_do_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    own = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment | own, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
