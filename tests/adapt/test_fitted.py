"""Routers of recipe lte that are fitted by least squares, before training and again in it."""

import pytest
import torch
from adapt_runs import TOKENS, Rows
from conftest import build_model
from torch import Tensor

from teal_cli.adapt import fitted
from teal_cli.adapt.fitted import fitted_router, group_sizes
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
