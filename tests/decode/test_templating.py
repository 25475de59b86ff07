"""Chat templates are programs of the model: they do no harm, and their faults are the model's."""

import os
import stat
import threading
import time
from contextlib import suppress

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer
from transformers import PreTrainedTokenizerFast

from teal_cli.decode import templating
from teal_cli.decode.templating import render
from teal_cli.errors import ArtefactError, UsageError

TALK = [
    {"role": "user", "content": "a <b> & 日本\n"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d" * 5000},
]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def _with(template: object) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{{ messages | tojson }}{{ bos_token }}", "é\ud800"])
def test_as_transformers_renders(template: str) -> None:
    tokenizer = _with(template)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, TALK) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "not done after 2 seconds"),
        ("{{ 10 ** (10 ** 9) }}", "not done after 2 seconds|of memory"),
        ("{{ 'x' * 10 ** 10 }}", "of memory"),
        ("{{ '%1000000000d' % 3 }}", "of memory"),
        ("{{ 'xy' * 10 ** 7 }}", "writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 1 // 0 }}", "division"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ nothing() }}", "undefined"),
        ("{% for", "unexpected"),
        ({"tools": "x"}, "no default"),
        (5, "cannot be used"),
    ],
)
def test_faults_are_the_models(template: object, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ArtefactError, match=message) as caught:
        render(_with(template), TALK)
    assert time.perf_counter() - started < 30  # 2, on a machine that has other things to do
    assert len(str(caught.value)) < 400
    assert "--no-chat" in str(caught.value)


def test_a_refused_conversation_is_the_users() -> None:
    with pytest.raises(UsageError, match="does not take this conversation: roles alternate") as caught:
        render(_with("{{ raise_exception('roles alternate, ' ~ 'x' * 100000) }}"), TALK)
    assert len(str(caught.value)) < 300


def test_in_threads() -> None:
    """Each has a child of its own; one that loops does not hold up the others, though it began first."""
    found: list[str] = []

    def work(template: str) -> None:
        try:
            found.append(render(_with(template), TALK[:1]))
        except ArtefactError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work, args=(template,)) for template in (LOOP, *["{{ bos_token }}"] * 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[:6] == ["<s>"] * 6
    assert "not done" in found[6]


def test_a_childs_pipe_is_no_other_childs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two threads fork at once, the second child has the first one's pipe open, and must close it."""
    reading, writing = os.pipe()  # as another thread's render has
    monkeypatch.setattr(templating, "_answer", lambda *_: b"t" + _open_files().encode())
    try:
        assert render(_with("x"), TALK) == "pipe"
    finally:
        os.close(reading)
        os.close(writing)


def _open_files() -> str:
    """What is open beside the standard streams."""
    names = []
    for file in range(3, 64):
        with suppress(OSError):
            names.append("pipe" if stat.S_ISFIFO(os.fstat(file).st_mode) else "other")
    return " ".join(names)


def test_time_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that had to wait for a processor is not ended for it; one that waits for ever is."""
    monkeypatch.setattr(templating, "_answer", lambda *_: time.sleep(2.5) or b"tdone")
    assert render(_with("x"), TALK) == "done"
    monkeypatch.setattr(templating, "_PATIENCE", 0.5)
    with pytest.raises(ArtefactError, match="not done"):
        render(_with("x"), TALK)


def test_where_nothing_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("os.fork", refuse)
    assert render(_with("{{ bos_token }}"), TALK) == "<s>"
    monkeypatch.delattr("os.fork")
    with pytest.raises(ArtefactError, match="division"):
        render(_with("{{ 1 // 0 }}"), TALK)
