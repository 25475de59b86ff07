"""The neurons of MLPs and experts: what is seen of them in a pass, measured of them on text, and their signs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.adapt.processes import mean_over_processes
from teal_cli.models.activations import activation_name, block_number, gated_layers, intermediates, neuron_modules
from teal_cli.models.architectures import find_projections
from teal_cli.models.block_calls import hooked
from teal_cli.models.forward import run_text
from teal_cli.models.layers import Experts

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""Told a module and what it is called with, before it is."""

_MOST_GATES = 1 << 18
"""A quantile is made of about so many live gates, of each layer and sequence: sorting all would take long."""


class Neurons:
    """Sees, in passes of a model in training, which neurons are zero, and how large they are.

    Args:
        model: after its activations were changed. Hooks stay on it until `let_go`.
        scales: (layers,) what the size of neurons is divided by; None where nobody asks for it.
    """

    def __init__(self, model: Any, scales: Tensor | None) -> None:
        self._scales = scales
        self._open = False
        self._again = False
        self._sizes: dict[int, Tensor] = {}
        self.seen: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        """Share of zeros of each layer in the last pass: among gates, and in what down reads."""
        self._places = [module for _, module in neuron_modules(model)]
        downs = [model.get_submodule(p.name) for p in intermediates(find_projections(model))]
        self._hooks = []
        for layer, (module, down) in enumerate(zip(self._places, downs, strict=True)):
            act = getattr(module, activation_name(module))
            self._hooks.append(act.register_forward_hook(partial(self._see_gate, layer)))
            if isinstance(module, Experts):  # a hook on their layers would have them computed one by one
                module.neurons = partial(self._of_experts, layer, module)  # type: ignore[method-assign]
            else:
                self._hooks.append(down.register_forward_pre_hook(partial(self._see_hidden, layer)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside it passes are seen; what was seen before is forgotten."""
        self._sizes, self.seen = {}, ({}, {})
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside it blocks run again for their backward pass: they compute what they did, and nothing is kept."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def let_go(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for module in self._places:
            vars(module).pop("neurons", None)

    def size(self) -> Tensor:
        """0-d float32 with its gradient: a mean over layers of the mean |x1| of tokens and neurons over their scale.

        What was kept of them is let go of.
        """
        sizes, self._sizes = self._stacked(self._sizes), {}
        assert self._scales is not None  # noqa: S101  (who asks gave them)
        return (sizes / self._scales.to(sizes.device)).mean()

    def zeros_by_layer(self) -> Tensor:
        """(2, layers): shares of zeros in the last pass, among gates and in what down reads."""
        return torch.stack([self._stacked(of_layers) for of_layers in self.seen])

    def zeros(self) -> tuple[float, float]:
        """Their means over layers, and over processes."""
        gate, hidden = mean_over_processes(self.zeros_by_layer().mean(1)).tolist()
        return gate, hidden

    def _stacked(self, of_layers: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([of_layers[layer] for layer in range(len(self._places))])

    def _see_gate(self, layer: int, act: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if self._open and layer not in self.seen[0]:  # dReLU activates up too, after the gate
            self.seen[0][layer] = _share_of_zeros(out)

    def _see_hidden(self, layer: int, down: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._open:
            self.seen[1][layer] = _share_of_zeros(args[0])
        if self._scales is not None and (self._open or self._again):
            size = args[0].abs().mean(dtype=torch.float32)
            if self._open:
                self._sizes[layer] = size

    def _of_experts(self, layer: int, experts: Experts, both: Tensor) -> Tensor:
        hidden = type(experts).neurons(experts, both)
        self._see_hidden(layer, experts.down_proj, (hidden,))
        return hidden


def _share_of_zeros(x: Tensor) -> Tensor:
    return 1.0 - x.detach().count_nonzero() / x.numel()


@torch.no_grad()
def measure(model: Any, sequences: Tensor) -> dict[str, Tensor]:
    """What neurons of a dense model are on text.

    Args:
        model: dense, before its activations are changed.
        sequences: (sequences, tokens) int64.

    Returns:
        `scales`: (layers,) mean size of what down reads. For the layer of number L `above.L` and `below.L`: (neurons,),
        or (experts, neurons), energy of neurons whose gate is above 0, where up is above 0, and below.
    """
    downs = [model.get_submodule(p.name) for p in intermediates(find_projections(model))]
    modules = [module for _, module in neuron_modules(model)]
    gates: dict[int, Tensor] = {}
    sizes = [0.0] * len(modules)
    energies: list[tuple[Tensor, Tensor] | None] = [None] * len(modules)

    def see_gate(layer: int, act: nn.Module, args: tuple[Tensor, ...]) -> None:
        gates.setdefault(layer, args[0])

    def see_hidden(layer: int, down: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, gate = args[0].flatten(0, -2).float(), gates.pop(layer).flatten(0, -2)
        sizes[layer] += float(hidden.abs().mean()) / len(sequences)
        counts = args[1].counts if len(args) > 1 else (len(hidden),)
        energy = hidden.square() * (gate > 0)  # there the sign of hidden is that of up
        found = []
        for kept in (energy * (hidden > 0), energy * (hidden < 0)):
            each = torch.stack([rows.sum(0) for rows in kept.split(list(counts))])
            found.append(each if len(args) > 1 else each[0])
        before = energies[layer]
        energies[layer] = (found[0], found[1]) if before is None else (before[0] + found[0], before[1] + found[1])

    hooks: list[tuple[nn.Module, Hook]] = []
    for layer, (module, down) in enumerate(zip(modules, downs, strict=True)):
        hooks.append((getattr(module, activation_name(module)), partial(see_gate, layer)))
        hooks.append((down, partial(see_hidden, layer)))
    _run_seen(model, sequences, hooks)
    measured = {"scales": torch.tensor(sizes)}
    for layer, pair in enumerate(energies):
        if pair is not None:
            measured[f"above.{layer}"], measured[f"below.{layer}"] = (energy.cpu() for energy in pair)
    return measured


def _run_seen(model: Any, sequences: Tensor, hooks: Iterable[tuple[nn.Module, Hook]]) -> None:
    """Run sequences, one at a time, while each hook sees what its module is called with."""
    with hooked([module.register_forward_pre_hook(hook) for module, hook in hooks]):
        for sequence in sequences.split(1):
            run_text(model, sequence)


def flip_signs_(model: Any, measured: Mapping[str, Tensor]) -> float:
    """Flip the signs of neurons, in up and in down together, whose energy lies where up is below 0.

    A gated MLP with any activation of its gate computes the same as before, bit for bit: up stands in a product alone.

    Args:
        model: dense, its MLPs gated.
        measured: by `measure`.

    Returns:
        The share of neurons that were flipped.
    """
    flipped = neurons = 0
    for layer, (_, module) in enumerate(neuron_modules(model)):
        wrong = measured[f"below.{layer}"] > measured[f"above.{layer}"]
        flip_(module, wrong)
        flipped, neurons = flipped + int(wrong.sum()), neurons + wrong.numel()
    return flipped / neurons


@torch.no_grad()
def flip_(module: nn.Module, wrong: Tensor) -> None:
    """Multiply up and down of some neurons by -1.

    Args:
        module: a gated MLP, or experts.
        wrong: (neurons,), or (experts, neurons), bool.
    """
    sign = 1.0 - 2.0 * wrong.float()
    if isinstance(module, Experts):
        both, down = cast(Tensor, module.gate_up_proj.weight), cast(Tensor, module.down_proj.weight)
        sign = sign.to(both.device, both.dtype)
        both[:, sign.shape[1] :].mul_(sign[:, :, None])
        down.mul_(sign[:, None])
        return
    names = gated_layers(module)
    assert names is not None  # noqa: S101  (`check` had the swap tried)
    up, last = (cast(nn.Linear, getattr(module, name)) for name in names[-2:])
    sign = sign.to(up.weight.device, up.weight.dtype)
    rows = slice(up.out_features - len(sign), None)  # of up alone, or behind those of the gate
    up.weight[rows].mul_(sign[:, None])
    if up.bias is not None:
        up.bias[rows].mul_(sign)
    last.weight.mul_(sign)


@torch.no_grad()
def gate_quantiles(model: Any, sequences: Tensor, share: float) -> list[float]:
    """Of each block the gate below which a share of the live ones lies.

    Args:
        model: with ReLU.
        sequences: (sequences, tokens) int64.
        share: of live gates.
    """
    live: list[list[Tensor]] = [[] for _ in range(model.config.get_text_config().num_hidden_layers)]

    def see(block: int, act: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = args[0][args[0] > 0].float()
        live[block].append(found[:: max(1, len(found) // _MOST_GATES)].cpu())

    modules = neuron_modules(model)
    hooks = [(getattr(module, activation_name(module)), partial(see, block_number(path))) for path, module in modules]
    _run_seen(model, sequences, hooks)
    found = [torch.cat([torch.zeros(0), *each]).sort().values for each in live]
    return [float(gates[int(share * len(gates))]) if len(gates) else 0.0 for gates in found]


@torch.no_grad()
def shares_of_zeros(model: Any, sequences: Tensor) -> dict[str, list[float]]:
    """Of each layer the share of zeros among its gates (`gate`), and in what down reads (`hidden`), on text."""
    neurons, found = Neurons(model, None), []
    try:
        for sequence in sequences.split(1):
            with neurons.watching():
                run_text(model, sequence)
            found.append(neurons.zeros_by_layer().cpu())
    finally:
        neurons.let_go()
    gate, hidden = torch.stack(found).mean(0).tolist()
    return {"gate": gate, "hidden": hidden}
