"""What went wrong with a request, in the form that clients of OpenAI's API know."""

from collections.abc import Sequence
from typing import Any

from teal_cli.decode.requests import QueueFullError
from teal_cli.errors import MachineError, TealError, UsageError, nearest, printable, shortened

_LONGEST_MESSAGE = 500
RETRY_SECONDS = 1
"""What a client is told to wait where the queue is full: replies end all the time."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line: what is wrong and what to do.
        param: the field of the request that is wrong, such as `messages.0.content`.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = shortened(printable(" ".join(message.split())), _LONGEST_MESSAGE)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, or how to authenticate."""
        if self.status == 429:
            return {"Retry-After": str(RETRY_SECONDS)}
        if self.status == 503:
            return {"Retry-After": str(5 * RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def as_api_error(error: Exception) -> ApiError:
    """The answer to a request that an exception of ours ended; 500 where the fault is not the request's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"{error}: try again later", code="queue_full")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, MachineError):
        return ApiError(503, str(error), code="machine")
    if isinstance(error, TealError):
        return ApiError(500, str(error), code="model")
    return ApiError(500, "the server failed; its log says more")


def invalid_request(problems: Sequence[Any], known: Sequence[str]) -> ApiError:
    """What pydantic found wrong with a request: of the first field that is wrong, by its name.

    Args:
        problems: of a `ValidationError`.
        known: fields of the request.
    """
    problem = _most_telling(problems)
    place = _place(problem)
    param = shortened(printable(".".join(place)), 100) or None
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        hint = nearest(place[-1], known) if len(place) == 1 else ""
        return ApiError(400, f"unknown field {param!r}{hint}", param=param, code="unknown_field")
    message = str(problem["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    message = message[:1].lower() + message[1:]
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return ApiError(400, f"{param}: {message}{more}" if param else f"{message}{more}", param=param)


def _most_telling(problems: Sequence[Any]) -> Any:
    """Of the first field's problems: of a value that may have several types there is one for each that it is not.

    It was most likely meant as the type that fits the farthest; a length is wrong only where the type is right.
    """
    of_first = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    return max(of_first, key=lambda problem: (problem["type"] in ("too_long", "too_short"), len(_place(problem))))


def _place(problem: Any) -> list[str]:
    """Names of fields and numbers of items, without the types that pydantic puts between, such as `list[int]`."""
    place = problem["loc"]
    is_unknown = problem["type"] == "extra_forbidden"  # its name may be anything
    return [
        str(part)
        for index, part in enumerate(place)
        if isinstance(part, int) or part.isidentifier() or (is_unknown and index == len(place) - 1)
    ]
