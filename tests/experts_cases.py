"""Random launches of routers and of chosen experts, and their definitions in float64."""

from dataclasses import dataclass

import torch
from kernel_cases import EPS, random_packed, weights_of
from torch import Tensor
from torch.nn.functional import silu

from teal_kernels import active_inputs, masked_input
from teal_kernels.experts import Chosen, chosen_of, expert_of, no_ids, stacked, table_of
from teal_kernels.launching import EMPTY
from teal_kernels.operands import Norm, Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import Curve, TileConfig, gemv, squares_of
from teal_kernels.triton_router import Router, route

ALPHA, LIMIT_OF_GATE = 1.702, 4.0
"""Of the activation of paired products."""


def expert(stack: Tensor | Packed, nth: int) -> Tensor:
    """(in, out) of one expert, in float64."""
    return stack[nth].double() if isinstance(stack, Tensor) else weights_of(expert_of(stack, nth))


def random_norm(x: Tensor, weight: Tensor) -> Norm:
    """With the sums of squares of x."""
    squares = torch.stack([chunk.float().square().sum(1) for chunk in x.split(16, dim=1)], dim=1)
    return Norm(weight, EPS, squares)


def normalised(x: Tensor, norm: Norm | None) -> Tensor:
    """What the kernels see of x, in its dtype."""
    if norm is None:
        return x
    scale = torch.rsqrt(norm.squares.sum(1, keepdim=True) / x.shape[1] + norm.eps)
    return (x.float() * scale).to(x.dtype) * norm.weight


@dataclass
class ExpertsCase:
    """One product of the chosen experts of some tokens."""

    epilogue: str
    parts: tuple[int, ...]
    x: Tensor
    stack: Tensor | Packed
    thresholds: Tensor
    before: Tensor
    norm: Norm | None
    chosen: Chosen
    bias: Tensor | None = None
    """(experts, out)"""

    @property
    def seen(self) -> Tensor:
        """What the thresholds are compared with."""
        return normalised(self.x, self.norm)

    @property
    def kept(self) -> int:
        """Inputs above the first threshold, over all tokens and their experts."""
        times = 1 if self.epilogue == "residual" else self.chosen.ids.shape[1]
        return times * int(active_inputs(self.seen, self.thresholds[0]).sum())

    def expected(self) -> Tensor:
        """The result in float64."""
        tokens, count = self.chosen.ids.shape
        each = []
        for token in range(tokens):
            for nth in range(count):
                row = token * count + nth if self.epilogue == "residual" else token
                own = self.thresholds if self.thresholds.dim() == 1 else self.thresholds[token]
                x = masked_input(self.seen[row], own[0]).double()
                which = int(self.chosen.ids[token, nth])
                y = x @ expert(self.stack, which)
                each.append(y if self.bias is None else y + self.bias[which].double())
        y = torch.stack(each)
        if self.epilogue == "gated":
            return silu(y[:, : self.parts[0]]) * y[:, self.parts[0] :]
        if self.epilogue == "paired":
            gate, up = y[:, ::2].clamp(max=LIMIT_OF_GATE), y[:, 1::2].clamp(-LIMIT_OF_GATE, LIMIT_OF_GATE)
            return (up + 1) * gate * torch.sigmoid(ALPHA * gate)
        if self.epilogue == "residual":
            y = y.view(tokens, count, -1) * self.chosen.weights.double()[:, :, None]
            return y.sum(1) + self.before.double()
        return y

    def launch(
        self, config: TileConfig, scratch: Scratch | None = None, counts: Tensor | None = None, *, pdl: bool = False
    ) -> tuple[Tensor, Tensor]:
        """y and its squares."""
        scratch = scratch or Scratch(self.x.device)
        table = table_of(self.stack)
        config = fitting(config, table, 1)
        y, tokens = self.before.clone(), self.chosen.ids.shape[0]
        columns = squares_of(table, self.parts, config, tokens, self.x.dtype, self.chosen)
        squares = torch.zeros(tokens, columns, device=self.x.device)
        gemv(
            self.x,
            table,
            self.parts,
            self.thresholds,
            y,
            config,
            scratch,
            bias=self.bias,
            norm=self.norm,
            epilogue=self.epilogue,
            activation="clamped_swiglu" if self.epilogue == "paired" else None,
            activation_threshold=LIMIT_OF_GATE if self.epilogue == "paired" else 0.0,
            curve=Curve(ALPHA) if self.epilogue == "paired" else None,
            squares=squares if self.epilogue == "residual" else None,
            counts=counts,
            experts=self.chosen,
            pdl=pdl,
        )
        assert bool((scratch.tensor("partial", 1, torch.int32, EMPTY) == EMPTY).all())
        return y, squares


def random_experts(
    epilogue: str,
    tokens: int,
    *,
    experts: int = 5,
    chosen: int = 3,
    inputs: int = 44,
    outputs: int = 21,
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.5,
    norm: bool | None = None,
    packed: tuple[int, int, bool] | None = None,
    bias: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> ExpertsCase:
    """A random launch. Without a sparsity thresholds are below zero, which keeps zeros too."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    parts = {"gated": (outputs, outputs), "paired": (2 * outputs,)}.get(epilogue, (outputs,))
    pairs = tokens * chosen
    ids, weights = no_ids(tokens, chosen, torch.device(device))
    for token in range(tokens):
        ids[token] = torch.randperm(experts, generator=generator)[:chosen]
    weights += torch.rand(tokens, chosen, generator=generator).to(device)
    if packed is None:
        stack: Tensor | Packed = random(experts, inputs, sum(parts))
    else:
        stack = stacked(
            [random_packed(inputs, parts, *packed, seed=seed + nth, device=device) for nth in range(experts)]
        )
    x = random(pairs if epilogue == "residual" else tokens, inputs)
    has_norm = epilogue != "residual" if norm is None else norm
    case = ExpertsCase(
        epilogue,
        parts,
        x,
        stack,
        thresholds=torch.full((len(parts),), -1.0, device=device),
        before=random(tokens if epilogue == "residual" else pairs, outputs),
        norm=random_norm(x, random(inputs)) if has_norm else None,
        chosen=chosen_of(stack, ids, weights),
        bias=random(experts, sum(parts)) if bias else None,
    )
    if sparsity:
        case.thresholds.fill_(float(case.seen.abs().float().quantile(sparsity)))
    return case


@dataclass
class RouterCase:
    """One launch of a router."""

    x: Tensor
    norm: Norm | None
    router: Router
    chosen: int

    @property
    def logits(self) -> Tensor:
        """(tokens, experts), in float32, rounded as x's dtype has them."""
        logits = normalised(self.x, self.norm).double() @ self.router.weight[: self.router.experts].double().t()
        if self.router.bias is not None:
            logits += self.router.bias.double()
        return logits.to(self.x.dtype).float()

    def launch(self, scratch: Scratch | None = None, *, pdl: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, weights and the weight of what is aside."""
        scratch = scratch or Scratch(self.x.device)
        tokens = self.x.shape[0]
        chosen = Chosen(*no_ids(tokens, self.chosen, self.x.device), stride=1)
        share = torch.zeros(tokens, device=self.x.device) if self.router.aside else None
        route(self.x, self.router, chosen, scratch, norm=self.norm, aside_share=share, pdl=pdl)
        assert bool((scratch.tensor("logits of experts", 1, torch.int32, EMPTY) == EMPTY).all())
        return chosen.ids, chosen.weights, share


def random_router(
    tokens: int,
    experts: int,
    chosen: int,
    *,
    inputs: int = 44,
    dtype: torch.dtype = torch.float32,
    norm: bool = True,
    bias: bool = False,
    aside: bool = False,
    device: str = "cpu",
    seed: int = 0,
    **options: object,
) -> RouterCase:
    """A random launch."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x = random(tokens, inputs)
    router = Router(
        random(experts + aside, inputs) * inputs**-0.5,
        random(experts) if bias else None,
        aside=aside,
        **options,  # type: ignore[arg-type]
    )
    return RouterCase(x, random_norm(x, random(inputs)) if norm else None, router, chosen)
