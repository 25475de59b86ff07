"""The loop: a killed run ends as an undisturbed one, adapters merge exactly, gradients are what was asked for."""

from pathlib import Path

import pytest
import torch
from adapt_runs import BATCH, STEPS, Rows, plan_of, tiny_run
from conftest import build_model

from teal_cli.adapt import followed, lora, state
from teal_cli.adapt.loop import forget
from teal_cli.adapt.state import checkpoint_in
from teal_cli.errors import ArtefactError
from teal_cli.sparse import control_of, sparse_layers, sparsify_

KINDS = {
    "weights": {},
    "adapters": {"lora": 2},
    "vectors": {"vectors": "true"},
    "adapters, recomputed": {"lora": 2, "recompute": True},  # the student is its own teacher
    "hidden states": {"hidden_weight": 1.0},
    "hidden states, recomputed": {"hidden_weight": 1.0, "lora": 2, "recompute": True},
}


class _KilledError(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "_EVERY", 1)

    def kill(step: int) -> None:
        if step == 3:  # one step after a checkpoint
            raise _KilledError

    whole, undisturbed = tiny_run(tmp_path / "whole", **KINDS[kind])
    with pytest.raises(_KilledError):
        tiny_run(tmp_path / "killed", on_step=kill, **KINDS[kind])
    steps: list[int] = []
    again, resumed = tiny_run(tmp_path / "killed", on_step=steps.append, **KINDS[kind])
    assert steps == [3, 4]
    before, after = whole.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.curve == undisturbed.curve
    assert resumed.outcome == undisturbed.outcome


def test_checkpoints_are_safetensors_and_json(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_run(folder, steps=2)
    assert {file.name for file in checkpoint_in(folder).iterdir()} == {
        "state.safetensors",
        "run.json",
        "trainer_state.json",
    }
    assert [file.name for file in folder.iterdir()] == ["checkpoint"]


def test_a_checkpoint_copies_only_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of safetensors holds no storage twice."""
    clones, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: clones.append(tensor) or clone(tensor))
    one, other = torch.arange(6.0), torch.ones(2)
    state.write(tmp_path, {"a": {"x": one, "y": one[2:4]}, "b": {"x": one, "z": other}}, {})
    assert len(clones) == 2
    groups, _ = state.read(tmp_path)
    assert torch.equal(groups["a"]["y"], one[2:4])
    assert torch.equal(groups["b"]["x"], one)
    assert torch.equal(groups["b"]["z"], other)


def test_the_state_of_another_run_is_not_taken_up(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=2, key="another")
    steps: list[int] = []
    tiny_run(tmp_path, steps=2, on_step=steps.append)
    assert steps == [1, 2]


def test_damaged_state_is_refused_and_can_be_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_run(folder, steps=2)
    file = checkpoint_in(folder) / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match="is damaged: remove"):
        state.read(file.parent)
    forget(folder)
    assert checkpoint_in(folder) is None


def test_the_best_weights_are_kept_and_a_run_that_gets_worse_ends(tmp_path: Path) -> None:
    model, trained = tiny_run(tmp_path, rate=3.0, patience=1)
    losses = {p["step"]: p["held_out_loss"] for p in trained.curve if "held_out_loss" in p}
    assert trained.best == {"step": min(losses, key=losses.get), "loss": min(losses.values())}
    assert trained.stopped
    assert list(losses) == [0, 2]
    assert STEPS > 2
    groups, _ = state.read(checkpoint_in(tmp_path))
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in groups["best"].items())
    assert not all(torch.equal(own[name], value) for name, value in groups["parameters"].items())


def test_training_brings_the_student_nearer(tmp_path: Path) -> None:
    before = build_model("llama").state_dict()
    model, trained = tiny_run(tmp_path, rate=1e-3, distinct=BATCH, thresholds="fixed")
    losses = [p["held_out_loss"] for p in trained.curve if "held_out_loss" in p]  # here of the text itself
    assert losses[0] > losses[1] > losses[2]
    assert all(0.2 < p["sparsity"] < 0.4 for p in trained.curve)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() - changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_followed_thresholds_keep_their_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "_EVERY", 1)
    monkeypatch.setattr(followed, "_RATE", 0.9)
    shares = {}
    for how in ("fixed", "followed"):  # the plan says 0.5, and its thresholds give 0.3
        _, trained = tiny_run(tmp_path / how, distinct=BATCH, thresholds=how)
        shares[how] = [p["sparsity"] for p in trained.curve if "held_out_loss" in p]
    assert shares["followed"][0] == shares["fixed"][0] < 0.4
    assert shares["fixed"][-1] < 0.4
    assert shares["followed"][-1] == pytest.approx(0.5, abs=0.03)


def test_a_checkpoint_waits_for_its_time(tmp_path: Path) -> None:
    _, trained = tiny_run(tmp_path / "often")
    assert checkpoint_in(tmp_path / "often") is not None
    _, again = tiny_run(tmp_path / "seldom", save_seconds=1e6)
    assert checkpoint_in(tmp_path / "seldom") is None
    assert again.curve == trained.curve


def test_only_what_was_asked_for_trains(tmp_path: Path) -> None:
    before = build_model("llama").state_dict()
    model, trained = tiny_run(tmp_path, vectors="true")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = after.keys() - before.keys()
    assert {name.rpartition(".")[2] for name in new} == {"bias"}
    assert all(after[name].abs().sum() > 0 for name in new)
    assert trained.outcome.config == {"attention_bias": True, "mlp_bias": True}
    assert trained.parameters == sum(after[name].numel() for name in new)


GROWN = {"recipe": "prosparse", "l1": 0.0, "fatrelu": "grown", "live_dropped": 0.5}


@pytest.mark.parametrize(
    "kind",
    [{}, {"recipe": "prosparse", "l1": 1.0, "growth": "fixed"}, GROWN],
    ids=["recover", "an L1 loss", "FATReLU that grows"],
)
def test_recomputed_activations_give_the_same_gradients(
    tmp_path: Path, kind: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While thresholds follow, too: the loss of each step says what the weights of that step are."""
    monkeypatch.setattr(followed, "_EVERY", 1)
    monkeypatch.setattr(followed, "_RATE", 0.5)
    _, held = tiny_run(tmp_path / "held", **kind)
    _, made = tiny_run(tmp_path / "made", recompute=True, **kind)
    ours, theirs = ([p["loss"] for p in trained.curve if "loss" in p] for trained in (held, made))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_merging_adapters_is_exact() -> None:
    """Both the weight and the adapter read what is kept, so that their sum does in the merged layer."""
    model = build_model("llama")
    sparsify_(model, plan_of(model))
    lora.add_adapters_(model, lora.adaptable(model), 3, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.05)
    ids = Rows(2, 3).ids
    with torch.no_grad(), control_of(model).masked(4):
        with lora.switched_off(model):
            without = model(ids).logits
        beside = model(ids).logits
    lora.merge_(model)
    with torch.no_grad(), control_of(model).masked(4):
        merged = model(ids).logits
    assert not torch.allclose(beside, without, atol=1e-2)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("straight", [False, True])
def test_gradients_of_dropped_inputs(straight: bool) -> None:
    """None where they are masked; straight through, that of the plain product. Kept inputs and weights: alike."""
    model = build_model("llama")
    plan = plan_of(model)
    control = sparsify_(model, plan)
    control.straight_through = straight
    layer = next(iter(sparse_layers(model).values()))
    x = torch.randn(1, 5, layer.in_features, requires_grad=True)
    with control.masked(0):
        y = layer(x)
    y.sum().backward()
    through = layer.weight.sum(0).expand_as(x)
    kept = x.abs() > 0.3
    expected = through if straight else torch.where(kept, through, 0.0)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(layer.weight.grad[0], (x * kept).detach().sum((0, 1)))
