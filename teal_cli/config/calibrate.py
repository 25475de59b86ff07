"""`teal calibrate`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from teal_cli.config.shared import MOST, DeviceMap, ModelConfig
from teal_cli.config_values import OutputFolder, Sparsity


class CalibrateConfig(ModelConfig):
    """`teal calibrate`."""

    dataset: str = Field(
        "sotu",
        description="sotu, self, a .txt or .jsonl file (FILE.jsonl:COLUMN for a field that is not text), or a hub "
        "dataset NAME[:SUBSET[:SPLIT[:COLUMN]]]",
    )
    tokens: int = Field(32768, ge=1, lt=MOST, description="tokens to read")
    seq_len: int = Field(1024, ge=8, lt=MOST, description="tokens per sequence")

    sensitivity_tokens: int = Field(
        8192, ge=0, lt=MOST, description="of those, tokens to measure sensitivities on (a backward pass); 0: none"
    )
    quantise_tokens: int = Field(
        16384,
        ge=0,
        lt=MOST,
        description="with 4 bits: of those, tokens on which GPTQ chooses the codes; 0: nearest codes",
    )
    greedy_tokens: int = Field(
        0,
        ge=0,
        lt=MOST,
        description="of those, tokens to measure allocation greedy on; 0: greedy cannot be used",
    )
    greedy_inputs: Literal["dense", "sparse"] = Field(
        "dense", description="for greedy: a block reads the hidden states of the dense network, or of the sparse one"
    )
    greedy_sparsity: Sparsity = Field(0.5, description="with greedy_inputs sparse: sparsity of the blocks before")
    output_layer: bool | None = Field(
        None,
        description="measure the output layer too, so that fisher can drop inputs of it (default: if possible)",
    )
    sink_tokens: int = Field(4, ge=0, lt=MOST, description="first tokens of each sequence that are not counted")
    batch_size: int = Field(1, ge=1, lt=MOST, description="sequences per forward pass")
    offload: bool = Field(
        False, description="keep the weights in main memory; copy each layer's to the GPU when it runs"
    )
    device_map: DeviceMap = Field(
        "one", description="auto: spread the blocks over all GPUs, and over main memory where these are full"
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
    def _spread_models_do_not_write(self) -> Self:
        if self.device_map == "auto" and (self.offload or self.dataset == "self"):
            other = "offload (flag --offload)" if self.offload else "dataset self (flag --dataset)"
            raise ValueError(f"device_map auto (flag --device-map) does not go with {other}")
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
