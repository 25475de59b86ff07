"""lte: routers choose the groups of neurons that a token needs (Learn To be Efficient, arXiv 2402.06126)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.adapt.fitted import RefittedRouters, fit_bytes, fitted_router, group_sizes, tokens_of_fit
from teal_cli.adapt.followed import FollowedRouters
from teal_cli.adapt.groups import balanced_groups, reorder_neurons_
from teal_cli.adapt.multiplier import Steering
from teal_cli.adapt.processes import mean_over_processes
from teal_cli.adapt.recipe import Added, Batch, Outcome, Progress, Recipe, Stage
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import ROUTED, Routed, Rule
from teal_cli.config.recipes.lte import Options
from teal_cli.errors import UsageError
from teal_cli.models.architectures import block_weights, find_projections
from teal_cli.models.block_calls import hooked
from teal_cli.models.forward import run_text
from teal_cli.sparse import replace_projections_, set_thresholds_
from teal_cli.sparse.routed import Router
from teal_cli.sparse.routing import (
    RoutableMLP,
    biases_for,
    check_routed,
    plan_of_routers,
    random_weights_,
    routable_mlps,
    route_,
    routed_mlps,
    shares_left_out,
)

_FIRST_ETA = 0.5
"""Where steering begins."""
_SOFT, _HARD = "soft", "hard"


class Lte(Recipe):
    """Neurons that are alike become neighbours; then two stages.

    Soft: each group of neurons is multiplied by its router's sigmoid G; the loss adds eta G^2, which closes groups, and
    1 / ((G - 1/2)^2 + epsilon), which makes routers decide, each a mean over tokens, groups and MLPs, in float32. Hard:
    a group is there or not, the weights of routers stay as they are.

    Five departures from the paper. With option `routers=fitted` there is no soft stage: routers begin as the linear
    layer that tells best how much each group adds, leaving out the target, and are fitted again while the model
    trains (`RefittedRouters`). Otherwise routers begin with all groups chosen, so that training begins with the dense
    model. The loss that makes routers decide therefore grows from zero during the second half of the soft stage: from
    the beginning it would hold them where they are. And eta is steered, so that the share of groups that is left out
    is the sparsity that was asked for, unless option `eta` names a number; by one number for all MLPs, or, with
    option `shares=even`, for each by its own, so that all leave out the same. In
    the hard stage the biases of routers follow the hidden states (`FollowedRouters`): else the model trains until
    they choose all groups again.
    """

    name = "lte"

    @property
    def _options(self) -> Options:
        assert isinstance(self.setting.options, Options)  # noqa: S101  (the configuration's word)
        return self.setting.options

    @property
    def _target(self) -> float:
        return 0.5 if self.setting.sparsity is None else self.setting.sparsity

    @property
    def _is_fitted(self) -> bool:
        return self._options.routers == "fitted"

    @property
    def _is_even(self) -> bool:
        """Whether each MLP is to leave out the same share: fitted routers begin so."""
        return self._is_fitted or self._options.shares == "even"

    def check(self, model: nn.Module) -> None:
        """See `Recipe`."""
        options = self._options
        plan_of_routers(model, self._rule)  # refuses a model without MLPs that can be routed
        for mlp in routable_mlps(model).values():
            neurons = getattr(mlp.plain, mlp.names[0]).out_features
            if neurons % options.group:
                raise UsageError(
                    f"option group: the {neurons} neurons of {mlp.path} are not whole groups of {options.group}"
                )

    def adds(self, model: nn.Module, *, tokens: int, measured: int, itemsizes: tuple[int, int]) -> Added:
        """See `Recipe`: routers, and where they are fitted, what a look finds of all of them, and a fit of one."""
        options, count, fits = self._options, 0, []
        for mlp in routable_mlps(model).values():
            gate = getattr(mlp.plain, mlp.names[0])
            groups = gate.out_features // options.group
            router = Router(gate.in_features, groups, options.rank, device="meta")
            count += sum(parameter.numel() for parameter in router.parameters())
            fits.append((gate.in_features, gate.out_features, groups))
        if options.routers == "learned":
            return Added(trained=count)
        if not self._is_fitted:
            return Added(fixed=count)
        in_training, before = itemsizes
        return Added(
            fixed=count,
            copied=2 * count,  # one by one, and together (`Followed.looking`)
            kept=3 * count,  # what was measured, and in a checkpoint: one by one, and together
            of_pass=max(fit_bytes(tokens_of_fit(tokens), mlp, in_training) for mlp in fits),
            of_measuring=max(fit_bytes(measured, mlp, before) for mlp in fits),
        )

    @property
    def _rule(self) -> Routed:
        """Before anything was measured."""
        return Routed(self._options.group, self._options.rank, self._target)

    @torch.no_grad()
    def measure(self, model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
        """See `Recipe`: the order of the neurons of each MLP, and the biases of random routers."""
        options, measured = self._options, {}
        mlps = list(routable_mlps(model).values())
        for number, mlp in enumerate(mlps):
            gate = getattr(mlp.plain, mlp.names[0])
            measured[f"{mlp.path}.order"] = balanced_groups(gate.weight, options.group, self.setting.seed + number)
        if options.routers == "random":
            measured |= self._random_biases(model, mlps, sequences)
        elif self._is_fitted:
            measured |= self._fitted(model, mlps, measured, sequences)
        return measured

    def _fitted(
        self, model: nn.Module, mlps: Sequence[RoutableMLP], orders: Mapping[str, Tensor], sequences: Tensor
    ) -> dict[str, Tensor]:
        """Weights and biases by which routers leave out the target of what the dense model gives them."""
        options, found, read = self._options, {}, {}
        handles = []
        for mlp in mlps:

            def hook_mlp(module: nn.Module, args: tuple[Any, ...], path: str = mlp.path) -> None:
                read[path] = args[0].flatten(0, -2)

            def hook_down(module: nn.Module, args: tuple[Any, ...], path: str = mlp.path) -> None:
                layer = cast(nn.Linear, module)
                order = orders[f"{path}.order"].to(layer.weight.device)
                sizes = group_sizes(args[0], layer, options.group, order)
                fitted = fitted_router(read.pop(path), sizes, self._target)
                # Off the GPU: they are kept for the whole run, to resume by.
                found[f"{path}.weight"], found[f"{path}.bias"] = fitted.weight.cpu(), fitted.bias.cpu()

            handles.append(mlp.plain.register_forward_pre_hook(hook_mlp))
            handles.append(getattr(mlp.plain, mlp.names[2]).register_forward_pre_hook(hook_down))
        with hooked(handles):
            run_text(model, sequences)
        return found

    def _random_biases(self, model: nn.Module, mlps: Sequence[RoutableMLP], sequences: Tensor) -> dict[str, Tensor]:
        """By which random routers leave out the target of what the dense model gives them."""
        generator, biases, handles = torch.Generator().manual_seed(self.setting.seed), {}, []
        for mlp in mlps:
            gate = getattr(mlp.plain, mlp.names[0])
            groups = gate.out_features // self._options.group
            router = Router(gate.in_features, groups, self._options.rank).to(gate.weight.device).requires_grad_(False)
            random_weights_(router, generator)
            router.bias.zero_()

            def hook(module: nn.Module, args: tuple[Any, ...], path: str = mlp.path, router: Router = router) -> None:
                biases[f"{path}.bias"] = biases_for(router, args[0].float(), self._target)

            handles.append(mlp.plain.register_forward_pre_hook(hook))
        with hooked(handles):
            run_text(model, sequences)
        return biases

    @torch.no_grad()
    def operate_(self, model: nn.Module, measured: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        plan = plan_of_routers(model, self._rule)
        for mlp in routable_mlps(model).values():
            gate, up, down = (getattr(mlp.plain, name) for name in mlp.names)
            reorder_neurons_(gate, up, down, measured[f"{mlp.path}.order"].to(gate.weight.device))
        self._control = replace_projections_(model, plan.projections)
        check_routed(route_(model, plan, self._control))
        set_thresholds_(model, plan)
        self._plan = plan
        self._logits: list[Tensor] = []
        self._collects = self._trains = False
        self._separation = 0.0
        self._left_out: list[float] = []
        """Share of groups of each MLP that its router left out in the last pass."""
        count = len(routed_mlps(model))
        self._etas = [0.0] * count
        self._steerings = [Steering(_FIRST_ETA, self._target) for _ in range(count if self._is_even else 1)]
        self._is_soft = False
        generator = torch.Generator().manual_seed(self.setting.seed)
        for routed in routed_mlps(model):
            random_weights_(routed.router, generator)
            if self._options.routers == "learned":
                routed.router.weight.zero_()  # it says the same of every token
                routed.router.bias.fill_(self._options.bias)
            else:
                routed.router.bias.copy_(measured[f"{routed.path}.bias"])
            if self._is_fitted:
                routed.router.weight.copy_(measured[f"{routed.path}.weight"])
            routed.router.register_forward_hook(self._seen)

    def _seen(self, router: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        if self._collects:
            self._logits.append(logits if self._is_soft else logits.detach())

    def stages(self, steps: int) -> Sequence[Stage]:
        """See `Recipe`."""
        learned = self._options.routers == "learned"
        soft = min(max(1, round(steps * self._options.soft)), steps - 1) if learned else 0
        # The last weights are kept: while shares still settle, the least sparse ones would do best.
        stages = [Stage(_SOFT, soft), Stage(_HARD, steps - soft)]
        return [stage for stage in stages if stage.steps > 0]

    def begin_stage_(self, model: nn.Module, stage: Stage) -> None:
        """See `Recipe`."""
        self._is_soft = stage.name == _SOFT
        for mlp in routed_mlps(model):
            mlp.soft = self._is_soft
        if not self._is_soft:
            mlps = routed_mlps(model)
            if self._is_fitted:
                self.followed = RefittedRouters(mlps, self._target)
            else:
                self.followed = FollowedRouters([mlp.router for mlp in mlps], self._target, even=self._is_even)

    def trainable(self, model: nn.Module, stage: Stage, names: Sequence[str]) -> Sequence[str]:
        """See `Recipe`."""
        of_routers = {id(p) for mlp in routed_mlps(model) for p in mlp.router.parameters()}
        routers = [name for name, parameter in model.named_parameters() if id(parameter) in of_routers]
        others = [name for name in names if name not in set(routers)]
        return [*others, *routers] if stage.name == _SOFT else others

    def learning_rate(self, name: str, rate: float) -> float:
        """See `Recipe`."""
        return rate * self._options.router_rate if ".router." in name else rate

    @property
    def can_replay(self) -> bool:
        """See `Recipe`."""
        return not self._is_soft

    def left(self) -> Any:
        """See `Recipe`."""
        return self._logits, super().left()

    def take_left_(self, left: Any) -> None:
        """See `Recipe`."""
        self._logits, of_looks = left
        super().take_left_(of_looks)

    @contextmanager
    def student_pass(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """See `Recipe`. All positions are routed: the model has no dense prompt."""
        self._collects = not batch.again
        if self._collects:
            self._logits, self._trains = [], model.training
        try:
            with self._control.dense(), self.follows(model, batch):
                yield
        finally:
            self._collects = False

    def realised_sparsity(self) -> float | None:
        """Share of groups that routers leave out, a mean over tokens, MLPs and processes."""
        if self._logits:
            shares = [(logits.detach() <= 0).float().mean() for logits in self._logits]
            self._left_out = mean_over_processes(torch.stack(shares)).tolist()
        return sum(self._left_out) / len(self._left_out) if self._left_out else None

    def extra_loss(self, progress: Progress) -> Tensor | None:
        """See `Recipe`."""
        logits, self._logits = self._logits, []
        if progress.stage != _SOFT or not logits:
            return None
        options, at = self._options, progress.step / progress.steps
        if options.eta is not None:
            self._etas = [options.eta] * len(logits)
        elif self._trains:
            left_out = self._left_out if self._is_even else [progress.realised or 0.0]
            steered = zip(self._steerings, left_out, strict=True)
            etas = [steering.weight(at, found, progress.share_of_pass) for steering, found in steered]
            self._etas = etas if self._is_even else etas * len(logits)
        self._separation = options.separation * max(0.0, 2 * at - 1)
        return router_loss(logits, self._etas, self._separation, options.epsilon)

    def figures(self, progress: Progress) -> dict[str, float]:
        """See `Recipe`."""
        eta = sum(self._etas) / len(self._etas)
        return {"eta": eta, "separation": self._separation} if progress.stage == _SOFT else {}

    def state(self) -> dict[str, Tensor]:
        """See `Recipe`."""
        held = [(nan if each.start is None else each.start, each.total) for each in self._steerings]
        return {**super().state(), "steering": torch.tensor(held, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        super().load_state(state)
        held = state["steering"].view(-1, 2).tolist()  # without rows in a run that began before there were several
        for steering, (start, total) in zip(self._steerings, held, strict=True):
            steering.start, steering.total = None if start != start else start, total

    @property
    def form(self) -> int:
        """See `Recipe`: fitted routers trained by gradients once, and their weights were no part of the state."""
        return 1 if self._is_fitted else 0

    @torch.no_grad()
    def finish_(self, model: nn.Module, sequences: Tensor) -> Outcome:
        """See `Recipe`."""
        for mlp in routed_mlps(model):
            mlp.soft = False
        shares = shares_left_out(model, sequences)
        rules: dict[str, Rule] = dict(self._plan.projections)
        for mlp, share in zip(routed_mlps(model), shares, strict=True):
            groups = mlp.router.bias.numel()
            mlp.rule = Routed(mlp.group, self._options.rank, min(share, 1 - 1 / (2 * groups)))
            rules[f"{mlp.path}.{mlp.names[2]}"] = mlp.rule
        plan = SparsityPlan(ROUTED, _model_wide(model, shares), rules)
        set_thresholds_(model, plan)
        return Outcome(plan, notes={"groups_left_out": sum(shares) / len(shares), "by_mlp": shares})


RECIPE = Lte


def _model_wide(model: nn.Module, shares: Sequence[float]) -> float:
    """Weights of the blocks that a token does not read, where MLPs leave out these shares: at least 0."""
    skipped = 0.0
    for mlp, share in zip(routed_mlps(model), shares, strict=True):
        skipped += share * sum(layer.weight.numel() for layer in mlp.layers) - mlp.router.parameters_read
    return max(skipped, 0.0) / block_weights(find_projections(model))


def router_loss(logits: Sequence[Tensor], etas: Sequence[float], separation: float, epsilon: float) -> Tensor:
    """What routers pay: eta G^2 + separation / ((G - 1/2)^2 + epsilon), a mean over all of them; 0-d float32.

    Args:
        logits: (..., groups) of each MLP.
        etas: of each MLP: the higher, the fewer groups are chosen.
        separation: the higher, the farther routers stay from 1/2.
        epsilon: without it the second summand has no bound.
    """
    shares = [torch.sigmoid(each.float()) for each in logits]
    closed = torch.stack([eta * share.square().mean() for eta, share in zip(etas, shares, strict=True)]).mean()
    if separation == 0.0:
        return closed
    near = torch.stack([((share - 0.5).square() + epsilon).reciprocal().mean() for share in shares]).mean()
    return closed + separation * near
