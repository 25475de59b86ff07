"""The loss, against its definition."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model

from teal_cli.adapt import distil
from teal_cli.adapt.distil import distillation_loss
from teal_cli.adapt.logits import LogitMaker
from teal_cli.errors import UsageError


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    vocabulary, tokens = 50, 11
    monkeypatch.setitem(distil._LOGITS_AT_ONCE, "cpu", rows * vocabulary)
    torch.manual_seed(0)
    student = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    teacher, ours, theirs = torch.randn(tokens, 8), torch.randn(vocabulary, 8), torch.randn(vocabulary, 8)
    targets = torch.tensor([*range(tokens - 1), -1])
    most = 0

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(hidden))
        return hidden.float() @ ours.t()

    found = distillation_loss(student, teacher, logits_of, lambda h: h @ theirs.t(), vocabulary, targets, 0.3)
    log_p = (teacher @ theirs.t()).double().log_softmax(-1)
    log_q = (student @ ours.double().t()).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    wanted_text = F.cross_entropy(student @ ours.double().t(), targets, ignore_index=-1)
    wanted += 0.3 * wanted_text
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert most == min(rows, tokens)
    (gradient,) = torch.autograd.grad(3 * found, student)
    (expected,) = torch.autograd.grad(3 * wanted, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        again = distillation_loss(student, teacher, logits_of, lambda h: h @ theirs.t(), vocabulary, targets, 0.3)
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_logits_are_the_models(family: str) -> None:
    """Those of Gemma 2 are capped after the output layer."""
    LogitMaker(build_model(family)).require_exact()


def test_logits_that_are_made_otherwise_are_refused() -> None:
    model = build_model("llama")
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found

    model.forward = doubled
    with pytest.raises(UsageError, match="cannot distil model type llama"):
        LogitMaker(model).require_exact()
