"""Finding the linear layers of a model whose type is in no table, for the user to confirm.

The blocks are the longest list of like modules (of an encoder-decoder both lists). Which layers read
one hidden state is seen in a short forward pass: they are called with the same tensor. What is found
is a row of teal_cli/models/architectures.yaml; it is written down and never taken without being
confirmed.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from teal_cli.atomic import atomic_path
from teal_cli.errors import ArtefactError, artefact_error
from teal_cli.models.architectures import Architecture, Kind, architecture_for
from teal_cli.models.block_calls import hooked
from teal_cli.models.forward import run_text
from teal_cli.models.layers import Experts, is_stacked, linear_shape
from teal_cli.models.loading import kind_of, load_from_folder
from teal_cli.reading import read_json

_BATCH, _TOKENS = 2, 11  # odd: an encoder's half has another length than a decoder's
_SMALLEST = 2
"""Modules that make a list of blocks."""


class _Call(NamedTuple):
    """A layer's input in the probe."""

    x: Tensor
    """Kept, so that its memory is not given to another tensor."""
    order: int


def propose(name: str, folder: Path, run: Path, *, device: str, dtype: str) -> ArtefactError:
    """Write RUN/architecture.yaml for a model of an unknown type, unless there is one, which the user may have edited.

    Args:
        name: what the model is called.
        folder: the model's.
        run: RUN.
        device: to load it on.
        dtype: to load it in.

    Returns:
        The error that says so: nothing runs before the user has confirmed the file.

    Raises:
        ArtefactError: no blocks, or the probe does not run.
    """
    config = read_json(folder / "config.json", "model configuration")
    model_type = str(config.get("model_type"))
    path = run / "architecture.yaml"
    unknown = f"model type {model_type!r} is not in the table of architectures"
    if path.exists():
        return ArtefactError(f"{unknown}; {path} is there already: check it, and confirm with --architecture {path}")
    kind = _kind(folder, config)
    # Any row will do to load it as what it is; what it says is not read.
    seed = Architecture(kind=kind, blocks=("",), sites={"none": ("",)})
    model = load_from_folder(folder, device=device, dtype=dtype, architecture=seed)
    found = discover(model)
    head = (
        f"# What teal found in {name}, whose type it does not know. Check it: the linear layers of a site must\n"
        "# read the same hidden state; layers under dense drop no inputs. The keys are explained at the head of\n"
        "# teal_cli/models/architectures.yaml and in docs/add-a-model-family.md.\n"
    )
    with atomic_path(path) as temporary:
        body = yaml.safe_dump({model_type: found.row()}, sort_keys=False, width=120)
        temporary.write_text(head + body, encoding="utf-8")
    return ArtefactError(
        f"{unknown}; its {len(found.sites)} sites were written to {path}: check them, and confirm with "
        f"--architecture {path}"
    )


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    """What transformers can make of a configuration.

    Raises:
        ArtefactError: nothing.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise artefact_error(error, f"{folder} is of a type that transformers does not know") from error
    return kind_of(config, None)


def block_lists(model: nn.Module, kind: Kind = "causal") -> list[str]:
    """Paths of the lists of blocks: the longest list of like modules, and others with blocks of the same kind.

    Of an encoder-decoder every list: its encoder may have blocks of another kind.

    Raises:
        ArtefactError: there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) >= _SMALLEST
        and len({type(child) for child in module}) == 1
        and any(linear_shape(inner) is not None for inner in module.modules())
    }
    if not lists:
        raise ArtefactError("no repeated blocks with linear layers were found in this model: teal has nothing to do")
    # Of lists inside one another (blocks, heads in a block) the outer one.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if kind == "seq2seq":
        return outer
    longest = max(outer, key=lambda name: (len(lists[name]), sum(p.numel() for p in lists[name].parameters())))
    return [name for name in outer if type(lists[name][0]) is type(lists[longest][0])]


def discover(model: Any) -> Architecture:
    """The row of a model, from its structure and a probe.

    Args:
        model: as `load_from_folder` gives it, with an architecture that says what kind it is.

    Raises:
        ArtefactError: no blocks, or the probe does not run.
    """
    kind = architecture_for(model).kind
    stacks = block_lists(model, kind)
    blocks = {f"{stack}.{index}": block for stack in stacks for index, block in enumerate(model.get_submodule(stack))}
    calls = _probe(model, blocks)
    order: dict[str, int] = {}  # of the first call of a layer of this name
    readers: list[set[tuple[str, ...]]] = []
    dense: set[str] = set()
    once: set[str] = set()  # layers that read what the encoder made
    for prefix, block in blocks.items():
        inside = dict(block.named_modules())
        dense |= {name for name, module in inside.items() if is_stacked(module)} | _routers(inside)
        groups: defaultdict[tuple[Any, ...], list[tuple[int, str]]] = defaultdict(list)
        for name in (name for name, module in inside.items() if linear_shape(module) is not None):
            seen = calls[f"{prefix}.{name}"]
            if name in dense:
                continue
            if len(seen) != 1 or not _has_positions(seen[0].x, kind, inside[name]):
                dense.add(name)  # not called, called again and again, or not a state of every token
                continue
            x = seen[0].x
            order.setdefault(name, seen[0].order)
            if kind == "seq2seq" and prefix.startswith(f"{stacks[-1]}.") and x.shape[1] == _TOKENS // 2:
                once.add(name)
            groups[x.data_ptr(), x.shape, x.stride()].append((seen[0].order, name))
        readers.append({tuple(name for _, name in sorted(group)) for group in groups.values()})
    every = set.union(*readers)
    optional = {group for group in every if any(group not in of_block for of_block in readers)}
    if any(name in other for group in every for name in group for other in every - {group}):
        every = {(name,) for group in every for name in group}  # blocks group them differently: each by itself
        names = [{name for group in of_block for name in group} for of_block in readers]
        optional = {(name,) for (name,) in every if any(name not in of_block for of_block in names)}
    ordered = sorted(every, key=lambda group: order[group[0]])
    sites = {f"{group[0].replace('.', '_')}_input": group for group in ordered}
    return Architecture(
        kind=kind,
        blocks=tuple(stacks),
        sites=sites,
        optional=tuple(site for site, group in sites.items() if group in optional),
        once=tuple(site for site, group in sites.items() if once.intersection(group)),
        dense=tuple(sorted(dense - {name for group in every for name in group})),
    )


def _routers(modules: dict[str, nn.Module]) -> set[str]:
    """Linear layers beside experts: they choose among them, or weigh them."""
    holders = {
        name.rpartition(".")[0] for name, module in modules.items() if isinstance(module, Experts) or is_stacked(module)
    }
    return {
        name for name, module in modules.items() if isinstance(module, nn.Linear) and name.rpartition(".")[0] in holders
    }


def _has_positions(x: Tensor, kind: Kind, module: nn.Module) -> bool:
    """Whether a state has a row for every token (or comes with what says which token a row is of)."""
    if hasattr(module, "copies"):
        return True
    if x.dim() == 2:
        return x.shape[0] == _BATCH * _TOKENS
    return x.dim() == 3 and x.shape[0] == _BATCH and (x.shape[1] == _TOKENS or kind == "seq2seq")


def _probe(model: Any, blocks: dict[str, nn.Module]) -> defaultdict[str, list[_Call]]:
    """Every linear layer's calls in one short pass."""
    calls: defaultdict[str, list[_Call]] = defaultdict(list)

    def hooks() -> Iterator[Any]:
        for prefix, block in blocks.items():
            for name, module in block.named_modules():
                if linear_shape(module) is not None:
                    yield module.register_forward_pre_hook(hook_for(f"{prefix}.{name}"))

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name].append(_Call(args[0], sum(map(len, calls.values()))))

        return hook

    device = next(model.parameters()).device
    ids = torch.arange(_BATCH * _TOKENS, device=device).view(_BATCH, _TOKENS) + 5
    try:
        with torch.no_grad(), hooked(hooks()):
            run_text(model, ids)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtefactError(f"this model does not take text as teal gives it ({reason})") from error
    return calls
