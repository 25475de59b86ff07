"""What follows the hidden states of a model in training, so that its sparsity stays what it is to be.

Hidden states change as weights train. Under thresholds that stand still SmolLM2-135M drifts from 64 to 56 % with
straight-through gradients, and under routers that stand still from 55 % to 2: it learns to do with less than it will be
held to.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.adapt.processes import mean_over_processes
from teal_cli.checkpoint.rules import Routed, Zeros
from teal_cli.models.activations import FatReLU
from teal_cli.models.offload import stacked
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.replace import sparse_layers
from teal_cli.sparse.routed import Router

_EVERY = 4
"""Passes from one look to the next."""
_RATE = 0.1
"""By how much of the way a threshold goes to what a look finds."""
_LEARNED = 0.2
"""Least share of the target that routers leave out of themselves, for their shares to say which MLPs can do without."""
_TOKENS = 64
"""Of a pass, on which quantiles are taken."""
_SAMPLED = 8192
"""Numbers of those tokens, of which a quantile is within half a per cent of the share that it stands for. Of 37,000,
the inputs of a layer of 576, it took 182 microseconds on an H200: a third of a pass, for all layers."""


class Followed(ABC):
    """Looks at modules every few passes, and moves their thresholds towards the quantiles found there.

    Args:
        modules: their first argument is (sequences, tokens, features), or (some tokens, features) of experts.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self._passes = 0
        self._shape: torch.Size | None = None
        self._found: dict[int, Tensor] = {}
        self.pending: tuple[list[int], Tensor] | None = None
        """What the last look found, until the next pass in training begins."""
        self.looks = False
        """Whether the pass under way, or the next one, is a look."""
        places = enumerate(self.modules)
        self._handles = [module.register_forward_pre_hook(self._hook(index)) for index, module in places]

    @property
    def every(self) -> int:
        """Passes from one look to the next."""
        return _EVERY

    @property
    def tokens(self) -> int:
        """Of a look, which `quantile` is given at about."""
        return _TOKENS

    @abstractmethod
    def quantile(self, index: int, sample: Tensor) -> Tensor:
        """0-d float32: where the threshold of a module should be, by (tokens, features) that it is given."""

    @abstractmethod
    def move(self, indices: list[int], wanted: Tensor) -> None:
        """Move the thresholds of some modules a part of the way to (modules,) float32; on the CPU after a resume."""

    @abstractmethod
    def values(self) -> Tensor:
        """One tensor of all that a resumed run must have again."""

    @abstractmethod
    def put(self, values: Tensor) -> None:
        """Take on what `values` gave."""

    def install_(self) -> None:  # noqa: B027  (most need nothing)
        """Before a pass: put thresholds where the model looks for them."""

    @property
    def kind(self) -> Hashable:
        """Passes of one kind do the same here (`Recipe.pass_kind`)."""
        return self.looks

    @torch.no_grad()
    def before_pass_(self) -> None:
        """Before a pass in training thresholds move by the last look.

        Not right after the look: its backward may make activations again, and must drop what the forward dropped.
        """
        if self.pending is not None:
            self.move(*self.pending)
            self.pending = None
        self._passes += 1
        self.looks = self._passes % self.every == 0

    @contextmanager
    def looking(self, shape: torch.Size) -> Iterator[None]:
        """Around a pass of so many (sequences, tokens) in training."""
        if not self.looks:
            yield
            return
        self._shape = shape
        try:
            yield
        finally:
            self._shape = None
        found, self._found = self._found, {}
        if found:
            # Each process reads its own part of a batch, and all must drop alike.
            self.pending = list(found), mean_over_processes(stacked(found.values()))

    def _hook(self, index: int) -> Any:
        @torch.no_grad()
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._shape is None:
                return
            sequences, tokens = self._shape
            late = args[0].detach().flatten(0, -2)
            if len(late) == sequences * tokens:  # the second half of each sequence, which is never a dense prefix
                late = late.view(sequences, tokens, -1)[:, -(-tokens // 2) :].flatten(0, 1)
            self._found[index] = self.quantile(index, late[:: max(1, len(late) // self.tokens)].float())

        return look

    def state(self) -> dict[str, Tensor]:
        """For `Recipe.state`."""
        if not self.modules:
            return {}
        pending = {}
        if self.pending is not None:
            indices, wanted = self.pending
            pending = {"pending": torch.tensor(indices), "wanted": wanted}
        return {"followed": self.values(), "passes": torch.tensor(self._passes), **pending}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `state` gave."""
        if "followed" in state:
            self._passes = int(state["passes"])
            self.put(state["followed"])
            self.pending = None
            if "pending" in state:
                self.pending = state["pending"].tolist(), state["wanted"]

    def stop(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()


class _HeldTensors(Followed):
    """Whose thresholds are tensors that stay where they are, one for each module."""

    _held: list[Tensor]
    """0-d float32."""

    def move(self, indices: list[int], wanted: Tensor) -> None:
        """See `Followed`."""
        held = [self._held[index] for index in indices]
        for device in dict.fromkeys(each.device for each in held):
            here = [number for number, each in enumerate(held) if each.device == device]
            ends = wanted.to(device).unbind()
            torch._foreach_lerp_([held[number] for number in here], [ends[number] for number in here], _RATE)

    def values(self) -> Tensor:
        """See `Followed`."""
        return stacked(self._held)

    def put(self, values: Tensor) -> None:
        """See `Followed`."""
        for held, value in zip(self._held, values, strict=True):
            held.copy_(value)


class FollowedThresholds(_HeldTensors):
    """Of sparse layers: the share of inputs that their rules expect to drop.

    Args:
        model: with sparse layers. Rules that have no threshold are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = sparse_layers(model).values()
        super().__init__([layer for layer in layers if _has_threshold(layer)])
        self._held = [layer.threshold for layer in self._layers]

    @property
    def _layers(self) -> list[SparseLinear]:
        return cast(list[SparseLinear], self.modules)

    def install_(self) -> None:
        """See `Followed`: a model that was moved or cast has its first thresholds again."""
        for layer, threshold in zip(self._layers, self._held, strict=True):
            layer.threshold = threshold

    def quantile(self, index: int, sample: Tensor) -> Tensor:
        """See `Followed`: of sizes."""
        return _quantile(sample.abs(), self._layers[index].rule.expected_sparsity or 0.0)


class FollowedGates(_HeldTensors):
    """Of FATReLU: a share of the live gates (those above 0), which may change.

    Args:
        acts: one for each layer. Their thresholds are tensors until `stop`, so that no pass waits to read them.
        device: of the model.
    """

    def __init__(self, acts: Sequence[FatReLU], device: torch.device) -> None:
        super().__init__(acts)
        self._held = [torch.zeros((), device=device) for _ in acts]
        self._share = torch.zeros((), device=device)
        self.share = 0.0
        """Of live gates, which the next look drops."""
        self.install_()

    @property
    def _acts(self) -> list[FatReLU]:
        return cast(list[FatReLU], self.modules)

    def install_(self) -> None:
        """See `Followed`."""
        for act, threshold in zip(self._acts, self._held, strict=True):
            act.followed = threshold

    def drop_(self, share: float) -> None:
        """Drop this share of live gates from the next look on."""
        self.share = share
        self._share.fill_(share)

    def quantile(self, index: int, sample: Tensor) -> Tensor:
        """See `Followed`: of live gates; no look waits for the device, so their number stays there."""
        gates = sample.flatten().sort().values
        live = (gates > 0).sum()
        at = (len(gates) - live + (self._share * live).long()).clamp(max=len(gates) - 1)
        return gates.gather(0, at.view(1)).view(()).clamp(min=0)  # an index would be read on the host

    def stop(self) -> None:
        """See `Followed`: thresholds are numbers again."""
        super().stop()
        for act, threshold in zip(self._acts, self.values().tolist(), strict=True):
            act.followed, act.threshold = None, threshold


class FollowedRouters(Followed):
    """Of routers: the share of groups that each leaves out when this begins, all scaled to a mean; biases move.

    Args:
        routers: whose biases nothing else moves.
        target: mean share of groups that are to be left out.
        even: whether it is the share of each.
    """

    def __init__(self, routers: Sequence[Router], target: float, *, even: bool = False) -> None:
        super().__init__(routers)
        self._target, self._even = target, even
        self._shares: list[Tensor] | None = None

    @property
    def rate(self) -> float:
        """By how much of the way biases go to what a look finds."""
        return _RATE

    @property
    def kind(self) -> Hashable:
        """See `Followed`: the first look finds something else."""
        return self.looks, self._shares is None

    def quantile(self, index: int, sample: Tensor) -> Tensor:
        """See `Followed`: the logit below which the share lies. The first look only finds shares."""
        router = cast(Router, self.modules[index])
        logits = router.forward(sample.to(router.weight.dtype)).float()  # without its hooks: this is one
        if self._shares is None:
            return (logits <= 0).float().mean()
        return _quantile(logits, float(self._shares[index]))

    def move(self, indices: list[int], wanted: Tensor) -> None:
        """See `Followed`."""
        if self._shares is None:
            mean = float(wanted.mean())
            if self._even or mean <= _LEARNED * self._target:  # then they say nothing
                shares = torch.full_like(wanted, self._target)
            else:
                shares = (wanted * (self._target / mean)).clamp(0.02, 0.98)
            self._shares = list(shares.cpu().unbind())
            return
        for index, logit in zip(indices, wanted, strict=True):
            cast(Router, self.modules[index]).bias.data.sub_(self.rate * logit)

    def values(self) -> Tensor:
        """See `Followed`: of each router its share, below 0 before the first look, and its biases."""
        shares = [torch.tensor(-1.0)] * len(self.modules) if self._shares is None else self._shares
        biases = [cast(Router, router).bias.detach().float().cpu() for router in self.modules]
        return torch.stack([torch.cat([share.view(1), bias]) for share, bias in zip(shares, biases, strict=True)])

    def put(self, values: Tensor) -> None:
        """See `Followed`."""
        self._shares = None if bool((values[:, 0] < 0).any()) else list(values[:, 0].cpu().unbind())
        for router, value in zip(self.modules, values, strict=True):
            cast(Router, router).bias.data.copy_(value[1:])


def _has_threshold(layer: SparseLinear) -> bool:
    return not isinstance(layer.rule, Zeros | Routed) and bool(layer.rule.expected_sparsity)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The number of (tokens, features) below which a share of them lies; of many, of some, evenly among them."""
    step = -(-values.numel() // _SAMPLED)
    while math.gcd(step, values.shape[-1]) > 1:  # else some features would never be seen
        step += 1
    some = values.flatten()[::step]
    rank = min(max(round(share * some.numel()), 1), some.numel())
    return some.kthvalue(rank).values
