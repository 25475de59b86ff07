"""Requests, as OpenAI's API has them: what is taken, what is refused, and between which bounds.

A field that would change the reply and is not served is refused, unless it says what is done anyway. Fields that only
label a request are taken and not used.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

MOST_CHOICES = 8
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_PROMPTS = 64
MOST_TOKENS = 1 << 20
"""Of a prompt that comes as tokens."""
MOST_FIELDS = 64
"""Of one object: pydantic makes an error for each that is not known."""
_LONGEST_STOP = 256
_MOST_SEED = (1 << 63) - 1


def _check_text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("there is half a surrogate pair in it, which is no character")
    return text


Text = Annotated[str, AfterValidator(_check_text)]


def _asks_for_nothing(value: object) -> object:
    if value:
        raise ValueError("this is not served here: leave it out")
    return value


_NOT_SERVED = BeforeValidator(_asks_for_nothing)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP), AfterValidator(_check_text)]],
    Field(max_length=MOST_STOPS, fail_fast=True),
    BeforeValidator(_as_list),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_not_too_many_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise ValueError(f"{len(value):,} fields: nothing here has more than {MOST_FIELDS}")
        return value


class TextPart(_Strict):
    """A piece of a message; of other kinds than text there is none."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Strict):
    """A function that the model called, in an earlier turn."""

    name: Text
    arguments: Text
    """JSON."""


class ToolCall(_Strict):
    """A call of a tool, in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    # Of replies that are sent back whole, as OpenAI's client dumps them.
    refusal: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0, fail_fast=True)] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: Text | None = None
    """Taken, and not shown to the model: templates differ in whether they want it."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are of role assistant")
        return self

    @property
    def text(self) -> str:
        """The content, whose parts are put together."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    """The name of a function."""

    name: Text


class NamedTool(_Strict):
    """The tool that the reply must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    """A schema that the reply has to follow."""

    name: Text = ""
    description: Text | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the reply has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self

    @property
    def schema_of_reply(self) -> dict[str, JsonValue] | None:
        """The JSON schema; None where any text will do."""
        if self.type == "text":
            return None
        found = None if self.json_schema is None else self.json_schema.schema_
        return {"type": "object"} if found is None else found


class StreamOptions(_Strict):
    """What a stream says besides."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With it: in each event what there is so far, as vLLM says it. An event may have several tokens."""
    include_obfuscation: Literal[False] | None = None


class SamplingRequest(_Strict):
    """What chats and completions share."""

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """0 and -1 are off."""
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """One of the levels that /v1/models lists; 0 is dense."""
    # What is not served, by the values that ask for nothing.
    frequency_penalty: Annotated[float | None, _NOT_SERVED] = None
    presence_penalty: Annotated[float | None, _NOT_SERVED] = None
    logit_bias: Annotated[dict[str, JsonValue] | None, _NOT_SERVED] = None
    # Labels.
    user: Text | None = None
    metadata: JsonValue = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @model_validator(mode="after")
    def _temperature_does_not_overflow(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < 0.01:
            raise ValueError("temperature is 0 for greedy, else at least 0.01")
        return self


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit")
        if self.tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tools and response_format do not go together")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice required goes with tools")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise ValueError(f"tool_choice names {name[:64]!r}, which is none of tools")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Of the reply, if the request says so."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As `Request.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


Tokens = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)
]
_SEVERAL = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], _SEVERAL] | Annotated[list[Tokens], _SEVERAL]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of them, as text or tokens."""
        value: Any = self.prompt
        return [value] if isinstance(value, str) or isinstance(value[0], int) else value

    @property
    def most_tokens(self) -> int | None:
        """Of the reply, if the request says so."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As `Request.logprobs`."""
        return self.logprobs
