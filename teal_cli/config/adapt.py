"""`teal adapt`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from teal_cli.config.calibrate import CalibrateConfig
from teal_cli.config.recipes import RecipeOptions, options_of, recipe_names
from teal_cli.config.shared import MOST, DeviceMap
from teal_cli.config.sparsity import OneAllocation
from teal_cli.config_values import OutputFolder, Sparsity
from teal_cli.errors import nearest, shown


def _check_recipe(name: str) -> str:
    if name not in recipe_names():
        raise ValueError(f"no such recipe{nearest(name, recipe_names())}")
    return name


def _split_options(value: object) -> object:
    """A flag gives "gradient=masked,vectors=true"; YAML gives a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    return {key.strip(): text.strip() for key, _, text in pairs}


def _split_datasets(value: object) -> object:
    """A flag gives one dataset, or "sotu=3,notes.txt=1" with weights; YAML gives a name or a mapping to weights."""
    if not isinstance(value, str):
        return value
    parts = [part.rpartition("=") for part in value.split(",")]
    try:
        weights = {name.strip(): float(weight) for name, _, weight in parts}
    except ValueError:
        return {value: 1.0}
    if len(weights) < len(parts) and all(weights):
        raise ValueError(f"{shown(value)} names a dataset twice")
    return weights if all(weights) else {value: 1.0}


def _check_datasets(weights: Mapping[str, float]) -> Mapping[str, float]:
    for name, weight in weights.items():
        if not 0.0 < weight < 1e9:
            raise ValueError(f"the weight of {shown(name)} is a number above 0, not {weight}")
    return weights


Datasets = Annotated[
    dict[str, float], BeforeValidator(_split_datasets), AfterValidator(_check_datasets), Field(min_length=1)
]
Options = Annotated[dict[str, Any], BeforeValidator(_split_options)]


class AdaptConfig(OneAllocation):
    """`teal adapt`."""

    recipe: Annotated[str, AfterValidator(_check_recipe)] = Field(
        "recover", description=f"what is learned: {', '.join(recipe_names())}"
    )
    options: Options = Field(
        default_factory=dict, description="the recipe's own options, as KEY=VALUE,.. (docs/adapt.md)"
    )
    sparsity: Sparsity = Field(
        0.5, description="target in [0, 1): share of the blocks' weights that a token does not read"
    )
    dataset: Datasets = Field(
        {"sotu": 1.0},
        description="text to train on, as for calibrate; several with weights: NAME=WEIGHT,.. (in YAML a mapping)",
    )
    tokens: int = Field(1 << 20, ge=1, lt=1 << 40, description="tokens to train on, repeats counted")
    seq_len: int = Field(512, ge=8, lt=MOST, description="tokens per sequence")
    batch_size: int = Field(8, ge=1, lt=MOST, description="sequences per forward pass, over all processes")
    accumulate: int = Field(1, ge=1, lt=MOST, description="forward passes per optimiser step")
    lora: int = Field(0, ge=0, le=4096, description="train low-rank adapters of this rank, merged at the end; 0: all")
    learning_rate: float | None = Field(
        None, gt=0, lt=1, description="at its highest (default 5e-5; with lora 3e-4; of vectors 3e-3)"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate falls after that"
    )
    clip: float = Field(1.0, gt=0, le=1e6, description="greatest norm of a gradient")
    text_weight: float = Field(
        0.0, ge=0, le=1e6, description="weight of the loss of the text itself, beside the distillation"
    )
    hidden_weight: float = Field(
        0.0, ge=0, le=1e6, description="weight of the loss of hidden states behind each block, beside the distillation"
    )
    dense_prefix: int | None = Field(
        None, ge=0, lt=MOST, description="sequences begin with up to so many dense positions, at random (default: half)"
    )
    held_out_tokens: int = Field(16384, ge=1, lt=MOST, description="tokens that are held out, to see when to stop")
    evaluate_every: int | None = Field(
        None, ge=1, lt=MOST, description="steps between two looks at them (default: a tenth)"
    )
    checkpoint_minutes: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="least time between two checkpoints, which are written after a look"
    )
    patience: int = Field(0, ge=0, lt=MOST, description="looks without a gain after which a stage ends; 0: never")
    recompute: bool = Field(
        False, description="make activations again in the backward pass: less memory, a third more time"
    )
    device_map: DeviceMap = Field(
        "one", description="auto: spread the blocks over all GPUs, of recipe recover; for what no single one holds"
    )
    out: OutputFolder | None = Field(
        None,
        description="folder to write (default RUNS/<model>/<recipe>, then -<sparsity> and -lora<rank> where given)",
    )

    @property
    def calibrate(self) -> CalibrateConfig:
        """See `SparseConfig`: a model that is spread to be trained is spread to be calibrated."""
        found = super().calibrate
        return found.model_copy(update={"device_map": "auto"}) if self.device_map == "auto" else found

    @property
    def recipe_options(self) -> RecipeOptions:
        """The options, checked."""
        return options_of(self.recipe)(**self.options)

    @property
    def tokens_a_step(self) -> int:
        """Of one optimiser step."""
        return self.seq_len * self.batch_size * self.accumulate

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.tokens_a_step

    @property
    def most_prefix(self) -> int:
        """Dense positions at the start of a sequence, at most."""
        return self.seq_len // 2 if self.dense_prefix is None else self.dense_prefix

    @model_validator(mode="after")
    def _options_are_the_recipes(self) -> Self:
        try:
            options_of(self.recipe)(**self.options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                known = options_of(self.recipe).model_fields
                why = f"recipe {self.recipe} has no option {shown(key)}{nearest(key, known)}"
            else:
                why = f"{key}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")
            raise ValueError(f"options (flag --options): {why}") from error
        return self

    @model_validator(mode="after")
    def _spread_models_recover(self) -> Self:
        others = {
            f"recipe {self.recipe}": self.recipe != "recover",
            "dataset self (flag --dataset)": "self" in self.dataset,
            "device cpu (flag --device)": self.device == "cpu",
        }
        for other, is_asked_for in others.items():
            if self.device_map == "auto" and is_asked_for:
                raise ValueError(f"device_map auto (flag --device-map) does not go with {other}")
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.steps < 1:
            raise ValueError(
                f"tokens ({self.tokens}, flag --tokens) is less than one step of seq_len x batch_size x accumulate "
                f"({self.tokens_a_step:,}; flags --seq-len, --batch-size, --accumulate)"
            )
        if self.most_prefix > self.seq_len - 2:
            raise ValueError(
                f"dense_prefix ({self.dense_prefix}, flag --dense-prefix) leaves no sparse position in seq_len "
                f"({self.seq_len}, flag --seq-len)"
            )
        if self.held_out_tokens < self.seq_len:
            raise ValueError(
                f"held_out_tokens ({self.held_out_tokens}, flag --held-out-tokens) is less than one sequence of "
                f"seq_len ({self.seq_len}, flag --seq-len)"
            )
        return self
