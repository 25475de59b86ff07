"""Which rows of the table fit the blocks of a model, by the names of their modules: of a model of an unknown type too.

Blocks with the same names may compute different things: what a row's program says of such a model is tried on its
first tokens (`teal_cli.decode.recognition`).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from teal_cli.models.architectures import Architecture, table
from teal_cli.models.forward import rope_of
from teal_cli.models.layers import linear_shape
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep, Program, RouteStep, Step


def alike(model: Any) -> dict[str, Architecture]:
    """Rows with a program that has all modules with weights of this model's blocks, and no others: by model type.

    Not rows with experts, whose choice nothing tries.
    """
    rows = {name: row for name, row in table().items() if row.program is not None and row.is_one_decoder}
    dense = {name: row for name, row in rows.items() if not any("experts" in site for site in row.sites)}
    return {name: row for name, row in dense.items() if _fits(model, row)}


def adopt_likeness_(model: Any) -> None:
    """Give a model of a type that the table does not have the row of one that is like it.

    Several rows may be: `teal_alike` has all, of which the first one is taken until they are tried.
    """
    if model.config.model_type in table() or isinstance(getattr(model, "teal_architecture", None), Architecture):
        return
    if rows := alike(model):
        model.teal_alike = rows
        model.teal_architecture = next(iter(rows.values()))


def block_departure(row: Architecture, block: nn.Module, program: Program) -> str | None:
    """A module that a program names and the block does not have, or one with weights that it does not name."""
    steps, modules = steps_of(program, block), dict(block.named_modules())
    for step in steps:
        missing = next((path for path in _alone(step) if isinstance(modules.get(path), nn.Identity | None)), None)
        layers = layers_of(row, step, block) if isinstance(step, ProductStep) else []
        if isinstance(step, ProductStep) and step.experts and not set(layers) <= modules.keys():
            return "experts of another form, or not unstacked"
        missing = missing or next((path for path in layers if path not in modules), None)
        if missing is not None:
            return f"blocks without {missing}"
        if isinstance(step, AttentionStep) and (reason := _of_attention(step, modules.get(step.attention))) is not None:
            return reason
        if isinstance(step, ProductStep) and step.joined and _outputs(modules[layers[0]]) % 4:
            return f"an odd number of neurons in {step.product}"  # codes of 4 bits: up must begin at a byte
    named = {*_named(row, steps), *(name for name, module in modules.items() if getattr(module, "teal_aside", False))}
    for name, _ in block.named_parameters():
        parents = {name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."}
        if not parents & named:
            module = name.rpartition(".")[0]
            return f"blocks with {name if any(other.startswith(f'{module}.') for other in named) else module}"
    return None


def layers_of(row: Architecture, step: ProductStep, block: nn.Module) -> list[str]:
    """The layers of a product: of a site that blocks may lack, those that this one has, or all that are named."""
    names, modules = list(row.sites[step.product]), dict(block.named_modules())
    there = [name for name in names if name in modules]
    return there if there and step.product in row.optional else names


def steps_of(program: Program, block: nn.Module) -> list[Step]:
    """The steps of a program that one block takes: a module that is None is one that it does not have."""

    def has(path: str) -> bool:
        parent, _, name = path.rpartition(".")
        try:
            return block.get_submodule(parent)._modules.get(name) is not None
        except AttributeError:
            return False

    return program.steps_where(has)


_SCALES = ("scaling", "softmax_scale", "inv_norm_factor", "scale_attn")


def _of_attention(step: AttentionStep, module: nn.Module | None) -> str | None:
    """What a step names of the module of an attention, and that has not."""
    if not getattr(module, "is_causal", True):
        return "attention that is not causal"
    keys = [key for key in (step.cap, step.rotates, step.sinks) if key is not None]
    keys += {"sliding": ["is_sliding"], "local": ["attention_type"]}.get(step.window or "", [])
    missing = next((key for key in keys if not hasattr(module, key)), None)
    if step.angles is not None and not any(
        hasattr(own, step.angles) for own in (module, getattr(module, "config", None))
    ):
        missing = step.angles
    if step.scaled and not any(hasattr(module, key) for key in _SCALES):
        missing = _SCALES[0]
    return None if missing is None else f"attention without {missing}"


def _fits(model: Any, row: Architecture) -> bool:
    """Whether a program of a row that the configuration meets has the modules of this model."""
    (stack,) = row.blocks
    blocks = list(_at(model, stack).children()) if _at(model, stack) is not None else []
    if not blocks:
        return False
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings()
    rope = rope_of(config)
    for program in row.programs:
        scales = (program.residual_scale, program.logits_scale, program.logits_divisor, program.logits_cap)
        keys = [key for key in (*scales, program.embedding_scale) if key is not None]
        paths = [path for path in (program.rotary, program.positions, program.norm, program.embedding_norm) if path]
        if (
            program.unmet(config) is None
            and (not program.growing_queries or "llama_4_scaling_beta" in rope)
            and all(hasattr(config, key) or hasattr(embeddings, key) for key in keys)
            and all(_at(model, path) is not None for path in paths)
            and all(block_departure(row, block, program) is None for block in blocks)
        ):
            return True
    return False


def _at(model: Any, path: str) -> Any:
    """A module, or a tensor of one; None where there is none."""
    found = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _named(row: Architecture, steps: list[Step]) -> Iterator[str]:
    """Modules with weights inside a block, as a program has them."""
    for step in steps:
        yield from _alone(step)
        if isinstance(step, ProductStep):
            yield from row.sites[step.product]
            yield from (f"{layer}_bias" for layer in row.sites[step.product] if step.experts)
            if step.activation_module is not None:
                yield step.activation_module
        elif isinstance(step, AttentionStep) and step.sinks is not None:
            yield f"{step.attention}.{step.sinks}"


def _alone(step: Step) -> list[str]:
    """The modules of a step that are in no site: norms, routers and scales."""
    if isinstance(step, NormStep):
        return [] if step.norm is None else [step.norm]
    if isinstance(step, RouteStep):
        return [step.route]
    if isinstance(step, ProductStep):
        return [path for path in (step.input_norm, step.added_norm, step.scaled_by) if path is not None]
    return [f"{step.attention}.{name}" for name in (step.q_norm, step.k_norm, step.v_norm) if name is not None]


def _outputs(layer: nn.Module) -> int:
    shape = linear_shape(layer)
    return 0 if shape is None else shape.out_features
