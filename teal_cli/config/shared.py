"""Options that many verbs have."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from teal_cli.config_values import InputFile, OutputFile, Quantisation, check_plainly

MOST = 1 << 31
"""Counts and seeds are below this: numpy takes seeds of 32 bits, of which the halves of dataset self take one."""

DeviceMap = Literal["one", "auto"]
"""auto: blocks lie on all GPUs, one after the other."""

OTHER_SPELLINGS = {
    "quantise": "quantize",
    "quantise_output": "quantize_output",
    "quantise_tokens": "quantize_tokens",
    "also_quantise": "also_quantize",
    "recalibrate": "propagate",
}
"""Key -> what it may be called as well, in YAML and as a flag."""


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

    quantise: Quantisation | None = Field(
        None, description="weights of 8 or 4 bits: int8, int4 or int4:GROUP (GROUP inputs share a scale; 128)"
    )
    architecture: InputFile | None = Field(
        None, description="YAML file that describes a model type unknown to teal (docs/add-a-model-family.md)"
    )
    quantise_output: bool = Field(False, description="with quantise: also quantise the output layer, to 8 bits")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads (default: as many as PyTorch takes)")

    @property
    def quantisation(self) -> str:
        """How the model is quantised, in one word; empty where it is not."""
        if self.quantise is None:
            return ""
        return self.quantise.name + ("-output" if self.quantise_output else "")

    @property
    def stored_quantisation(self) -> dict[str, str | None] | None:
        """As a checkpoint says it: how projections are quantised, and the name of a quantised output layer."""
        if self.quantise is None:
            return None
        output = "lm_head" if self.quantise_output else None
        return {"projections": self.quantise.text, "output": output}

    def _quantises(self) -> bool:
        return self.quantise is not None

    @model_validator(mode="after")
    def _output_layer_is_of_quantise(self) -> Self:
        if self.quantise_output and not self._quantises():
            raise ValueError("quantise_output (flag --quantise-output) needs quantise (flag --quantise)")
        return self
