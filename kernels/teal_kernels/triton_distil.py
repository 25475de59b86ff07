"""The loss of distillation and its gradient from logits, in one launch.

PyTorch makes both in some twenty steps, each of which reads and writes as many float32 numbers as there are logits.
Here the logits of student and teacher are read twice, in the dtype that they have, and the gradient is written once,
over the student's.

Importable without triton.
"""

import torch
from torch import Tensor

from teal_kernels.launching import TRITON_MISSING, launch
from teal_kernels.support import kernels_unsupported_reason

if TRITON_MISSING is None:
    from teal_kernels.jit_distil import distil_kernel

_BLOCK, _WARPS = 2048, 8


def distils(logits: Tensor) -> bool:
    """Whether `distil_rows_` takes logits of this kind and spares time: on a GPU."""
    return logits.is_cuda and kernels_unsupported_reason(logits.device, logits.dtype) is None


def distil_rows_(
    student: Tensor,
    teacher: Tensor,
    share: float,
    targets: Tensor | None = None,
    text_share: Tensor | None = None,
) -> Tensor:
    """Each row's part of `share` KL(teacher || student) + `text_share` times the loss of its target, in nats.

    Logits must be finite, or minus infinity in neither model.

    Args:
        student: (rows, vocabulary) float32, float16 or bfloat16 logits, contiguous; **overwritten** with the gradient
            of the sum of what is returned.
        teacher: the same of the teacher, in any of these dtypes.
        share: of the first loss.
        targets: (rows,) int64, -1 where there is none.
        text_share: 0-d float32, of the second loss, on the device; with targets.

    Returns:
        (rows,) float32.

    Raises:
        ValueError: logits of another shape.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"teacher's logits of shape {tuple(teacher.shape)} beside {tuple(student.shape)}")
    rows, vocabulary = student.shape
    losses = student.new_empty(rows, dtype=torch.float32)
    with_text = targets is not None and text_share is not None
    with torch.cuda.device_of(student):  # of a model on several GPUs: triton launches on the current one
        launch(
            distil_kernel,
            (rows,),
            student,
            teacher.contiguous(),
            targets if with_text else losses,
            text_share if with_text else losses,
            losses,
            vocabulary,
            share,
            TEXT=with_text,
            BLOCK=_BLOCK,
            warps=_WARPS,
            pdl=False,
        )
    return losses
