"""Routers of recipe lte that are fitted by least squares, before training and again in it."""

import weakref
from typing import Any

import pytest
import torch
from adapt_runs import TOKENS, Rows
from conftest import build_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teal_cli.adapt import fitted
from teal_cli.adapt.fitted import fit_bytes, fitted_router, group_sizes, tokens_of_fit
from teal_cli.adapt.recipe import Batch, Setting
from teal_cli.adapt.recipes.lte import Lte
from teal_cli.config.recipes.lte import Options
from teal_cli.sparse.routing import routed_mlps

GROUP = 10


def test_a_fitted_router_finds_what_is_linear() -> None:
    """It leaves out the smaller groups, as many as it is told, with logits as large as a sigmoid can tell apart."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(400, 12, generator=generator), torch.randn(6, 12, generator=generator)
    sizes = 5 + x @ truth.T
    weight, bias = fitted_router(x + 3.0, sizes, 0.3)
    logits = (x + 3.0) @ weight.T + bias
    assert float((logits <= 0).float().mean()) == pytest.approx(0.3, abs=1e-3)
    border = float(sizes.flatten().kthvalue(720).values)
    assert float(((logits > 0) == (sizes > border)).float().mean()) > 0.98
    assert float(logits.std()) == pytest.approx(2.0, rel=1e-3)


class _Peak(TorchDispatchMode):
    """Bytes that operations make and that live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._live, self._held = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            storage = each.untyped_storage() if isinstance(each, Tensor) else None
            if storage is not None and storage.data_ptr() not in given | self._held:
                self._hold(storage.data_ptr(), storage.nbytes())
                weakref.finalize(storage, self._let_go, storage.data_ptr(), storage.nbytes())
        return out

    def _hold(self, place: int, size: int) -> None:
        self._held.add(place)
        self._live += size
        self.bytes = max(self.bytes, self._live)

    def _let_go(self, place: int, size: int) -> None:
        self._held.discard(place)
        self._live -= size


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "mlp"),
    [(512, (64, 256, 64)), (512, (64, 256, 8)), (2048, (128, 448, 112)), (128, (256, 896, 224))],
    ids=str,
)
@torch.no_grad()
def test_what_a_fit_holds_is_counted(dtype: torch.dtype, tokens: int, mlp: tuple[int, int, int]) -> None:
    inputs, neurons, groups = mlp
    gate, up = (torch.nn.Linear(inputs, neurons, bias=False, dtype=dtype) for _ in range(2))
    down, read = torch.nn.Linear(neurons, inputs, bias=False, dtype=dtype), torch.randn(tokens, inputs, dtype=dtype)
    with _Peak() as peak:
        sample = read.float()
        x = sample.to(dtype)
        sizes = group_sizes(_hidden(gate(x), up(x)), down, neurons // groups)
        found = fitted_router(sample, sizes, 0.5)
        torch.cat([found.weight, found.bias[:, None]], dim=1).lerp(torch.zeros(groups, inputs + 1), 0.5)
    assert 0.9 < fit_bytes(tokens, mlp, dtype.itemsize) / peak.bytes < 1.5


@pytest.mark.parametrize("tokens", [9, 4096, 8192, 16382, 16384, 100_000])
def test_tokens_of_a_fit_are_those_that_a_look_hands_over(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = build_model("llama"), Lte(Setting(Options(group=GROUP), 0, 0.5, 0))
    recipe.operate_(model, recipe.measure(model, Rows(4, 1).ids))
    recipe.begin_stage_(model, recipe.stages(10)[0])
    seen: list[int] = []
    followed = recipe.followed
    assert followed is not None
    monkeypatch.setattr(fitted.RefittedRouters, "_fits", True)
    monkeypatch.setattr(followed, "quantile", lambda index, sample: seen.append(len(sample)) or torch.zeros(()))
    followed.looks = True
    with followed.looking(torch.Size([1, tokens])):
        routed_mlps(model)[0].router(torch.zeros(1, tokens, 64))
    assert seen == [tokens_of_fit(tokens)]


def test_sizes_of_groups_are_what_they_add() -> None:
    down, hidden = torch.nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    sizes = group_sizes(hidden, down, 3, order)
    first = (hidden[0, 1] * down.weight.detach().norm(dim=0))[[5, 0, 3]].norm()
    assert sizes.shape == (6, 2)
    assert float(sizes[1, 0].detach()) == pytest.approx(float(first), rel=1e-5)


@pytest.mark.parametrize(("rate", "enough"), [(1.0, 0.5), (0.25, 0.75), (0.25, 7.5)])
def test_fitted_routers_are_fitted_to_the_neurons_that_there_are(
    rate: float, enough: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the MLP reads in a pass in training, a part of the way, and with the neurons of weights as they are.

    A fit of a tenth of the tokens that are enough is a tenth of that part: it knows little, and moves routers little.
    """
    monkeypatch.setattr(fitted, "_EVERY", 2)
    monkeypatch.setattr(fitted, "_RATE", rate)
    monkeypatch.setattr(fitted, "_ENOUGH", enough)
    model, recipe, ids = build_model("llama"), Lte(Setting(Options(group=GROUP), 0, 0.5, 0)), Rows(4, 1).ids
    recipe.operate_(model, recipe.measure(model, ids))
    recipe.begin_stage_(model, recipe.stages(10)[0])
    following = recipe.followed
    assert following is not None
    mlp = routed_mlps(model)[0]
    gate, up, down = mlp.layers
    before = mlp.router.weight.detach().clone()
    read: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(2)))
        for _ in range(2):  # the first finds shares
            assert torch.equal(mlp.router.weight, before)
            following.before_pass_()
            with recipe.student_pass(model.train(), Batch(ids, torch.zeros(len(ids), dtype=torch.long))):
                model(ids)
        handle.remove()
        following.before_pass_()
        x = read[-1][:, TOKENS // 2 :].flatten(0, 1)
        sizes = group_sizes(mlp.hidden(gate(x), up(x)), down, GROUP)
    wanted = fitted_router(x, sizes, 0.5)
    part = rate * min(1.0, len(x) / (enough * x.shape[1]))
    assert torch.allclose(mlp.router.weight, before.lerp(wanted.weight, part), rtol=1e-3, atol=1e-4)
    assert rate < 1 or torch.allclose(mlp.router.bias, wanted.bias, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted.weight, before, atol=0.1)
