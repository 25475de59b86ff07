"""The kernel of `teal_kernels.triton_distil`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl

_LEAST = tl.constexpr(-3.0e38)
"""In the place of minus infinity, whose difference to itself is no number."""


@triton.jit
def _log_sum_exp(row_ptr, vocabulary, BLOCK: tl.constexpr):
    """Of a row of logits, read once: each lane has a largest value and a sum of its own until the end."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _LEAST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(row_ptr + start + lanes, mask=start + lanes < vocabulary, other=_LEAST).to(tl.float32)
        larger = tl.maximum(largest, logits)
        total = total * tl.exp(largest - larger) + tl.exp(logits - larger)
        largest = larger
    most = tl.max(largest)
    return most + tl.log(tl.sum(total * tl.exp(largest - most)))


@triton.jit
def distil_kernel(
    student_ptr,
    teacher_ptr,
    targets_ptr,
    text_share_ptr,
    losses_ptr,
    vocabulary,
    share,
    TEXT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row of the student's logits gives way to its gradient; `losses` gets the row's part of the loss."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student_ptr += row * vocabulary
    teacher_ptr += row * vocabulary
    of_student = _log_sum_exp(student_ptr, vocabulary, BLOCK)
    of_teacher = _log_sum_exp(teacher_ptr, vocabulary, BLOCK)
    of_text = 0.0
    target = -1
    loss = 0.0
    if TEXT:
        target = tl.load(targets_ptr + row)
        of_text = tl.where(target >= 0, tl.load(text_share_ptr), 0.0)
        logit = tl.load(student_ptr + tl.maximum(target, 0)).to(tl.float32)
        loss = of_text * (of_student - logit)
        tl.debug_barrier()  # the target's logit is read before any thread puts a gradient in its place
    divergence = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        ours = tl.load(student_ptr + start + lanes, mask=inside, other=_LEAST).to(tl.float32) - of_student
        wanted = tl.load(teacher_ptr + start + lanes, mask=inside, other=_LEAST).to(tl.float32) - of_teacher
        q, p = tl.exp(ours), tl.exp(wanted)
        divergence += tl.where(inside, p * (wanted - ours), 0.0)
        gradient = share * (q - p) + of_text * (q - (start + lanes == target).to(tl.float32))
        tl.store(student_ptr + start + lanes, gradient.to(student_ptr.dtype.element_ty), mask=inside)
    tl.store(losses_ptr + row, loss + share * tl.sum(divergence))
