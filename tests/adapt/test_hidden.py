"""The loss of hidden states, against its definition and against what blocks say."""

from pathlib import Path

import pytest
import torch
from adapt_runs import BATCH, Rows, tiny_run
from conftest import build_model

from teal_cli.adapt.hidden import hidden_loss, hidden_states_of
from teal_cli.models.architectures import blocks_of


def test_it_is_a_share_of_each_token_s_energy() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 2000.0]]])
    student = teacher + torch.tensor([[[1.0, 0.0], [0.0, 200.0]]])
    student.requires_grad_()
    loss = hidden_loss([student, teacher], [teacher, teacher])
    assert loss.item() == pytest.approx((1 / 25 + 1 / 100) / 2 / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([2 / 25 / 4, 0.0]))


def test_hidden_states_are_those_of_the_model() -> None:
    model, ids = build_model("llama"), Rows(2, 1).ids
    blocks = blocks_of(model).values()
    with torch.no_grad(), hidden_states_of(blocks) as found:
        wanted = model(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(blocks) == model.config.num_hidden_layers
    for ours, theirs in zip(found[:-1], wanted[1:-1], strict=True):  # the last one is behind the last norm
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        model(ids)
    assert len(found) == len(blocks)


def test_it_counts_in_training_and_not_in_what_is_held_out(tmp_path: Path) -> None:
    _, without = tiny_run(tmp_path / "without", distinct=BATCH, rate=1e-12)
    _, weighted = tiny_run(tmp_path / "weighted", distinct=BATCH, rate=1e-12, hidden_weight=10.0)
    for plain, more in zip(without.curve, weighted.curve, strict=True):
        if "loss" in plain:
            assert more["loss"] > plain["loss"] + 1e-3
        else:
            assert more["held_out_loss"] == pytest.approx(plain["held_out_loss"], rel=1e-4)


def test_training_on_it_brings_blocks_nearer(tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 10.0):
        model, _ = tiny_run(tmp_path / str(weight), distinct=BATCH, hidden_weight=weight, recipe="relu")
        dense, ids = build_model("llama"), Rows(BATCH, 1, BATCH).ids
        with torch.no_grad(), hidden_states_of(blocks_of(model).values()) as ours:
            model(ids)
        with torch.no_grad(), hidden_states_of(blocks_of(dense).values()) as theirs:
            dense(ids)
        losses[weight] = float(hidden_loss(ours, theirs))
    assert losses[10.0] < losses[0.0]
