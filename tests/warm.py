"""`teal` as processes that need not import torch and transformers: forked from one that has.

Importing takes seven seconds of CPU, and a command with two ranks does it three times. Processes from here have their
own ids, streams, environments, working directories, signals and children; left out are exec and the orderly end of an
interpreter. For every way to start processes another test starts them without this module.
"""

import atexit
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

COMMAND = [sys.executable, "-P", "-m", "teal_cli"]
"""What a process is started with; its own arguments follow."""
_STEPS = ("artefacts", "bench", "evaluate", "generate", "serve")
_IMPORTED = (
    *(f"teal_cli.steps.{name}" for name in _STEPS),
    *(f"teal_cli.ranks.{name}" for name in ("group", "workers")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2_moe")),
)


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A child of this process. What `Popen` offers else works as it does."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, stdin, stdin_end, stdout_end, stdout, stderr_end, stderr, *_ = others
        assert list(args[: len(COMMAND)]) == COMMAND
        streams = [0 if stdin == -1 else stdin, 1 if stdout == -1 else stdout, 2 if stderr == -1 else stderr]
        self._start([*map(str, args[len(COMMAND) :])], streams, dict(env or os.environ), str(cwd or Path.cwd()))
        self._child_created = True
        self._close_pipe_fds(stdin, stdin_end, stdout_end, stdout, stderr_end, stderr)  # type: ignore[attr-defined]

    def _start(self, arguments: Sequence[str], streams: Sequence[int], env: Mapping[str, str], cwd: str) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # as torch's launcher asks
            _become(arguments, streams, env, cwd)


class Warm:
    """A process that has imported everything, and starts others for as long as it is open.

    Args:
        environment: of the imports. Those that it starts have their own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(words, env=dict(environment), pass_fds=[theirs.fileno()])
        theirs.close()

    def close(self) -> None:
        """Started processes go on."""
        self._asked.close()
        assert self._process.wait(60) == 0

    def run(self, arguments: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """As `subprocess.run` of `COMMAND` and these arguments, with what it prints."""
        said, timeout = options.pop("input", None), options.pop("timeout", 600)
        pipes = dict.fromkeys(["stdout", "stderr", *(["stdin"] if said is not None else [])], subprocess.PIPE)
        with self.start(arguments, text=True, **pipes, **options) as process:
            try:
                out, error = process.communicate(said, timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def start(self, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """As `subprocess.Popen` of `COMMAND` and these arguments."""
        asked = self._asked

        class Started(_Forked):
            def _start(self, *what: Any) -> None:
                self._heard, theirs = socket.socketpair()
                arguments, streams, env, cwd = what
                message = json.dumps([arguments, env, cwd]).encode()
                socket.send_fds(asked, [message], [theirs.fileno(), *streams])
                theirs.close()
                self.pid = int(self._heard.recv(32))

            def _internal_poll(self, *_: Any, **__: Any) -> int | None:
                if self.returncode is None:
                    ended, status = self._try_wait(os.WNOHANG)
                    if ended:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
                return self.returncode

            def _try_wait(self, flags: int) -> tuple[int, int]:
                try:
                    return self.pid, int(self._heard.recv(32, socket.MSG_DONTWAIT if flags else 0))
                except BlockingIOError:
                    return 0, 0

        return Started([*COMMAND, *arguments], **options)


def environment() -> dict[str, str]:
    """Of commands: no kernels in the interpreter, and no more threads than processes."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@cache
def warm() -> Warm:
    """The one of this test process."""
    made = Warm(environment())
    atexit.register(made.close)
    return made


def _become(arguments: Sequence[str], streams: Sequence[int], env: Mapping[str, str], cwd: str) -> NoReturn:
    """Be the process that was asked for, after a fork, as exec would make it."""
    code = 1
    try:
        for target, source in enumerate([os.dup(stream) for stream in streams]):
            os.dup2(source, target)
            os.close(source)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        tempfile.tempdir = None
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["teal", *arguments]
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False))  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True)  # noqa: SIM115
        from teal_cli.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _serve(asked: socket.socket) -> None:
    """Start what is asked for, each under a process that says its id and, when it ends, its status."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    for name in _IMPORTED:
        import_module(name)
    subprocess_handler.Popen = _Forked  # of ranks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            _watch(message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(message: bytes, descriptors: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, *streams = descriptors
    arguments, env, cwd = json.loads(message)
    child = os.fork()
    if child == 0:
        os.close(said)
        _become(arguments, streams, env, cwd)
    for stream in streams:
        os.close(stream)
    os.write(said, str(child).encode())
    os.write(said, str(os.waitpid(child, 0)[1]).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
