"""Recipe lte: clusters, the routers' loss, both stages, and what is left behind."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_runs import BATCH, TOKENS, training_plan
from conftest import VOCABULARY, build_model, build_tokenizer
from torch import Tensor

from teal_cli.adapt import fitted, followed
from teal_cli.adapt.groups import balanced_groups, reorder_neurons_
from teal_cli.adapt.loop import Run, Trained, run
from teal_cli.adapt.recipe import Batch, Setting
from teal_cli.adapt.recipes.lte import Lte, router_loss
from teal_cli.adapt.write import write_adapted
from teal_cli.checkpoint.calibration import CalibrationInfo
from teal_cli.config.recipes.lte import Options
from teal_cli.decode.engine import Engine
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_loading import load_model
from teal_cli.sparse import Routed, control_of
from teal_cli.sparse.routing import routed_mlps, shares_left_out

STEPS, GROUP = 6, 10


class _Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, VOCABULARY, (count, TOKENS), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "dense_prefix": torch.tensor(0)}


def _setting(lora: int = 0, **options: object) -> Setting:
    return Setting(Options(**{"group": GROUP, "routers": "learned", **options}), 0, 0.5, lora)  # type: ignore[arg-type]


def _run(
    folder: Path,
    *,
    lora: int = 0,
    steps: int = STEPS,
    recompute: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
    rate: float = 2e-3,
    recipe: type[Lte] = Lte,
    **options: object,
) -> tuple[Any, Trained]:
    model: Any = build_model("llama")
    dense = copy.deepcopy(model)
    text = _Rows(steps * BATCH, 1)
    setup = Run(
        model=model,
        recipe=recipe(_setting(lora, **options)),
        plan=training_plan(folder, rate),
        steps=steps,
        text=text,
        held_out=_Rows(4, 2),
        sequences=text.ids[:2],
        key="the run",
        teacher=lambda: dense,
        recompute=recompute,
        on_step=on_step,
    )
    return model, run(setup)


@pytest.mark.parametrize("size", [1, 5, 20])
def test_groups_are_of_one_size_and_hold_every_neuron_once(size: int) -> None:
    vectors = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    order = balanced_groups(vectors, size, seed=1)
    assert sorted(order.tolist()) == list(range(60))
    assert torch.equal(order, balanced_groups(vectors, size, seed=1))
    for group in order.view(-1, size):
        assert group.tolist() == sorted(group.tolist())


def test_neurons_that_are_alike_come_together() -> None:
    """Clusters that lie far apart are found, in whatever order their members come."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(8).repeat_interleave(4)[torch.randperm(32, generator=generator)]
    vectors = torch.randn(8, 16, generator=generator)[kinds] + 0.01 * torch.randn(32, 16, generator=generator)

    def spread(order: Tensor) -> float:
        groups = vectors[order].view(8, 4, 16)
        return float((groups - groups.mean(1, keepdim=True)).square().sum())

    best = min(spread(balanced_groups(vectors, 4, seed)) for seed in range(5))
    assert best < 0.05 * spread(torch.arange(32))


@torch.no_grad()
def test_another_order_of_neurons_is_the_same_function() -> None:
    model: Any = build_model("llama").double()
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.bias = torch.nn.Parameter(torch.randn(100, dtype=torch.float64))
    x = torch.randn(3, 64, dtype=torch.float64)
    before, gate = mlp(x), mlp.gate_proj.weight.clone()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    reorder_neurons_(mlp.gate_proj, mlp.up_proj, mlp.down_proj, order)
    assert torch.allclose(mlp(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(mlp.gate_proj.weight, gate[order])


def test_the_loss_of_routers() -> None:
    shares = [torch.tensor([[0.9, 0.2]]), torch.tensor([[0.5, 0.4]])]
    logits = [torch.logit(share) for share in shares]
    closed = (0.7 * (0.81 + 0.04) / 2 + 0.1 * (0.25 + 0.16) / 2) / 2
    near = ((1 / 0.17 + 1 / 0.10) / 2 + (1 / 0.01 + 1 / 0.02) / 2) / 2
    assert float(router_loss(logits, [0.7, 0.1], 0.5, 0.01)) == pytest.approx(closed + 0.5 * near, rel=1e-5)
    assert float(router_loss(logits, [0.7, 0.1], 0.0, 0.01)) == pytest.approx(closed, rel=1e-5)
    assert router_loss([each.bfloat16() for each in logits], [1.0, 1.0], 1.0, 0.01).dtype == torch.float32


@torch.no_grad()
def test_training_begins_at_the_dense_model() -> None:
    """All groups are chosen, and the neurons in another order."""
    model: Any = build_model("llama")
    dense, ids, recipe = copy.deepcopy(model), _Rows(2, 3).ids, Lte(_setting())
    recipe.operate_(model, recipe.measure(model, ids))
    expected = dense(ids).logits
    assert float((model(ids).logits - expected).norm() / expected.norm()) < 1e-5
    assert shares_left_out(model, ids) == [0.0, 0.0]
    soft, hard = recipe.stages(10)
    assert (soft.steps, hard.steps) == (5, 5)
    recipe.begin_stage_(model, soft)
    share = torch.sigmoid(torch.tensor(3.0))
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 64)
    plain = mlp.down_proj(mlp.hidden(mlp.gate_proj(x), mlp.up_proj(x)))
    assert torch.allclose(mlp(x), share * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_routers_train_in_the_soft_stage_alone(tmp_path: Path, lora: int) -> None:
    """They learn to close groups, faster than the model learns; then they stay, and the model goes on."""
    if lora:
        pytest.importorskip("peft")
    at: dict[str, dict[str, Tensor]] = {}

    class Watched(Lte):
        def begin_stage_(self, model: Any, stage: Any) -> None:
            super().begin_stage_(model, stage)
            at[stage.name] = {name: p.detach().clone() for name, p in model.named_parameters()}

    model, trained = _run(tmp_path, recipe=Watched, lora=lora, eta=50.0, router_rate=30.0, bias=0.05)
    assert {point["stage"] for point in trained.curve} == {0, 1}
    after = dict(model.named_parameters())
    for name in ("model.layers.0.mlp.router.weight", "model.layers.1.mlp.router.bias"):
        assert not torch.equal(at["soft"][name], at["hard"][name])
        assert torch.equal(at["hard"][name], after[name])
    trains = [name for name in after if "down_proj" in name]
    assert any(name not in at["hard"] or not torch.equal(after[name], at["hard"][name]) for name in trains)
    soft = [point["eta"] for point in trained.curve if "eta" in point]
    assert set(soft) == {50.0}
    assert trained.outcome.notes["groups_left_out"] > 0.0


def test_activations_made_again_change_nothing(tmp_path: Path) -> None:
    (_, plain), (_, again) = (_run(tmp_path / str(way), recompute=way, eta=2.0, steps=2) for way in (False, True))
    losses = [[point["loss"] for point in each.curve if "loss" in point] for each in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) >= 2


def test_eta_is_steered_to_the_sparsity_that_was_asked_for(tmp_path: Path) -> None:
    _, trained = _run(tmp_path, steps=30, rate=1.3e-2, bias=1.0, separation=0.05, router_rate=5.0)
    assert trained.outcome.plan is not None
    share = trained.outcome.notes["groups_left_out"]
    assert share == pytest.approx(0.5, abs=0.15)
    mlp, attention, router = 3 * 64 * 100, 2 * 64 * 64 + 2 * 64 * 32, 64 * 10
    assert trained.outcome.plan.target_sparsity == pytest.approx((share * mlp - router) / (mlp + attention))


def test_each_mlp_can_be_steered_to_that_share(tmp_path: Path) -> None:
    """Else those whose loss hurts least are closed, and the others stay open."""
    _, trained = _run(tmp_path, steps=30, rate=1.3e-2, bias=1.0, separation=0.05, router_rate=5.0, shares="even")
    by_mlp = trained.outcome.notes["by_mlp"]
    assert by_mlp == pytest.approx([0.5] * len(by_mlp), abs=0.15)
    recipe = Lte(_setting(shares="even"))
    recipe.operate_(build_model("llama"), recipe.measure(build_model("llama"), _Rows(2, 1).ids))
    recipe._steerings[1].start, recipe._steerings[1].total = 0.25, -0.5
    state = recipe.state()
    again = Lte(_setting(shares="even"))
    again.operate_(build_model("llama"), again.measure(build_model("llama"), _Rows(2, 1).ids))
    again.load_state(state)
    assert [each.start for each in again._steerings] == [None, 0.25]
    assert [each.total for each in again._steerings] == [0.0, -0.5]
    single = Lte(_setting())
    single.operate_(build_model("llama"), single.measure(build_model("llama"), _Rows(2, 1).ids))
    single.load_state({"steering": torch.tensor([0.25, -0.5], dtype=torch.float64)})  # as earlier versions had it
    assert (single._steerings[0].start, single._steerings[0].total) == (0.25, -0.5)


def test_the_share_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would steer by its own rows, and weigh its routers' loss otherwise."""
    recipe, model = Lte(_setting()), build_model("llama")
    recipe.operate_(model, recipe.measure(model, _Rows(2, 1).ids))
    with torch.no_grad(), recipe.student_pass(model, Batch(_Rows(2, 1).ids, torch.zeros(2, dtype=torch.int64))):
        model(_Rows(2, 1).ids)
    alone = recipe.realised_sparsity()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda found: found.add_(1.0))  # another that leaves out all
    assert recipe.realised_sparsity() == pytest.approx((alone + 1) / 2)


def test_random_routers_are_the_control(tmp_path: Path) -> None:
    """They leave out about what was asked for, and never train."""
    model, trained = _run(tmp_path, routers="random")
    assert all("eta" not in point for point in trained.curve)
    assert trained.outcome.notes["groups_left_out"] == pytest.approx(0.5, abs=0.1)
    other, _ = _run(tmp_path / "other", routers="random", steps=2)
    for mine, its in zip(routed_mlps(model), routed_mlps(other), strict=True):
        assert torch.equal(mine.router.weight, its.router.weight)


def test_fitted_routers_follow_the_model_from_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the share that was asked for; a run that is killed ends the same."""
    monkeypatch.setattr(fitted, "_RATE_OF_BIASES", 0.9)
    monkeypatch.setattr(fitted, "_EVERY", 3)

    def kill(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    text = _Rows(2, 1).ids
    model, recipe = build_model("llama"), Lte(_setting(routers="fitted"))
    recipe.operate_(model, recipe.measure(model, text))
    assert [stage.name for stage in recipe.stages(10)] == ["hard"]
    assert shares_left_out(model, text) == pytest.approx([0.5, 0.5], abs=0.02)
    random = build_model("llama")
    control = Lte(_setting(routers="random"))
    control.operate_(random, control.measure(random, text))
    with torch.no_grad():
        dense, ours, blind = (each(text).logits for each in (build_model("llama"), model, random))
    assert float((ours - dense).norm()) < 0.9 * float((blind - dense).norm())

    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".router." in name}
    trained_model, trained = _run(tmp_path / "whole", routers="fitted", steps=8, rate=1e-3)
    after = dict(trained_model.named_parameters())
    assert before
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert trained.outcome.notes["groups_left_out"] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", routers="fitted", steps=8, rate=1e-3, on_step=kill)
    again, resumed = _run(tmp_path / "killed", routers="fitted", steps=8, rate=1e-3)
    assert resumed.curve == trained.curve
    assert all(torch.equal(p, after[name]) for name, p in again.named_parameters())


def test_what_cannot_be_adapted() -> None:
    with pytest.raises(UsageError, match="the 100 neurons of model.layers.0.mlp are not whole groups of 32"):
        Lte(_setting(group=32)).check(build_model("llama"))
    with pytest.raises(ArtefactError, match="no gated MLP"):
        Lte(_setting()).check(build_model("opt"))


def test_what_is_written_loads_and_decodes(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    build_model("llama").save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    model, trained = _run(tmp_path / "run", routers="random", steps=2, rank=8)
    info = CalibrationInfo(
        model="tiny",
        weights="",
        dataset="random",
        tokens=48,
        seq_len=TOKENS,
        sink_tokens=0,
        seed=0,
        dtype="float32",
        device="cpu",
        seconds=1.0,
        versions={},
    )
    write_adapted(source, tmp_path / "out", model, trained.outcome, {"recipe": "lte"}, info)
    loaded = load_model(tmp_path / "out", device="cpu", dtype="float32")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 4
    rules = [mlp.rule for mlp in routed_mlps(loaded)]
    assert all(isinstance(rule, Routed) and (rule.group, rule.rank) == (GROUP, 8) for rule in rules)
    assert [rule.expected_sparsity for rule in rules] == pytest.approx(trained.outcome.notes["by_mlp"])
    ids = _Rows(2, 3).ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        engine = Engine(loaded)
        cache = engine.new_cache(TOKENS + 1)
        engine.prefill(ids, cache)
        with control_of(loaded).counting() as counter:
            found = engine.step(ids[:, :1], cache)
        expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert 0.0 < counter.by_projection()["model.layers.0.mlp.up_proj"] < 1.0


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """In the soft stage, one step after a checkpoint."""

    def kill(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole, undisturbed = _run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", on_step=kill)
    steps: list[int] = []
    again, resumed = _run(tmp_path / "killed", on_step=steps.append)
    assert steps == [3, 4, 5, 6]
    before, after = whole.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.curve == undisturbed.curve
    assert resumed.outcome == undisturbed.outcome


def test_routers_of_the_hard_stage_keep_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the hidden states change under them; a run that is killed there ends the same."""
    monkeypatch.setattr(followed, "_EVERY", 1)
    monkeypatch.setattr(followed, "_RATE", 0.9)

    def kill(step: int) -> None:
        if step == 11:
            raise KeyboardInterrupt

    whole, undisturbed = _run(tmp_path / "whole", rate=1e-3, steps=12)
    shares = [p["sparsity"] for p in undisturbed.curve if p["stage"] == 1.0]
    assert shares[-1] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", rate=1e-3, steps=12, on_step=kill)
    again, resumed = _run(tmp_path / "killed", rate=1e-3, steps=12)
    before, after = whole.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.curve == undisturbed.curve
