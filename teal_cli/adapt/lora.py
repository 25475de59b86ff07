"""Low-rank adapters by peft, beside layers that skip inputs: both read what is kept, so that merging is exact."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from teal_cli.errors import MachineError, UsageError
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparseLinear

_SEED_STREAM = 0x7EA1


def require_peft() -> Any:
    """The package.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MachineError("--lora needs the package peft: pip install 'teal-cli[adapt]'") from error
    return peft


def adaptable(model: nn.Module) -> list[str]:
    """The projections that adapters can stand beside: linear layers of the blocks.

    Raises:
        UsageError: there is none.
    """
    names = [p.name for p in find_projections(model) if not p.is_output]
    found = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if not found:
        raise UsageError("--lora finds no linear layer to adapt in this model: leave it out")
    return found


def add_adapters_(model: nn.Module, names: Sequence[str], rank: int, seed: int) -> list[str]:
    """Put adapters beside layers; they change nothing until they are trained.

    Args:
        model: after surgery; its other parameters are frozen.
        names: module paths.
        rank: of each; the scale is twice it over it (alpha = 2 r).
        seed: of the starting values.

    Returns:
        Names of the new parameters.
    """
    import torch

    peft = require_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(names), bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ _SEED_STREAM)
        peft.inject_adapter_in_model(config, model)
    for name in names:
        layer: Any = model.get_submodule(name)
        if isinstance(layer.base_layer, SparseLinear):
            layer.register_forward_pre_hook(_kept)
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            found.append(name)
    return found


def _kept(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: base layer and adapters read the inputs that are kept."""
    x: Tensor = args[0]
    return (layer.base_layer.kept_inputs(x), *args[1:])


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, inside the block."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_(model: nn.Module) -> None:
    """Add the adapters to the weights, and take them out: the model has its layers again."""
    merged: list[tuple[str, Callable[[], nn.Module]]] = []
    for name, layer in list(_layers(model)):
        layer.merge()
        merged.append((name, layer.get_base_layer))
    for name, base_of in merged:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base_of())
