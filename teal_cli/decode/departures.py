"""What a model of a type with a block program has that its program does not say, or the other way round."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from teal_cli.decode.blocks import module_at, scales_of, steps_of
from teal_cli.models.architectures import architecture_for
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep, Program, RouteStep, Step


def departure(model: Any, program: Program) -> str | None:
    """In which way a model is another one than its program computes; None where it is the same."""
    for key, value in program.requires.items():
        if (found := getattr(model.config.get_text_config(), key, None)) is not value:
            return f"{key} {str(found).lower()}"
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
        missing = next((path for path in _alone(step) if path not in modules), None)
        if missing is not None:
            return f"blocks without {missing}"
        if isinstance(step, AttentionStep) and not getattr(modules.get(step.attention), "is_causal", True):
            return "attention that is not causal"
        if isinstance(step, ProductStep) and step.experts and not set(_layers(model, step)) <= modules.keys():
            return "experts of another form, or not unstacked"
        if isinstance(step, ProductStep) and step.joined and _outputs(model, block, step) % 4:
            return f"an odd number of neurons in {step.product}"  # codes of 4 bits: up must begin at a byte
    named = set(_named(model, steps))
    for path, module in modules.items():
        parents = {path[:end] for end in range(len(path) + 1) if end == len(path) or path[end] == "."}
        if any(True for _ in module.parameters(recurse=False)) and not parents & named:
            return f"blocks with {path}"
    return None


def _named(model: Any, steps: list[Step]) -> Iterator[str]:
    """Modules with weights inside a block, as a program has them."""
    for step in steps:
        yield from _alone(step)
        if isinstance(step, ProductStep):
            yield from _layers(model, step)
        elif isinstance(step, AttentionStep):
            yield from (f"{step.attention}.{norm}" for norm in (step.q_norm, step.k_norm) if norm is not None)


def _alone(step: Step) -> list[str]:
    """The modules of a step that are in no site and not inside attention: norms, routers and scales."""
    if isinstance(step, NormStep):
        return [] if step.norm is None else [step.norm]
    if isinstance(step, ProductStep):
        return [path for path in (step.added_norm, step.scaled_by) if path is not None]
    return [step.route] if isinstance(step, RouteStep) else []


def _layers(model: Any, step: ProductStep) -> tuple[str, ...]:
    return architecture_for(model).sites[step.product]


def _outputs(model: Any, block: nn.Module, step: ProductStep) -> int:
    (name,) = _layers(model, step)
    return int(module_at(block, name).out_features)
