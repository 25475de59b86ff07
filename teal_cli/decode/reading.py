"""Numbers on their way from a device to the host, which goes on meanwhile."""

import torch
from torch import Tensor


class Reading:
    """A tensor that is copied to the host behind what the device is doing."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._rows: list[list[int]] | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone()

    def tensor(self) -> Tensor:
        """On the host, when it has come."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def rows(self) -> list[list[int]]:
        """Of a matrix of whole numbers, made once for all who ask."""
        if self._rows is None:
            self._rows = self.tensor().tolist()
        return self._rows

    def value(self) -> int:
        """Of one whole number."""
        return int(self.tensor())
