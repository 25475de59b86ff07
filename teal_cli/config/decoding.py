"""What is skipped while decoding: `teal generate` and `teal bench`."""

from typing import Self

from pydantic import Field, model_validator

from teal_cli.config.shared import MOST
from teal_cli.config.sparsity import OneAllocation, SparseConfig
from teal_cli.config_values import (
    Backend,
    Compile,
    Drafts,
    DraftsList,
    InputFile,
    Mode,
    QuantisationList,
    Sparsity,
    SparsityList,
    TokenList,
)
from teal_cli.speculation import MOST_DRAFTED, Speculation

_OF_CALIBRATED = (
    "sparsity",
    "calibration",
    "allocation",
    "limits",
    "cost",
    "recalibrate",
    "quantise",
    "also_quantise",
    "kernels",
)
"""Keys that mode intrinsic does not take: nothing is calibrated there."""


class DecodingConfig(SparseConfig):
    """What is skipped while decoding."""

    mode: Mode = Field(
        "calibrated",
        description="calibrated: skip inputs below thresholds; intrinsic: skip only the zeros of a model that was "
        "trained with relu, fatrelu, drelu or relu2 (no calibration)",
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="processes that hold the model together, a GPU each; 1 is this one alone"
    )
    peer_timeout: float = Field(
        120.0, gt=0, le=3600, allow_inf_nan=False, description="with tensor_parallel: seconds to wait for a process"
    )

    @model_validator(mode="after")
    def _zeros_are_of_one_process(self) -> Self:
        if self.tensor_parallel > 1 and self.mode == "intrinsic":
            raise ValueError(
                "tensor_parallel (flag --tensor-parallel) does not divide models of mode intrinsic (flag --mode)"
            )
        return self

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


def check_speculation(config: DecodingConfig, drafts: list[Speculation], sparsities: list[float] | None) -> None:
    """Refuse options that contradict drafts.

    Args:
        config: of a verb that has `draft_tokens`.
        drafts: of `speculate`, none where it was not given.
        sparsities: that were asked for of drafts; None where none was.

    Raises:
        ValueError: what is wrong, by key and flag.
    """
    if not drafts:
        if getattr(config, "draft_tokens", None) is not None:
            raise ValueError("draft_tokens (flag --draft-tokens) needs speculate (flag --speculate)")
        return
    if config.mode == "intrinsic":
        raise ValueError(
            "mode intrinsic (flag --mode) skips nothing that counts: leave out speculate (flag --speculate)"
        )
    if config.tensor_parallel > 1:
        raise ValueError(
            "speculate (flag --speculate) decodes in one process: leave out tensor_parallel (flag --tensor-parallel)"
        )
    if getattr(config, "compile", "auto") == "always":
        raise ValueError("speculate (flag --speculate) compiles nothing: leave out compile (flag --compile)")
    sparse = any(own.sparse for own in drafts)
    if sparse and sparsities is not None and not any(sparsities):
        raise ValueError("speculate (flag --speculate) sparse needs a sparsity above 0 (flag --sparsity)")
    if not sparse and sparsities is not None and any(sparsities):
        raise ValueError(
            "sparsity (flag --sparsity) is that of drafts where speculate (flag --speculate) is given: add +sparse to "
            "it, or leave sparsity out"
        )


class GenerateConfig(OneAllocation, DecodingConfig):
    """`teal generate`."""

    prompt: str | None = Field(None, description="the prompt; - reads stdin; none on a terminal: interactive")
    sparsity: Sparsity | None = Field(
        None, description="target in [0, 1); 0 is dense (default 0.5, or the folder's own)"
    )
    max_new_tokens: int = Field(256, ge=1, lt=MOST, description="at most so many tokens per reply")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 is greedy; else at least 0.01")
    top_k: int = Field(0, ge=0, lt=MOST, description="sample among the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens of this joint probability")
    chat: bool | None = Field(None, description="use the model's chat template (default: if it has one)")
    stop: TokenList = Field(default_factory=list, description="more stop tokens, comma-separated")
    backend: Backend = Field("auto", description="sparse kernels; a backend that is named runs or fails")
    compile: Compile = Field(
        "auto",
        description="torch.compile of steps that decode by transformers' forward: auto where so many tokens pay for it "
        "and it measures faster",
    )

    speculate: Drafts | None = Field(
        None,
        description="write what the dense model writes, from drafts: lookup, sparse, int8, int4 or int4:GROUP, or "
        "several as lookup+int4+sparse; sparsity is then that of drafts (docs/speculation.md)",
    )
    draft_tokens: int | None = Field(
        None, ge=1, le=MOST_DRAFTED, description="with speculate: tokens of a draft (default: as many as pay, or none)"
    )

    @model_validator(mode="after")
    def _drafts_fit(self) -> Self:
        check_speculation(
            self, [] if self.speculate is None else [self.speculate], None if self.sparsity is None else [self.sparsity]
        )
        return self

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

    also_quantise: QuantisationList = Field(
        default_factory=list,
        description="also measure these kinds of weights, comma-separated, each as for quantise",
    )

    def others(self) -> list[Self]:
        """One configuration for each of them."""
        return [self.model_copy(update={"quantise": quantise, "also_quantise": []}) for quantise in self.also_quantise]

    def _quantises(self) -> bool:
        return super()._quantises() or bool(self.also_quantise)

    @model_validator(mode="after")
    def _each_has_a_calibration_of_its_own(self) -> Self:
        for key in ("calibration", "kernels"):
            if self.also_quantise and getattr(self, key, None):
                raise ValueError(
                    f"{key} (flag --{key}) is of one kind of weights: leave out also_quantise (flag --also-quantise)"
                )
        return self


class BenchConfig(OneAllocation, ComparingConfig):
    """`teal bench`."""

    sparsity: SparsityList = Field([0.4, 0.5], description="targets, comma-separated; dense is always measured")
    prompt_tokens: int = Field(64, ge=1, lt=MOST, description="length of the prompt")
    new_tokens: int = Field(64, ge=2, lt=MOST, description="tokens to decode per repeat")
    repeats: int = Field(
        5, ge=1, lt=MOST, description="timed repeats of each, in turn; 5 or more for a result to quote"
    )
    random_weights: bool = Field(
        False, description="build the alias's shape with random weights; nothing is downloaded"
    )
    kernels: bool = Field(False, description="also time the sparse product of each projection shape")
    tune: bool = Field(
        False, description="with kernels, on a GPU: find and keep the fastest tile config of each product"
    )
    batch: int = Field(1, ge=1, le=8, description="sequences decoded together")
    speculate: DraftsList = Field(
        default_factory=list,
        description="also measure decoding from these kinds of drafts, comma-separated, each as for generate; sparse "
        "ones at each sparsity",
    )
    draft_tokens: int | None = Field(
        None, ge=1, le=MOST_DRAFTED, description="with speculate: tokens of a draft (default: as many as pay, or none)"
    )
    backend: Backend = Field("auto", description="sparse kernels; a backend that is named runs or fails")
    compile: Compile = Field(
        "auto",
        description="torch.compile of steps that decode by transformers' forward: auto where it measures faster, tried "
        "for 3 minutes at most",
    )
    compare_llama_cpp: InputFile | None = Field(
        None, description="path of llama.cpp's llama-bench, to be timed in turn with ours, on a CPU"
    )
    llama_model: InputFile | None = Field(
        None, description="with compare_llama_cpp: its .gguf file, of the same model and width"
    )

    @model_validator(mode="after")
    def _llama_cpp_is_like_ours(self) -> Self:
        if (self.compare_llama_cpp is None) != (self.llama_model is None):
            raise ValueError(
                "compare_llama_cpp (flag --compare-llama-cpp) and llama_model (flag --llama-model) go together"
            )
        if self.compare_llama_cpp is None:
            return self
        for key, why in {
            "also_quantise": "llama_model is of one kind of weights",
            "batch": "llama-bench decodes one sequence",
        }.items():
            if key in self.model_fields_set and getattr(self, key) not in (1, []):
                raise ValueError(
                    f"compare_llama_cpp (flag --compare-llama-cpp): {why}, leave out {key} "
                    f"(flag --{key.replace('_', '-')})"
                )
        if self.device == "cuda":
            raise ValueError("compare_llama_cpp (flag --compare-llama-cpp) is for a CPU (flag --device cpu)")
        return self

    @model_validator(mode="after")
    def _drafts_fit(self) -> Self:
        check_speculation(self, self.speculate, self.sparsity if any(own.sparse for own in self.speculate) else None)
        if self.speculate and self.batch > 1:
            raise ValueError("speculate (flag --speculate) is measured on one sequence: leave out batch (flag --batch)")
        return self

    @model_validator(mode="after")
    def _ranks_only_decode(self) -> Self:
        for key in ("tune", "compare_llama_cpp", "kernels"):
            if self.tensor_parallel > 1 and getattr(self, key):
                raise ValueError(
                    f"{key} (flag --{key.replace('_', '-')}) is measured in one process: leave out tensor_parallel "
                    "(flag --tensor-parallel)"
                )
        return self

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
