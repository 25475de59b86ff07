"""What a model of a type with a block program has that its program does not say, or the other way round."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from teal_cli.decode.blocks import module_at, scales_of, steps_of
from teal_cli.models.architectures import architecture_for
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep, Program, RouteStep, Step


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
    steps, modules = steps_of(program, block), dict(block.named_modules())
    for step in steps:
        alone = (path for path in _alone(step) if isinstance(modules.get(path), nn.Identity | None))
        if (missing := next(alone, None)) is not None:
            return f"blocks without {missing}"
        if isinstance(step, AttentionStep) and not getattr(modules.get(step.attention), "is_causal", True):
            return "attention that is not causal"
        if isinstance(step, ProductStep) and step.experts and not set(_layers(model, step)) <= modules.keys():
            return "experts of another form, or not unstacked"
        if isinstance(step, ProductStep) and step.joined and _outputs(model, block, step) % 4:
            return f"an odd number of neurons in {step.product}"  # codes of 4 bits: up must begin at a byte
    named = set(_named(model, steps))
    for name, _ in block.named_parameters():
        parents = {name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."}
        if not parents & named:
            module = name.rpartition(".")[0]
            return f"blocks with {name if any(other.startswith(f'{module}.') for other in named) else module}"
    return None


def _named(model: Any, steps: list[Step]) -> Iterator[str]:
    """Modules with weights inside a block, as a program has them."""
    for step in steps:
        yield from _alone(step)
        if isinstance(step, ProductStep):
            yield from _layers(model, step)
            yield from (f"{layer}_bias" for layer in _layers(model, step) if step.experts)
            if step.activation_module is not None:
                yield step.activation_module
        elif isinstance(step, AttentionStep) and step.sinks is not None:
            yield f"{step.attention}.{step.sinks}"


def _alone(step: Step) -> list[str]:
    """The modules of a step that are in no site: norms, routers and scales."""
    if isinstance(step, NormStep):
        found = [step.norm]
    elif isinstance(step, ProductStep):
        found = [step.input_norm, step.added_norm, step.scaled_by]
    elif isinstance(step, RouteStep):
        found = [step.route]
    else:
        found = [None if name is None else f"{step.attention}.{name}" for name in (step.q_norm, step.k_norm)]
    return [path for path in found if path is not None]


def _layers(model: Any, step: ProductStep) -> tuple[str, ...]:
    return architecture_for(model).sites[step.product]


def _outputs(model: Any, block: nn.Module, step: ProductStep) -> int:
    (name,) = _layers(model, step)
    return int(module_at(block, name).out_features)
