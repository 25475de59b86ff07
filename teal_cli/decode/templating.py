"""Chat templates: programs that come with a model, run where they can do no harm.

A template may loop without end or ask for any amount of memory, and jinja2's sandbox bounds neither. So it runs in a
child of this process, which has two seconds of a processor and half a GB, and says its text through a pipe.
"""

import gc
import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from teal_cli.errors import ArtefactError, UsageError

_SECONDS = 2
"""Of a processor: on a busy machine a good template takes longer by the clock."""
_PATIENCE = 60.0
"""Seconds by the clock after which a child that got no processor is given up."""
_NOT_DONE = f"it is not done after {_SECONDS} seconds".encode()
_BYTES = 512 << 20
_CHARACTERS = 1 << 20
"""What a template may write beside the conversation, each character of which it may write four times."""
_REASON = 200
_TEXT, _REFUSED, _FAILED = b"t", b"r", b"f"
"""How an answer begins."""


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
    """A conversation as text, by the tokenizer's chat template, up to where the assistant answers.

    Args:
        tokenizer: of transformers.
        messages: as the template wants them.
        tools: that the model may call, as JSON schemas of functions.

    Raises:
        UsageError: the template refuses the conversation, such as one whose roles do not alternate.
        ArtefactError: the template fails, or takes too much time or memory, or writes too much.
    """
    from transformers.utils import chat_template_utils  # noqa: F401  (before the fork: the child should not import)

    most = _CHARACTERS + 4 * len(json.dumps([messages, tools], default=str))
    answer = _in_child(lambda: _answer(tokenizer, messages, tools, most), 1 + 4 * most)
    kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
    if kind == _TEXT:
        return text
    if kind == _REFUSED:
        raise UsageError(f"the model's chat template does not take this conversation: {text}")
    raise ArtefactError(f"the model's chat template cannot be used: {text or 'it crashed'}; use --no-chat")


def _answer(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, most: int
) -> bytes:
    """What the template makes, or why it makes nothing."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True
        )
        if len(text) > most:
            return _FAILED + f"it writes more than {most:,} characters".encode()
        return _TEXT + str(text).encode("utf-8", "surrogatepass")
    except MemoryError:
        return _FAILED + f"it needs more than {_BYTES >> 20} MB of memory".encode()
    except RecursionError:
        return _FAILED + b"it calls itself without end"
    except Exception as error:  # a template can raise whatever Python does
        # transformers raises this very class where a template calls raise_exception.
        kind = _REFUSED if type(error) is TemplateError else _FAILED
        reason = " ".join(str(error)[: 4 * _REASON].split())[:_REASON] or type(error).__name__
        return kind + reason.encode("utf-8", "replace")


def _in_child(work: Callable[[], bytes], most: int) -> bytes:
    """What `work` returns, run in a forked child: it has no effect here.

    Args:
        work: pure Python; other threads do not exist in the child.
        most: bytes that it may return.
    """
    if not hasattr(os, "fork"):
        return work()
    reading, writing = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no more processes, or no memory to promise to another
        os.close(reading)
        os.close(writing)
        return work()
    if child == 0:
        try:
            close_all_but(writing)
            _limit()
            rest = memoryview(work())
            while rest:
                rest = rest[os.write(writing, rest) :]
        finally:  # whatever happened: none of the parent's exit handlers, none of its buffers
            os._exit(0)
    os.close(writing)
    answer = b""
    try:
        answer = _read(reading, most)
    finally:
        os.close(reading)
        ended_by = _end(child)
    return _FAILED + _NOT_DONE if not answer and ended_by == signal.SIGXCPU else answer


def _end(child: int) -> int:
    """End a child, if it has not ended, and return the signal that ended it (0: none)."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return 0


def close_all_but(pipe: int) -> None:
    """Close what this child has open beside a pipe and the standard streams.

    A child that another thread forks at the same time has the writing end of the first one's pipe, which would not
    end before both children have.
    """
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))


def _limit() -> None:
    """Bound this process's time and memory; Ctrl-C is the parent's."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    gc.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError):  # a limit of the user's that is lower
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    with suppress(OSError, ValueError):  # no /proc, or a lower limit again
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))


def _read(pipe: int, most: int) -> bytes:
    """Everything that comes through a pipe, or an answer that says what was wrong with it."""
    until, answer = time.monotonic() + _PATIENCE, bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, until - time.monotonic())):
                return _FAILED + _NOT_DONE
            piece = os.read(pipe, 1 << 20)
            if not piece:
                return bytes(answer)
            answer += piece
            if len(answer) > most:
                return _FAILED + f"it writes more than {most:,} bytes".encode()
