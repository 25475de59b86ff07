"""Models larger than a GPU: weights stay in main memory, each layer's go to the GPU while it runs.

That is accelerate's `cpu_offload`. It is for measuring a model, which reads the weights once for many
tokens; decoding would read them all through the bus for each token, and sparsity would save nothing.
"""

from importlib.util import find_spec
from typing import Any

import torch

from teal_cli.errors import MachineError, UsageError
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


def require_offload(model: Any) -> None:
    """Refuse what `offload_` cannot do.

    Args:
        model: the model or its outline.

    Raises:
        MachineError: accelerate is not installed.
        UsageError: a model whose experts are views of stacked weights, which accelerate would lose.
    """
    if any(isinstance(module, Experts) for module in model.modules()):
        raise UsageError("offload (flag --offload) does not know stacked experts: leave it out for this model")
    if find_spec("accelerate") is None:
        raise MachineError("offload (flag --offload) needs the package accelerate: pip install 'teal-cli[offload]'")


def computing_device(model: Any) -> torch.device:
    """Where a model computes, which is where its weights are unless it is offloaded."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    if hook is not None:
        return torch.device(hook.execution_device)
    found: torch.device = next(model.parameters()).device
    return found
