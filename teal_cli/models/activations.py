"""Activations that make zeros, as keys of any family's configuration: relu, relu2, fatrelu and drelu.

    "hidden_act": "fatrelu", "hidden_act_param": 0.01   x where x >= 0.01, else 0 (ProSparse, arXiv 2402.13516); a list
                                                        has a threshold for each layer
    "hidden_act": "drelu"                               relu(gate) * relu(up) (Turbo Sparse, arXiv 2406.05955)

Importing it (`teal_cli.hf` does) teaches transformers both names, which it refuses otherwise. A module that is made by
its name knows neither its layer nor what it is multiplied with. So the end of every model's construction is wrapped:
there FATReLU is told its threshold, and an MLP with dReLU is given a forward that activates up too. Before that neither
computes anything.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import cache, wraps
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN, ReLUSquaredActivation

from teal_cli.errors import ArtefactError, nearest, shown
from teal_cli.models.architectures import Projection, find_projections
from teal_cli.models.layers import Experts, is_stacked, unstack_experts_
from teal_kernels.gate_first import GateActivation

_KEYS = ("hidden_act", "hidden_activation", "activation_function")
"""Under which configurations name the activation of their MLPs."""
_THRESHOLDS = "hidden_act_param"
_HIDDEN, _NEURONS = 6, 4
"""Sizes of the layers by which the form of an MLP is tried."""


class FatReLU(nn.Module):
    """x where x >= threshold, else 0. The threshold is set from the configuration once the model is there."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold: float | None = None
        self.followed: Tensor | None = None
        """A threshold that changes in training, 0-d float32, in the place of the other."""

    @property
    def activation(self) -> GateActivation:
        """What the kernels know it as.

        Raises:
            ArtefactError: no threshold was set.
        """
        if self.threshold is None:
            raise ArtefactError("the threshold of fatrelu is not set: no model's constructor made this module")
        return GateActivation("fatrelu", self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if self.followed is not None:
            return torch.where(x < self.followed, torch.zeros((), dtype=x.dtype, device=x.device), x)
        return self.activation.of_gate(x)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"threshold={self.threshold}"


class DoubleReLU(nn.ReLU):
    """ReLU of the gate and of up. Only an MLP that gives it both may use it, of which the first one tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.of_both = False

    def forward(self, x: Tensor) -> Tensor:
        """Any shape.

        Raises:
            ArtefactError: it stands in a module that would activate the gate alone.
        """
        if not self.of_both:
            raise ArtefactError("drelu stands in a module that gives it the gate alone: it needs a gated MLP")
        return super().forward(x)


class _ActivatesUp:
    """Of MLPs and experts that give both products to their activation."""

    activates_up = True


class _DoubleMLP(_ActivatesUp):
    layers: tuple[str, ...]
    """Names of gate, up and down among the children, or of both in one and down."""
    act: str

    def forward(self: Any, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)"""
        *first, last = (getattr(self, name) for name in self.layers)
        gate, up = (layer(x) for layer in first) if len(first) == 2 else first[0](x).chunk(2, dim=-1)
        activate = getattr(self, self.act)
        hidden: Tensor = last(activate(gate) * activate(up))
        return hidden


class _DoubleExperts(_ActivatesUp):
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(batch * tokens, hidden), with the experts of each row and their weights -> (batch * tokens, hidden)"""
        hidden: Tensor = Experts(self)(hidden_states, top_k_index, top_k_weights)
        return hidden


@cache
def _subclass(base: Any, form: Any, names: tuple[tuple[str, Any], ...] = ()) -> type:
    return type(f"DoubleReLU{base.__name__}", (form, base), {"__doc__": "With dReLU.", **dict(names)})


def activate_up_(module: nn.Module) -> None:
    """Let an MLP, or experts, give both products to their activation: the same modules and keys, another forward.

    Args:
        module: its activation stands among its children.

    Raises:
        ArtefactError: it is not gated, or computes more than down(activation(gate) * up).
    """
    if getattr(module, "activates_up", False):
        return
    act = activation_name(module)
    kind: Any = type(module)
    if isinstance(module, Experts):
        module.activates_up = True
    elif is_stacked(module):
        holder = nn.ModuleList([module])
        unstack_experts_(holder)
        if type(holder[0]) is not Experts:
            raise ArtefactError(f"drelu needs experts that are only gated, which {type(module).__name__} are not")
        module.__class__ = _subclass(kind, _DoubleExperts)
    else:
        layers = gated_layers(module)
        if layers is None:
            raise ArtefactError(f"drelu needs MLPs that are only gated, which {type(module).__name__} is not")
        module.__class__ = _subclass(kind, _DoubleMLP, (("layers", layers), ("act", act)))
    activation = getattr(module, act)
    if isinstance(activation, DoubleReLU):
        activation.of_both = True


def gated_layers(mlp: nn.Module) -> tuple[str, ...] | None:
    """Gate, up and down of an MLP that is down(activation(gate) * up), or both in one, and down, by name.

    Asked of a copy with tiny layers, so that the weights need not be there yet. None of any other module.
    """
    linear = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]
    if len(linear) not in (2, 3):
        return None
    return next((order for order in permutations(linear) if _computes_gated(mlp, order)), None)


def _computes_gated(mlp: nn.Module, order: tuple[str, ...]) -> bool:
    inputs = [*[(_HIDDEN, _NEURONS * (4 - len(order)))] * (len(order) - 1), (_NEURONS, _HIDDEN)]
    random = torch.Generator().manual_seed(0)
    tiny: dict[str, nn.Module] = {}
    for name, (size, outputs) in zip(order, inputs, strict=True):
        layer = nn.Linear(size, outputs, bias=getattr(mlp, name).bias is not None, device="meta")
        for key, parameter in list(layer.named_parameters()):
            value = torch.randn(parameter.shape, generator=random, dtype=torch.float64, device="cpu")
            setattr(layer, key, nn.Parameter(value, requires_grad=False))
        tiny[name] = layer
    probe = object.__new__(type(mlp))
    probe.__dict__.update(vars(mlp))
    probe._modules = {**mlp._modules, **tiny, activation_name(mlp): nn.SiLU()}
    x = torch.randn(3, _HIDDEN, generator=random, dtype=torch.float64, device="cpu")
    *first, last = tiny.values()
    gate, up = (layer(x) for layer in first) if len(first) == 2 else first[0](x).chunk(2, dim=-1)
    expected = last(nn.functional.silu(gate) * up)
    try:
        found = probe(x[None])
    except Exception:  # other layers, or other arguments, than those that were tried
        return False
    return isinstance(found, Tensor) and found.shape == (1, 3, _HIDDEN) and torch.allclose(found[0], expected)


def activation_name(module: nn.Module) -> str:
    """Of a module's child that activates.

    Raises:
        ArtefactError: it has none, or several.
    """
    places = ("transformers.activations", "torch.nn.modules.activation", __name__)
    found = [
        name
        for name, child in module.named_children()
        if type(child).__module__ in places and not isinstance(child, nn.MultiheadAttention)
    ]
    if len(found) != 1:
        raise ArtefactError(f"{type(module).__name__} has {len(found)} modules that activate, where one was looked for")
    return found[0]


def _take_from_config_(model: Any) -> None:
    """Tell a model's activations what its configuration says of them; those that know it already keep it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FatReLU) and module.threshold is None:
            module.threshold = _threshold(model.config, path)
        elif any(isinstance(child, DoubleReLU) and not child.of_both for child in module.children()):
            activate_up_(module)


def block_number(path: str) -> int:
    """Of a module inside a block: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def _threshold(config: Any, path: str) -> float:
    """Of the FATReLU at a module path."""
    given = getattr(config, _THRESHOLDS, None)
    if isinstance(given, list | tuple):
        if len(given) != config.num_hidden_layers:
            raise ArtefactError(
                f"{_THRESHOLDS} in config.json has {len(given)} thresholds of fatrelu, and there are "
                f"{config.num_hidden_layers} layers"
            )
        given = given[block_number(path)]
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ArtefactError(
            f"hidden_act fatrelu needs its threshold as {_THRESHOLDS} in config.json, not {shown(given)}"
        )
    return float(given)


def _then_take_from_config(post_init: Callable[..., None]) -> Callable[..., None]:
    """transformers calls it at the end of each model's constructor, whoever asked for the model."""

    @wraps(post_init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        if any(getattr(self.config, key, None) in ("fatrelu", "drelu") for key in _KEYS):
            _take_from_config_(self)

    return wrapped


ACT2FN["fatrelu"] = FatReLU
ACT2FN["drelu"] = DoubleReLU
PreTrainedModel.post_init = _then_take_from_config(PreTrainedModel.post_init)  # type: ignore[method-assign]


def intermediates(projections: Iterable[Projection]) -> list[Projection]:
    """The projections that read the neurons of MLPs, or of experts."""
    return [p for p in projections if p.site.rpartition(".")[2] in ("mlp_intermediate", "experts_intermediate")]


def neuron_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that activate neurons, MLPs or experts, of a decoder: module path and module, in order.

    Raises:
        ArtefactError: an unsupported model type.
    """
    for down in intermediates(find_projections(model)):
        path = down.name.rpartition(".")[0]
        yield path, model.get_submodule(path)


def activation_keys(config: Any) -> list[str]:
    """The keys of a text model's configuration that say its activation, and FATReLU's thresholds where it has some."""
    names = [key for key in _KEYS if isinstance(getattr(config, key, None), str)]
    return [*names, _THRESHOLDS] if getattr(config, _THRESHOLDS, None) is not None else names


def set_activation_(model: Any, name: str, thresholds: list[float] | None = None) -> None:
    """Give all MLPs and experts of a decoder another activation, and its configuration the keys that say so.

    Args:
        model: plain, as `load_model` gives it; the weights stay.
        name: as transformers knows it: `relu`, `fatrelu`, `drelu` or another.
        thresholds: of `fatrelu`, one for each layer.

    Raises:
        ArtefactError: MLPs of another form, or a family whose MLPs do not go by the configuration: nothing was changed
            that a reader would not see.
    """
    config = model.config.get_text_config()
    keys = [key for key in _KEYS if isinstance(getattr(config, key, None), str)]
    wanted = deepcopy(model.config)
    for key in keys:
        setattr(wanted.get_text_config(), key, name)
    if thresholds is not None:
        setattr(wanted.get_text_config(), _THRESHOLDS, thresholds)
    with torch.device("meta"):
        again = type(model)(wanted)
    places = list(neuron_modules(model))
    made = [getattr(module, activation_name(module)) for module in (again.get_submodule(path) for path, _ in places)]
    expected = type(ACT2FN[name])
    if not places or any(type(activation) is not expected for activation in made):
        raise ArtefactError(
            f"the MLPs of model type {model.config.model_type} do not take their activation from config.json: {name} "
            "could not be loaded again"
        )
    for (_, module), activation in zip(places, made, strict=True):
        if expected is DoubleReLU:
            activate_up_(module)
        elif getattr(module, "activates_up", False):
            raise ArtefactError(f"{type(module).__name__} activates up too: {name} would be of the gate alone")
        setattr(module, activation_name(module), activation)
    for key in keys:
        setattr(config, key, name)
    if thresholds is not None:
        setattr(config, _THRESHOLDS, thresholds)


def check_activation(config: dict[str, Any], where: object) -> None:
    """Refuse an activation that nobody knows, before transformers stumbles over it.

    Args:
        config: config.json, parsed.
        where: the folder, for the message.

    Raises:
        ArtefactError: an unknown name.
    """
    for key in _KEYS:
        name = config.get(key)
        if isinstance(name, str) and name not in ACT2FN:
            raise ArtefactError(
                f"{where}: unknown activation {shown(name)} ({key} in config.json){nearest(name, ACT2FN)}"
            )


def zeroing_activation(mlp: nn.Module) -> GateActivation | None:
    """The activation of an MLP (or of a block that has its MLP's layers itself), if it makes exact zeros."""
    for module in mlp.children():
        if isinstance(module, nn.ReLU):
            return GateActivation("drelu" if getattr(mlp, "activates_up", False) else "relu")
        if isinstance(module, ReLUSquaredActivation):
            return GateActivation("relu2")
        if isinstance(module, FatReLU):
            return module.activation
    return None


@torch.no_grad()
def computes_gated(mlp: nn.Module, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: GateActivation) -> bool:
    """Whether an MLP is down(activation(gate) * up) and nothing else, by a random token: bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, gate.in_features, generator=generator).to(gate.weight.device, gate.weight.dtype)
    return torch.equal(mlp(x), down(activation.hidden(gate(x), up(x))))
