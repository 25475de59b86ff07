"""The processes of a run under `accelerate launch`: one where there is no launcher."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import MachineError
from teal_cli.models.loading import pick_device


def mean_over_processes(found: Tensor) -> Tensor:
    """The mean of a tensor over all processes, each of which must ask; itself where there is one. Changed in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
        found /= torch.distributed.get_world_size()
    return found


@dataclass(frozen=True)
class Processes:
    """What accelerate knows of them."""

    _state: Any

    @classmethod
    def of(cls, device: str) -> "Processes":
        """Those of this run.

        Raises:
            MachineError: accelerate is not installed, or no such device.
        """
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MachineError("teal adapt needs the package accelerate: pip install 'teal-cli[adapt]'") from error
        return cls(PartialState(cpu=pick_device(device).type == "cpu"))

    @property
    def count(self) -> int:
        """How many."""
        return int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this one writes and talks."""
        return bool(self._state.is_main_process)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the block, then the others do, and find what it made."""
        with self._state.main_process_first():
            yield

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()
