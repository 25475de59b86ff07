"""`teal serve`."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from teal_cli.config.decoding import DecodingConfig, check_speculation
from teal_cli.config.shared import MOST
from teal_cli.config.sparsity import OneAllocation
from teal_cli.config_values import Backend, Drafts, NameList, SparsityList
from teal_cli.speculation import MOST_DRAFTED


class ServeConfig(OneAllocation, DecodingConfig):
    """`teal serve`."""

    sparsity: SparsityList | None = Field(
        None,
        description="targets that requests may ask for beside 0, which is dense; those that name none get the first "
        "(default 0.5, or the folder's own), with speculate 0",
    )
    speculate: Drafts | None = Field(
        None,
        description="write dense replies from drafts, faster and the same: lookup, sparse, int8, int4 or int4:GROUP, "
        "or several as lookup+int4+sparse; sparse ones skip at the first sparsity (docs/speculation.md)",
    )
    draft_tokens: int | None = Field(
        None, ge=1, le=MOST_DRAFTED, description="with speculate: tokens of a draft (default: as many as pay, or none)"
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 is every one of this machine")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    allowed_hosts: NameList = Field(
        default_factory=list,
        description="names that requests may call this server by, comma-separated, beside localhost and addresses; "
        "* is any",
    )
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key which requests must carry"
    )
    slots: int = Field(8, ge=1, le=8, description="sequences that decode together, at most")
    queue: int = Field(64, ge=0, lt=MOST, description="requests that wait, at most; those past it get status 429")
    context: int | None = Field(
        None, ge=2, lt=MOST, description="tokens of a prompt and its reply, at most (default the model's, at most 4096)"
    )
    max_new_tokens: int = Field(1024, ge=1, lt=MOST, description="tokens of a reply, at most")
    max_seconds: float = Field(600.0, gt=0, allow_inf_nan=False, description="seconds of a reply, at most")
    max_body_bytes: int = Field(4 << 20, ge=1 << 10, lt=MOST, description="bytes of a request, at most")
    drain_seconds: int = Field(30, ge=0, lt=MOST, description="seconds that replies under way get when the server ends")
    temperature: float = Field(
        1.0, ge=0, le=100, allow_inf_nan=False, description="of requests that name none; 0 is greedy"
    )
    chat: bool | None = Field(None, description="serve chats by the model's chat template (default: if it has one)")
    backend: Backend = Field("auto", description="sparse kernels; a backend that is named runs or fails")

    @model_validator(mode="after")
    def _drafts_fit(self) -> Self:
        drafts = [] if self.speculate is None else [self.speculate]
        check_speculation(self, drafts, self.sparsity if any(own.sparse for own in drafts) else None)
        return self

    @model_validator(mode="after")
    def _temperature_does_not_overflow(self) -> Self:
        if 0 < self.temperature < 0.01:  # logits divided by less overflow
            raise ValueError("temperature (flag --temperature) is 0 for greedy, else at least 0.01")
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, hosts: list[str]) -> list[str]:
        wrong = next((host for host in hosts if ":" in host or "/" in host), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is no name: give it without a port, scheme or path (addresses need no entry)")
        return hosts

    @model_validator(mode="after")
    def _a_reply_fits_into_a_slot(self) -> Self:
        given = "max_new_tokens" in self.model_fields_set
        if self.context is not None and given and self.max_new_tokens >= self.context:
            raise ValueError(
                "max_new_tokens (flag --max-new-tokens) is more than context (flag --context) has room for"
            )
        return self
