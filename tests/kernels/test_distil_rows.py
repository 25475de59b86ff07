"""The loss of distillation and its gradient by the kernel, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from teal_kernels.triton_distil import distil_rows_, distils


@pytest.mark.parametrize("vocabulary", [1, 50, 2048, 5000])
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("size", [3.0, 80.0])
def test_loss_and_gradient(vocabulary: int, with_text: bool, size: float) -> None:
    torch.manual_seed(vocabulary)
    student = (size * torch.randn(5, vocabulary)).requires_grad_()
    teacher = size * torch.randn(5, vocabulary)
    targets = torch.tensor([0, -1, vocabulary // 2, vocabulary - 1, -1])
    text_share = torch.tensor(0.3)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    losses = 0.2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    if with_text:
        losses = losses + 0.3 * F.nll_loss(log_q, targets, ignore_index=-1, reduction="none")
    losses.sum().backward()
    gradient = student.detach().clone()
    found = distil_rows_(gradient, teacher, 0.2, *((targets, text_share) if with_text else ()))
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-5, atol=1e-6)


def test_logits_in_bfloat16() -> None:
    """The gradient takes their dtype; the teacher may have another."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 70).bfloat16(), torch.randn(3, 70)
    wanted = (student.float().softmax(-1) - teacher.softmax(-1)) / 3
    found = student.clone()
    distil_rows_(found, teacher, 1 / 3)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=1e-6)  # the interpreter cuts off


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 71\) beside \(3, 70\)"):
        distil_rows_(torch.zeros(3, 70), torch.zeros(3, 71), 1.0)


def test_on_a_cpu_pytorch_does_it() -> None:
    assert not distils(torch.zeros(2, 3))
