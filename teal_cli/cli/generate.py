"""`teal generate`: one prompt, stdin, or a conversation on a terminal."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import prepare, write_result
from teal_cli.cli.ranks import run_by_ranks
from teal_cli.config import GenerateConfig
from teal_cli.console import Reporter
from teal_cli.errors import TealError, UsageError, printable
from teal_cli.ranks.environment import is_first, is_rank
from teal_cli.report.streams import silence

if TYPE_CHECKING:  # importing the step imports torch, which --help must not
    from teal_cli.steps.generate import Generator, Reply

_LONGEST_PROMPT = 1 << 24


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(GenerateConfig, "generate", flags, config_file)
    interactive = config.prompt is None
    if interactive and config.tensor_parallel > 1:
        raise UsageError("tensor_parallel (flag --tensor-parallel) needs a prompt (flag --prompt)")
    if interactive and not sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT, or --prompt - to read stdin")
    if interactive and config.json_file is not None:
        raise UsageError("json (flag --json) needs a prompt (flag --prompt)")
    kept = None
    if config.prompt != "-":
        _check_prompt(config.prompt)
    elif config.tensor_parallel > 1 and not is_rank():
        _check_prompt(kept := _keep_stdin())
    if run_by_ranks(config, reporter, prompt=kept):
        return
    prompt = _read_by_first(config) if config.prompt == "-" else config.prompt
    _check_prompt(prompt)
    from teal_cli.steps.generate import Generator

    if prompt is None:
        converse(Generator(config, reporter), reporter)
        return
    messages = [{"role": "user", "content": prompt}]
    generator = Generator(config, reporter, messages=messages)
    failed: list[OSError] = []
    write = _writer(None if config.json_file is None else failed)
    if config.tensor_parallel > 1 and not is_first():  # under torchrun all have a stdout
        write = _write_nothing
    reply = generator.reply(messages, write=write)
    write("\n")
    reporter.say(summary(reply))
    write_result(config, generator.to_json(prompt, reply))
    if reply.interrupted:
        raise KeyboardInterrupt
    if failed and not isinstance(failed[0], BrokenPipeError):
        raise failed[0]


def _write_nothing(text: str) -> None:
    """Another rank writes it."""


def _check_prompt(prompt: str | None) -> None:
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt (flag --prompt) is empty")


def _keep_stdin() -> str:
    """Put a file of what stdin says in its place, for ranks to find: one that waits for a slow pipe seems to hang."""
    text = read_stdin()
    with TemporaryFile() as file:
        file.write(text.encode(sys.stdin.encoding))
        file.seek(0)
        os.dup2(file.fileno(), 0)
    return text


def _read_by_first(config: GenerateConfig) -> str:
    """stdin, which all ranks share and the first one reads."""
    if config.tensor_parallel == 1:
        return read_stdin()
    text = read_stdin() if is_first() else ""  # before it joins: others wait longer for that
    from teal_cli.model_loading import ranks_for

    ranks = ranks_for(config)
    return text if ranks is None else ranks.said_by_first(text)


def _expect_utf8(newline: str | None = None) -> None:
    """Take ASCII, which a locale says that knows no better, for UTF-8."""
    stream = sys.stdin
    if isinstance(stream, io.TextIOWrapper):
        encoding = "utf-8" if stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968") else stream.encoding
        stream.reconfigure(encoding=encoding, errors="strict", newline=newline)


def read_stdin() -> str:
    """A prompt, as it is: white space at both ends and line ends are parts of it.

    Raises:
        UsageError: not UTF-8 (or what the locale says), too long, or not readable.
    """
    stream = sys.stdin
    _expect_utf8(newline="")
    try:
        text = stream.read(_LONGEST_PROMPT + 1)
    except UnicodeError as error:
        raise UsageError(
            f"the prompt on stdin is not {stream.encoding} ({error}): convert it, as iconv does"
        ) from error
    except OSError as error:
        raise UsageError(f"stdin cannot be read: {error.strerror}") from error
    if len(text) > _LONGEST_PROMPT:
        raise UsageError(f"the prompt on stdin has more than {_LONGEST_PROMPT:,} characters")
    return text


def converse(generator: "Generator", reporter: Reporter) -> None:
    """Replies to line after line. Ctrl-C ends a reply, Ctrl-D (or /exit) the session; /new forgets.

    What a stopped reply has said stays in the conversation. A reply in which nothing is said leaves no turn, and its
    line is taken back.
    """
    hint = "Ctrl-C ends a reply, Ctrl-D the session" + ("; /new starts over" if generator.chat else "")
    intrinsic = generator.config.mode == "intrinsic"
    sparsity = "intrinsic sparsity" if intrinsic else f"target sparsity {generator.target_sparsity:g}"
    reporter.say(f"{generator.name}, {sparsity}. {hint}.")
    messages: list[dict[str, str]] = []
    _expect_utf8()
    write = _writer()
    while True:
        try:
            line = input("> ").strip()
            line.encode()
        except ValueError:
            reporter.say("that line is not UTF-8: it was left out")
            continue
        except EOFError:
            reporter.say("")
            return
        except KeyboardInterrupt:
            reporter.say("\n(Ctrl-D leaves)")
            continue
        if line == "/exit":
            return
        if line == "/new":
            messages = []
        if not line or line == "/new":
            continue
        # Without a template a model has no notion of turns: each line stands alone.
        messages = (
            [*messages, {"role": "user", "content": line}] if generator.chat else [{"role": "user", "content": line}]
        )
        reply: Reply | None
        try:
            reply = generator.reply(messages, write=write)
        except TealError as error:  # the conversation has grown too long, say: the session goes on
            reporter.say(f"{error} (/new starts over)")
            messages = messages[:-1]
            continue
        except KeyboardInterrupt:  # before the prefill, in what is measured once
            reply = None
        if reply is None or not reply.text:
            # No template has a turn in which nothing is said, and no model was trained on one.
            stopped = reply is None or reply.interrupted
            because = "stopped before the reply began" if stopped else "the model ended its reply at once"
            reporter.say(f"\n({because}: your line was taken back)")
            messages = messages[:-1]
            continue
        write("\n")
        reporter.say(summary(reply) + (", interrupted" if reply.interrupted else ""))
        messages.append({"role": "assistant", "content": reply.text})


def summary(reply: "Reply") -> str:
    """One line: how much, how fast, how sparse."""
    parts = [f"{reply.tokens} token" + "s" * (reply.tokens != 1)]
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:.1f} tokens/s")
    parts.append(f"prefill of {reply.prompt_tokens} in {reply.prefill_seconds:.2f} s")
    realised = reply.realised_sparsity
    if (speculation := reply.speculation) is not None:
        if speculation.tokens_per_pass is not None:
            parts.append(f"{speculation.tokens_per_pass:.2f} tokens a pass from drafts ({speculation.drafts})")
        if speculation.acceptance is not None:
            parts.append(f"acceptance {speculation.acceptance:.3f}")
        realised = None
    if realised is not None:
        parts.append(f"realised sparsity {realised:.3f}")
    elif reply.tokens > 1:  # the first is the prefill's: there was no step to be of either kind
        parts.append("dense")
    if reply.neuron_sparsity is not None:
        parts.append(f"{reply.neuron_sparsity:.1%} of the MLP neurons zero")
    return ", ".join(parts)


def _writer(failed: list[OSError] | None = None) -> Callable[[str], None]:
    """What writes a model's text as it comes: to a pipe or a file as it is, to a terminal what it can show.

    Args:
        failed: takes what stdout fails with, and the reply goes on, for --json; without it the reply ends there.
    """
    is_terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        try:
            print(printable(text) if is_terminal else text, end="", flush=True)
        except OSError as error:
            if failed is None:
                raise
            failed.append(error)
            silence(sys.stdout)

    return write


command = with_options(GenerateConfig, _run)
