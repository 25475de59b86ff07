"""What a model multiplies by beside its weights, by the names that its block program has for it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal_cli.errors import ArtefactError
from teal_cli.models.programs import Program


@dataclass(frozen=True)
class Scales:
    """What a model multiplies by, beside its weights."""

    embedding: float = 1.0
    residual: float = 1.0
    """Of what is added to the residual stream."""
    logits: float = 1.0
    logits_cap: float = 0.0
    """Soft cap of the scaled logits; 0 for none."""


def scales_of(model: Any, program: Program) -> Scales:
    """The numbers that a program names.

    Raises:
        ArtefactError: the model does not have one of them.
    """
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings()

    def number(key: str | None, default: float) -> float:
        if key is None:
            return default
        if not hasattr(config, key) and not hasattr(embeddings, key):
            raise ArtefactError(f"the program of this architecture names {key}, which the model does not have")
        value = getattr(config, key, getattr(embeddings, key, None))
        if isinstance(value, Tensor):
            if value.is_meta:  # a model of shapes alone, which computes nothing
                return default
            value = value.to(embeddings.weight.dtype)  # as transformers rounds it before it multiplies
        return default if value is None else float(value)

    return Scales(
        embedding=number(program.embedding_scale, 1.0),
        residual=number(program.residual_scale, 1.0),
        logits=number(program.logits_scale, 1.0) / number(program.logits_divisor, 1.0),
        logits_cap=number(program.logits_cap, 0.0),
    )
