"""JSON results: which verb made one, and whether it holds what tables and plots take from it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from teal_cli.checkpoint.fields import (
    AboveZero,
    Amount,
    Content,
    Count,
    Flag,
    Measure,
    Moment,
    Name,
    Positive,
    Share,
    Size,
    Sparsity,
    Text,
    Versions,
    checked,
)
from teal_cli.errors import ArtefactError
from teal_cli.reading import read_json

Kind = Literal["eval", "encoder", "bench", "generate"]
"""Verb of a result; `encoder` is an eval of an encoder, whose measures are others."""
_NUMBERS = {
    *("perplexity", "perplexity_ratio", "over_first_dense", "kl", "dense_text_perplexity", "sparse_text_perplexity"),
    *("cosine", "least_cosine", "relative_error"),
}
"""Measures that are a number in any result; whatever else is null was not measured."""
_DEEPEST = 50
"""Mappings and lists inside one another: more than any result has."""


def _runs_alike(runs: list["_EvalRun"]) -> list["_EvalRun"]:
    if len({run.generation is None for run in runs}) > 1:
        raise ValueError("some have continuations and some have none")
    return runs


class _Made(Content):
    """How a result came to be; older ones do not say."""

    finished: Moment | None = None
    command: Text | None = None
    config: dict[str, Any] | None = None
    mode: Name | None = None
    quantization: Name = ""


class _Median(Content):
    median: Positive


class _Spread(_Median):
    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> "_Spread":
        if not self.min <= self.median <= self.max:
            raise ValueError("the median does not lie between the least and the greatest")
        return self


class _Perplexity(Content):
    perplexity: AboveZero
    stderr: Amount | None
    bytes_per_token: Count | None = None


class _SparsePerplexity(Content):
    perplexity: AboveZero
    stderr: Amount | None
    bytes_per_token: Count
    allocation: Name
    target_sparsity: Share
    realised_sparsity: Share
    neuron_sparsity: Share | None = None
    kl: Measure
    top1_agreement: Share


class _Sample(Content):
    prompt: Text
    dense: list[Text]
    sparse: list[Text]
    dense_choices: list[Text]
    agrees: list[Flag]

    @model_validator(mode="after")
    def _as_long(self) -> "_Sample":
        if not len(self.sparse) == len(self.dense_choices) == len(self.agrees):
            raise ValueError("its lists are not of one length")
        return self


class _Generation(Content):
    prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    identical: Share
    tokens_until_difference: Amount
    top1_agreement: Share
    dense_text_perplexity: AboveZero
    sparse_text_perplexity: AboveZero
    realised_sparsity: Share
    samples: list[_Sample] | None = None


class _Scores(Content):
    dense: dict[Name, Measure | Flag]
    sparse: dict[Name, Measure | Flag]


class _EvalRun(Content):
    quantization: Name = ""
    dense_prefix: Count
    tokens: Count
    sequences: Count
    dense: _Perplexity
    sparse: _SparsePerplexity
    perplexity_ratio: AboveZero
    perplexity_ratio_stderr: Amount | None
    over_first_dense: Measure | None = None
    generation: _Generation | None
    tasks: dict[Name, _Scores]
    realised_by_projection: dict[Name, Share] = Field(default_factory=dict)


class _Eval(_EvalRun, _Made):
    model: Name
    dataset: Name
    half: Name
    seq_len: Count
    dense_bytes_per_token: Count
    device: Name
    dtype: Name
    versions: Versions
    runs: Annotated[list[_EvalRun], Field(min_length=1), AfterValidator(_runs_alike)]


class _EncoderRun(Content):
    allocation: Name
    target_sparsity: Share
    realised_sparsity: Share
    sequences: Count
    tokens: Count
    cosine: Measure
    cosine_stderr: Amount | None
    least_cosine: Measure
    relative_error: Measure
    realised_by_projection: dict[Name, Share] = Field(default_factory=dict)


class _Encoder(_Made):
    kind: Literal["encoder"]
    model: Name
    dataset: Name
    half: Name
    seq_len: Count
    device: Name
    dtype: Name
    versions: Versions
    runs: Annotated[list[_EncoderRun], Field(min_length=1)]


class _BenchRun(Content):
    quantization: Name = ""
    backend: Name
    allocation: Name | None = None
    sparsity: Share
    realised_sparsity: Share
    neuron_sparsity: Share | None = None
    tokens_per_second: _Spread
    speedup: Positive
    bytes_per_token: Count | None
    bandwidth_gb_s: Amount | None
    limit_tokens_per_second: Positive | None


class _Product(Content):
    out_features: Size
    in_features: Size
    realised_sparsity: Sparsity
    microseconds: _Median


class _Kernel(_Product):
    backend: Name
    sparsity: Share
    realised_sparsity: Share
    neuron_sparsity: Share | None = None
    microseconds: _Spread
    gb_s: Amount
    speedup: Positive


class KernelTable(Content):
    """What allocation fisher takes from a result of `teal bench --kernels`."""

    kernels: list[_Product]


class _Bench(_Made):
    model: Name
    device: Name
    dtype: Name
    versions: Versions
    batch: Count
    prompt_tokens: Count
    new_tokens: Count
    repeats: Count
    general_because: Text | None
    reading_gb_s: Amount | None
    runs: Annotated[list[_BenchRun], Field(min_length=1)]
    kernels: list[_Kernel]


class _Generate(_Made):
    model: Name
    prompt: Text
    text: Text
    tokens: Count
    tokens_per_second: Amount | None
    target_sparsity: Share
    realised_sparsity: Share | None


class _Calibrate(_Made):
    model: Name
    tokens: Count


class _Adapt(_Made):
    folder: Name
    recipe: Name
    tokens: Count


class _Export(_Made):
    folder: Name
    allocation: Name
    target_sparsity: Share


_KINDS: dict[Kind, type[Content]] = {"encoder": _Encoder, "eval": _Eval, "bench": _Bench, "generate": _Generate}
_STAGES: dict[str, tuple[type[Content], ...]] = {
    "calibrate": (_Calibrate,),
    "adapt": (_Adapt,),
    "export": (_Export,),
    "eval": (_Encoder, _Eval),
    "bench": (_Bench,),
    "generate": (_Generate,),
}
_ADVICE = "make it again, or take it away"


def kind_of_result(content: Mapping[str, Any], path: Path) -> Kind | None:
    """Which kind of result a mapping is, by its keys; None of somebody else's.

    Raises:
        ArtefactError: it has the keys of a kind, and a value in it cannot be.
    """
    for kind, values in _KINDS.items():
        if _has_keys(content, values):
            checked(values, content, "result", path, _ADVICE)
            return kind
    return None


def check_stage(stage: str, content: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no result of a stage.

    Raises:
        ArtefactError: a missing key, or a value that cannot be.
    """
    kinds = [values for values in _STAGES[stage] if _has_keys(content, values)] or [_STAGES[stage][-1]]
    checked(kinds[0], content, f"result of teal {stage}", path, _ADVICE)


def _has_keys(content: Mapping[str, Any], values: type[Content]) -> bool:
    return all(name in content for name, field in values.model_fields.items() if field.is_required())


def read_result(file: Path) -> dict[str, Any]:
    """A JSON result of any verb, in which measures that were no finite number, null in JSON, are NaN again.

    Raises:
        ArtefactError: missing, not JSON, not a mapping, or nested deeper than any result.
    """
    try:
        found: dict[str, Any] = _numbers_back(read_json(file, "result"))
    except RecursionError as error:
        raise ArtefactError(f"result {file} is nested too deep; make it again, or take it away") from error
    return found


def _numbers_back(value: Any, key: str = "", of_tasks: bool = False, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        of_tasks = of_tasks or key == "tasks"
        return {_whole(name): _numbers_back(entry, name, of_tasks, depth + 1) for name, entry in value.items()}
    if isinstance(value, list):
        return [_numbers_back(entry, depth=depth + 1) for entry in value]
    if isinstance(value, str):
        return _whole(value)
    return math.nan if value is None and (of_tasks or key in _NUMBERS) else value


def _whole(text: str) -> str:
    """Text without halves of characters, which JSON can hold and no file."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
