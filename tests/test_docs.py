"""The pages: every `teal` command and flag in them is one that the command line takes, every link leads somewhere."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from teal_cli.cli import VERBS, run
from teal_cli.config import OTHER_SPELLINGS, VERB_CONFIGS
from teal_cli.config_files import flag_name, keys_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NOTES = sorted([*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "kernels").glob("**/README.md")])


class _Taken(BaseException):
    """Raised where a verb has taken its options, and would begin to work."""


def _commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("teal ")]


_EVERY = [pytest.param(words, id=f"{page.name}: {' '.join(words)}") for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize("words", _EVERY)
def test_commands_are_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: object, **named: object) -> None:
        raise _Taken

    import_module("teal_cli.cli.run")  # takes names of cli.output when it is first imported: not those set here
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("teal_cli.cli.output.quieten_libraries", stop)
    monkeypatch.setattr("teal_cli.steps.run.run_recipe", stop)
    if words[0].startswith("--"):
        return  # of the shell's completion, which tests/cli/test_completion.py asks
    with pytest.raises(_Taken):
        run(words)


_ANYWHERE = {"--config", "--help", "--debug", "--version", "--install-completion", "--show-completion"}


_OF_RUN = {"model", "device", "dtype", "seed", "runs", "json", "quiet"}


def _flags(verb: str) -> set[str]:
    keys = set(keys_of(VERB_CONFIGS[verb])) if verb in VERB_CONFIGS else _OF_RUN
    flags = {flag_name(key) for key in keys | {OTHER_SPELLINGS.get(key, key) for key in keys}}
    return flags | {f"--no-{flag[2:]}" for flag in flags} | _ANYWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page: Path) -> None:
    """`teal VERB --flag` has a flag of that verb; `--flag` alone one of some verb."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    some = set().union(*map(_flags, VERBS))
    for code in re.findall(r"`([^`]+)`", text):
        words = code.split()
        verb = words[1] if words[0] == "teal" and len(words) > 1 else None
        if verb is None and not words[0].startswith("--"):
            continue  # of another program
        known = _flags(verb) if verb in VERBS else some
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert used <= known, f"{code}: {sorted(used - known)}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES + NOTES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, target


def test_modules_of_the_architecture_exist() -> None:
    """Every file that a row of the table of modules names; those after a folder lie in it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| module |") : text.index("An algorithm has a file")]
    for row in table.splitlines()[2:]:
        names = re.findall(r"`([\w./]+)`", row)
        folders = [ROOT, ROOT / "teal_cli"]
        for name in (name for name in names if name.endswith((".py", ".yaml", "/"))):
            found = next((folder / name for folder in reversed(folders) if (folder / name).exists()), None)
            assert found is not None, name
            folders.append(found if found.is_dir() else found.parent)
