"""What a run needs of memory, estimated before it starts: it would otherwise fail after minutes, or be killed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from teal_cli.adapt.distil import logits_at_once
from teal_cli.adapt.recipe import Added
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import check_memory

_TRAINED_BYTES = 16
"""Of a trained parameter: float32 value, gradient and two moments."""
_CHECKPOINT_BYTES = 4 + 16
"""Of a trained parameter: its best value, and a copy of value, best value and two moments."""
_KEPT_OF_HIDDEN, _KEPT_OF_NEURONS = 17.0, 5.5
"""Numbers that a block keeps for its backward pass a token, over its width and over that of its MLP. Counted on Llama
blocks whose projections all skip, with adapters, by saved_tensors_hooks: 16.6 and 5.25, with adapters up to 5.5."""
_LOSS_BYTES = 4 * 4
"""Of one logit of a piece of the distillation loss (`distil`): four tensors in float32."""
_NOTHING = Added()


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run, by what needs them."""

    weights: int
    training: int
    """Gradients and moments."""
    teacher: int
    activations: int
    checkpoints: int
    """The best weights so far, and a checkpoint that is about to be written, where these lie on the device."""
    added: int = 0
    """What the recipe holds beside the model: routers, and what a fit of them holds for a moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.teacher + self.activations + self.checkpoints + self.added

    def text(self) -> str:
        """In one line, for people."""
        parts = {"weights": self.weights, "gradients and optimiser": self.training, "teacher": self.teacher}
        parts |= {"activations": self.activations, "routers": self.added, "checkpoints": self.checkpoints}
        return ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts.items() if size)


def trained_parameters(model: Any, *, lora: int, frozen: bool) -> int:
    """How many train: adapters of a rank, a vector a projection, or all but embeddings and output layer."""
    projections = [p for p in find_projections(model) if not p.is_output]
    if lora:
        return sum(lora * (p.in_features + p.out_features) for p in projections)
    if frozen:
        return sum(p.out_features for p in projections)
    layers = (module for module in model.modules() if isinstance(module, nn.Embedding))
    kept = {id(layer.weight): layer.weight for layer in (*layers, model.get_output_embeddings())}
    return int(sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in kept.values()))


def estimate(
    model: Any,
    *,
    trained: int,
    frozen_itemsize: int,
    teacher_itemsize: int,
    tokens: int,
    recompute: bool,
    keeps_hidden: bool = False,
    activation_itemsize: int,
    device: torch.device,
    added: Added = _NOTHING,
) -> Estimate:
    """What a run needs, of its model's outline.

    Args:
        model: its outline.
        trained: parameters that train, adapters included.
        frozen_itemsize: bytes of a parameter that does not.
        teacher_itemsize: of a parameter of the copy that the teacher is; 0 where there is none.
        tokens: of one pass: batch times length.
        recompute: whether only one block's activations are held at a time.
        keeps_hidden: whether the teacher's hidden states are held, of all blocks.
        activation_itemsize: bytes of a hidden state's number.
        device: on which it runs; if it is the CPU, checkpoints are put together there too.
        added: what the recipe holds beside the model.
    """
    config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks, hidden = config.num_hidden_layers, config.hidden_size
    neurons = getattr(config, "intermediate_size", None)
    neurons = neurons if isinstance(neurons, int) else 4 * hidden
    numbers = round(_KEPT_OF_HIDDEN * hidden + _KEPT_OF_NEURONS * neurons)
    kept = (blocks * hidden + numbers if recompute else blocks * numbers) * tokens * activation_itemsize
    if keeps_hidden:
        kept += blocks * hidden * tokens * activation_itemsize
    training, activations = trained * (_TRAINED_BYTES - 4), kept + _LOSS_BYTES * logits_at_once(device)
    # While a recipe measures there is room where gradients and activations are going to be.
    moment = max(added.of_pass, added.of_measuring - training - activations)
    on_cpu = device.type == "cpu"
    return Estimate(
        weights=max(parameters - trained, 0) * frozen_itemsize + trained * 4,
        training=training,
        teacher=parameters * teacher_itemsize,
        activations=activations,
        checkpoints=(trained + added.trained) * _CHECKPOINT_BYTES + 4 * added.kept if on_cpu else 0,
        added=added.trained * _TRAINED_BYTES + added.fixed * frozen_itemsize + 4 * added.copied + moment,
    )


def require(found: Estimate, devices: Sequence[torch.device]) -> None:
    """Refuse a run that does not fit.

    Args:
        devices: that share it.

    Raises:
        MachineError: it needs more than they have free.
    """
    check_memory(
        found.total,
        devices,
        f"this run ({found.text()})",
        "adapters need less (--lora 16), so do --recompute, a smaller --batch-size with --accumulate, or --seq-len",
    )
