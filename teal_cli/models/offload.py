"""Models larger than a GPU: weights stay in main memory, each layer's go to the GPU while it runs; or on several GPUs.

Both are accelerate's, `cpu_offload` and `dispatch_model`. The first is for measuring a model, which reads the weights
once for many tokens; decoding would read them all through the bus for each token, and sparsity would save nothing.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import MachineError, UsageError
from teal_cli.models.architectures import architecture_for
from teal_cli.models.layers import Experts


def offload_(model: Any, device: torch.device) -> None:
    """Let a model that lies in main memory compute on a device.

    Args:
        model: on the CPU, and one that `require_offload` takes. Its parameters are on the meta device afterwards,
            except while their layer runs.
        device: where to compute.
    """
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=device)


def spread_(
    model: Any, device_map: dict[str, Any] | None = None, folder: Path | None = None, *, to_train: bool = False
) -> None:
    """Let the blocks of a model that lies in main memory lie on several devices, one after the other.

    Args:
        model: on the CPU, and one that `require_offload` takes.
        device_map: module path -> device; by default as `places_of` says.
        folder: for weights whose device is `disk`; by default there may be none.
        to_train: see `places_of`.

    Raises:
        MachineError: more than all GPUs and main memory hold; or all GPUs, of a model to train.
    """
    from accelerate import dispatch_model

    if device_map is None:
        device_map = places_of(model, to_train=to_train)
    if folder is None and "disk" in device_map.values():
        held = "all GPUs together do" if to_train else "all GPUs and main memory together do"
        raise MachineError(f"out of memory: {held} not hold this model")
    skipped = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=device_map, offload_dir=folder, skip_keys=skipped)


def places_of(model: Any, *, to_train: bool) -> dict[str, Any]:
    """Module path -> device: each GPU has an equal part, so that all have room for activations; main memory the rest.

    Args:
        model: on the CPU or the meta device.
        to_train: give main memory none.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    stacks = [model.get_submodule(path) for path in architecture_for(model).blocks]
    whole = sorted({type(block).__name__ for stack in stacks for block in stack.children()})
    how: dict[str, Any] = {"no_split_module_classes": whole, "dtype": model.dtype}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of a model that was let go: it counts as used otherwise
    room = get_balanced_memory(model, **how)
    if to_train and torch.cuda.is_available():
        room.pop("cpu", None)
    found: dict[str, Any] = infer_auto_device_map(model, max_memory=room, **how)
    return found


def devices(device: torch.device) -> list[torch.device]:
    """Those over which `spread_` spreads a model to train: all GPUs, or the CPU."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def is_spread(model: Any) -> bool:
    """Whether `spread_` has put the model on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def require_offload(model: Any, flag: str = "offload (flag --offload)") -> None:
    """Refuse what `offload_` and `spread_` cannot do.

    Args:
        model: the model or its outline.
        flag: what asks for it, for the message.

    Raises:
        MachineError: accelerate is not installed.
        UsageError: a model whose experts are views of stacked weights, which accelerate would lose.
    """
    if any(isinstance(module, Experts) for module in model.modules()):
        raise UsageError(f"{flag} does not know stacked experts: leave it out for this model")
    if find_spec("accelerate") is None:
        raise MachineError(f"{flag} needs the package accelerate: pip install 'teal-cli[offload]'")


def stacked(values: Iterable[Tensor]) -> Tensor:
    """What blocks that may lie on several devices gave, as one tensor on the device of the first."""
    held = list(values)
    return torch.stack([each.to(held[0].device) for each in held])


def computing_device(model: Any) -> torch.device:
    """Where a model computes, which is where its weights are unless it is offloaded; of several devices the first."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    if hook is not None:
        return torch.device(hook.execution_device)
    found: torch.device = next(model.parameters()).device
    return found
