"""Requests that are wrong in many places at once: one error, of the field that is wrong."""

import pytest

pytest.importorskip("fastapi")

from pydantic import ValidationError

from teal_cli.serve.app import parsed
from teal_cli.serve.errors import ApiError
from teal_cli.serve.schemas import ChatRequest, CompletionRequest

_MANY = 20_000
_TEXTS = ",".join(['"a"'] * _MANY)
_FIELDS = ",".join(f'"{number:x}":1' for number in range(_MANY))
_MESSAGES = '{"model":"m","messages":[%s]}'


def _refused(kind: type, body: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(kind, body.encode())
    return caught.value


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, f'{{"model":"m","prompt":[{_TEXTS}]}}', "prompt"),
        (CompletionRequest, f'{{"model":"m","prompt":[[{_TEXTS}]]}}', "prompt.0.0"),
        (CompletionRequest, f'{{"model":"m","prompt":"a","stop":[{",".join(["1"] * _MANY)}]}}', "stop.0"),
        (CompletionRequest, f'{{"model":"m","prompt":"a",{_FIELDS}}}', None),
        (CompletionRequest, f'{{"model":"m","prompt":"a","logit_bias":{{{_FIELDS}}}}}', "logit_bias"),
        (ChatRequest, _MESSAGES % _TEXTS, "messages.0"),
        (ChatRequest, _MESSAGES % f'{{"role":"user","content":[{_TEXTS}]}}', "messages.0.content.0"),
        (ChatRequest, _MESSAGES % f'{{"role":"user","content":"a",{_FIELDS}}}', "messages.0"),
        (ChatRequest, f'{_MESSAGES[:-2] % ""}],"modalities":[{_TEXTS}]}}', "messages"),
    ],
)
def test_an_error_is_not_made_for_each_item(kind: type, body: str, param: str | None) -> None:
    error = _refused(kind, body)
    assert (error.status, error.param) == (400, param)
    cause = error.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() < 10


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, '{"model":"m","prompt":[]}', "prompt"),
        (CompletionRequest, '{"model":"m","prompt":[1,"a"]}', "prompt.1"),
        (CompletionRequest, '{"model":"m","prompt":"a","stop":[1]}', "stop.0"),
        (CompletionRequest, '{"model":"m","prompt":"a","what-is-it":1}', "what-is-it"),
        (ChatRequest, _MESSAGES % '{"role":"user","content":[{"type":"image_url"}]}', "messages.0.content.0.type"),
        (ChatRequest, _MESSAGES % '{"role":"user","content":5}', "messages.0.content"),
        (ChatRequest, _MESSAGES % '{"role":"user","content":"a","x y":5}', "messages.0.x y"),
    ],
)
def test_the_field_that_is_wrong_is_named(kind: type, body: str, param: str) -> None:
    assert _refused(kind, body).param == param
