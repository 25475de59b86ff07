"""What a model of a type with a block program has that its program does not say, or the other way round."""

from typing import Any

from torch import nn

from teal_cli.decode.blocks import module_at
from teal_cli.decode.scales import scales_of
from teal_cli.models.architectures import architecture_for, blocks_of
from teal_cli.models.likeness import block_departure
from teal_cli.models.programs import Program


def departure(model: Any, program: Program) -> str | None:
    """In which way a model is another one than its program computes; None where it is the same."""
    if (reason := program.unmet(model.config.get_text_config())) is not None:
        return reason
    embedding = model.get_input_embeddings()
    if embedding is None or embedding.weight.shape[1] != model.config.get_text_config().hidden_size:
        return "embeddings of another width than the hidden states"  # OPT's smallest
    if type(embedding).forward is not nn.Embedding.forward and program.embedding_scale is None:
        return "embeddings that are more than a table"
    if scales_of(model, program).residual <= 0:
        return "residuals that are scaled by nothing, or turned round"
    parent, _, name = program.norm.rpartition(".")
    if getattr(module_at(model, parent), name, None) is None:
        return "no norm in front of the output layer"
    row = architecture_for(model)
    reasons = (block_departure(row, block, program) for block in blocks_of(model).values())
    return next((reason for reason in reasons if reason is not None), None)
