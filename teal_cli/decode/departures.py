"""What a model of a type with a block program has that its program does not say, or the other way round."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from teal_cli.decode.blocks import module_at, scales_of
from teal_cli.models.architectures import architecture_for
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep, Program, Step


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
    blocks = [block for stack in architecture_for(model).blocks for block in module_at(model, stack).children()]
    return next((reason for block in blocks if (reason := _of_block(model, block, program)) is not None), None)


def _of_block(model: Any, block: nn.Module, program: Program) -> str | None:
    """A module that the program names and the block does not have, or one with weights that it does not name."""
    modules, named = dict(block.named_modules()), set(_named(model, program))
    for step in program.block:
        norms = (norm for norm in _norms(step) if isinstance(modules.get(norm), nn.Identity | None))
        if (missing := next(norms, None)) is not None:
            return f"blocks without {missing}"
        if isinstance(step, AttentionStep) and not getattr(modules.get(step.attention), "is_causal", True):
            return "attention that is not causal"
        if isinstance(step, ProductStep) and step.joined and _outputs(model, block, step) % 4:
            return f"an odd number of neurons in {step.product}"  # codes of 4 bits: up must begin at a byte
    for name, _ in block.named_parameters():
        parents = {name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."}
        if not parents & named:
            module = name.rpartition(".")[0]
            return f"blocks with {name if any(other.startswith(f'{module}.') for other in named) else module}"
    return None


def _named(model: Any, program: Program) -> Iterator[str]:
    """Modules with weights inside a block, as a program has them."""
    sites = architecture_for(model).sites
    for step in program.block:
        yield from _norms(step)
        if isinstance(step, ProductStep):
            yield from sites[step.product]
            if step.activation_module is not None:
                yield step.activation_module
        elif isinstance(step, AttentionStep) and step.sinks is not None:
            yield f"{step.attention}.{step.sinks}"


def _norms(step: Step) -> Iterator[str]:
    """The modules of norms that a step is, or has."""
    if isinstance(step, NormStep):
        yield from [step.norm] if step.norm is not None else []
    elif isinstance(step, ProductStep):
        yield from (name for name in (step.input_norm, step.added_norm) if name is not None)
    else:
        yield from (f"{step.attention}.{name}" for name in (step.q_norm, step.k_norm) if name is not None)


def _outputs(model: Any, block: nn.Module, step: ProductStep) -> int:
    (name,) = architecture_for(model).sites[step.product]
    return int(module_at(block, name).out_features)
