"""The command line: one module a verb, each parses, calls its step, and renders.

Only the verb that runs is imported: `teal --help` must not wait for torch.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from keyword import iskeyword

import typer

from teal_cli.cli.completion import words_typed
from teal_cli.cli.help import VerbCommand
from teal_cli.errors import EXIT_INTERRUPTED, MachineError, TealError, as_teal_error, printable
from teal_cli.ranks.environment import LOST, end_with_launcher, is_rank, tell_launcher
from teal_cli.report.streams import prepare_streams, silence

VERBS = {
    "calibrate": "Measure a model's hidden states on text.",
    "adapt": "Train a model to do with less: sparsity that is learned, not only found.",
    "export": "Write a TEAL checkpoint: thresholds beside the weights.",
    "generate": "Stream text from a sparse model.",
    "bench": "Time decoding, dense against sparse.",
    "eval": "Compare sparse with dense on held-out text.",
    "serve": "Serve a sparse model over HTTP, as OpenAI's API, with a chat page.",
    "run": "Run the whole chain of a YAML recipe; resumes where it stopped.",
    "import": "Read the histograms and greedy lookups of the method's reference code.",
    "report": "Write one page with plots about a run: quality, speed, sparsity.",
    "inspect": "Say what a TEAL checkpoint or a run folder holds.",
    "info": "Say what this machine and its libraries can do, and list model aliases.",
}

_KEPT = {
    "run": "finished stages are kept",
    "adapt": "the same command goes on from its last checkpoint, if it has written one",
}
"""Of what Ctrl-C ended, by verb."""
_LONGEST_LINE = 2_000
_READ = 4 * _LONGEST_LINE
"""Of a message, before blanks are taken out."""


def _placeholder() -> None:
    """Stands for a verb that is only listed."""


def _command(verb: str) -> Callable[..., Callable[[], None]]:
    module = f"{verb}_" if iskeyword(verb) else verb
    command: Callable[..., Callable[[], None]] = import_module(f"teal_cli.cli.{module}").command
    return command


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The typer app for one command line, or the one that a shell completes; verbs that it lacks are placeholders."""
    app = typer.Typer(
        name="teal",
        help="Faster decoding of language models by training-free activation sparsity.",
        rich_markup_mode="rich",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from teal_cli.version import __version__

            typer.echo(f"teal {__version__}")
            raise typer.Exit

    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        pass

    app.callback(invoke_without_command=False)(root)
    wanted = next((word for word in (*arguments, *words_typed(os.environ)) if word in VERBS), None)
    for verb, text in VERBS.items():
        app.command(verb, cls=VerbCommand, help=text)(_command(verb) if verb == wanted else _placeholder)
    return app


def _fail(message: str, code: int) -> int:
    line = printable(" ".join(message[:_READ].split()))
    if max(len(line), len(message)) > _LONGEST_LINE:
        line = f"{line[:_LONGEST_LINE]}... (cut)"
    if not tell_launcher(line):
        print(f"teal: {line}", file=sys.stderr)
    return code


def _interrupted(arguments: Sequence[str]) -> int:
    verb = next((word for word in arguments if word in VERBS), "")
    return _fail("; ".join(["interrupted", *([_KEPT[verb]] if verb in _KEPT else [])]), EXIT_INTERRUPTED)


def _parse(arguments: Sequence[str]) -> Callable[[], None] | int:
    """What a command line asks for, ready to run; an exit code where that was said already, as of --help."""
    try:
        found: Callable[[], None] | int | None = build_app(arguments)(
            args=list(arguments), prog_name="teal", standalone_mode=False
        )
    except SystemExit as stop:  # of completion; and typer and rich exit with 1 where a pipe has no reader
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 0
    return 0 if found is None else found


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the process's exit code.

    --debug may stand anywhere.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    code = _run(arguments, debug)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # said already
        silence(sys.stdout)
    return code


def _lost_rank(error: Exception) -> TealError | None:
    """What a GPU says of a wait for another rank that was given up."""
    return MachineError(LOST) if is_rank() and "CUDA error" in str(error) else None


def _run(arguments: Sequence[str], debug: bool) -> int:
    try:
        asked = _parse(arguments)
        if asked == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this
            return _interrupted(arguments)
        if isinstance(asked, int):
            sys.stdout.flush()
            return asked
        asked()  # outside of typer, which takes an end of file for Ctrl-C and exits with 1 after a closed pipe
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments)
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        return 0
    except Exception as error:
        known = as_teal_error(error) or _lost_rank(error)
        if debug:
            print(printable(traceback.format_exc()), file=sys.stderr)
        if known is not None:
            return _fail(str(known), known.exit_code)
        format_message = getattr(error, "format_message", None)
        if format_message is not None:  # what typer found wrong with the command line itself
            context = getattr(error, "ctx", None)  # of the verb, where it was known
            asked_of = "teal" if context is None else context.command_path
            return _fail(f"{format_message()} ({asked_of} --help)", 2)
        return _fail(f"unexpected {type(error).__name__}: {error} (a defect of teal; --debug shows where)", 1)


def main() -> None:
    """Entry point of the `teal` script."""
    end_with_launcher()
    prepare_streams()
    code = run(sys.argv[1:])
    silence(sys.stderr)  # all is said; where memory is short, libraries print tracebacks as the process ends
    if is_rank():
        if code:
            os._exit(code)  # an orderly end would wait for the other ranks
        _leave_ranks()
    sys.exit(code)


def _leave_ranks() -> None:
    """End this process's group first: one that ends with Gloo's threads at work is aborted now and then."""
    if group := sys.modules.get("teal_cli.ranks.group"):  # torch is imported by it; --help has none
        group.leave()
