"""The group of ranks, and what they tell one another."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teal_cli.errors import MachineError, UsageError
from teal_cli.ranks.environment import LOST, check_launched, is_rank

MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off: a group that dies while it is on can leave the links of a host in a state that only a
reset ends."""

_all_gather = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # the older name warns from 2.13 on


@dataclass(frozen=True)
class Ranks:
    """All of them, as one sees them.

    What they say to one another are sums and copies that each must ask for, in the same order.
    """

    rank: int
    """This one, from 0 on. The first one talks to the user and writes files."""
    count: int
    device: torch.device
    """Of this one."""
    timeout: float = 60.0
    """Seconds that one waits for another."""

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place and with the same bits on all; x contiguous, on `device`."""
        with lost():
            dist.all_reduce(x)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """(..., n) of each -> (..., count n): side by side, in the order of ranks."""
        parts = torch.empty(self.count * x.numel(), dtype=x.dtype, device=x.device)
        with lost():
            _all_gather(parts, x.flatten())
        return parts.view(self.count, *x.shape).movedim(0, -2).flatten(-2)

    def totals(self, numbers: list[int]) -> list[int]:
        """Each number, summed over all ranks."""
        found: list[int] = self.sum_(torch.tensor(numbers, dtype=torch.int64, device=self.device)).tolist()
        return found

    def longest(self, seconds: float) -> float:
        """The largest of a number over all ranks, such as the time of the slowest."""
        found = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        with lost():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def said_by_first(self, text: str) -> str:
        """A text of the first rank, on all of them."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        size = torch.tensor([len(data)], device=self.device)
        with lost():
            dist.broadcast(size, 0)
            found = data.to(self.device) if self.rank == 0 else torch.empty(int(size), device=self.device).byte()
            dist.broadcast(found, 0)
        return bytes(found.cpu().tolist()).decode()

    def copy_of_first_(self, x: Tensor) -> None:
        """Give a tensor the values that the first rank's has."""
        with lost():
            dist.broadcast(x, 0)

    def wait(self) -> None:
        """Until all are here."""
        self.totals([0])


_START_SECONDS = 300.0
_OF_BACKENDS = ("gloo", "NCCL", "Connection", "Timed out", "timed out")
"""In what backends say of a connection; as RuntimeError, Gloo does."""


class RanksApartError(MachineError):
    """The ranks do not do the same any more: none of them can go on."""


@contextmanager
def lost() -> Iterator[None]:
    """What a backend raises where a rank does not answer, in one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _OF_BACKENDS):
            raise RanksApartError(LOST) from error
        raise


@cache
def join(count: int, device: str, timeout: float) -> Ranks | None:
    """Join the group of ranks; None where one process is to decode. Joined once a process.

    Args:
        count: of ranks, as asked for.
        device: `auto`, `cpu` or `cuda`.
        timeout: seconds that a rank waits for another.

    Raises:
        UsageError: the launcher has started another number of processes, or there is no launcher; or it does not say
            where ranks meet.
        MachineError: fewer GPUs than ranks on this host, or no process group.
    """
    if count == 1:
        return None
    check_launched()
    started = int(os.environ["WORLD_SIZE"]) if is_rank() else 1
    if started != count:
        raise UsageError(
            f"tensor_parallel {count} (flag --tensor-parallel) needs as many processes, and this is one of {started}: "
            "use the teal command, which starts them, or torchrun"
        )
    os.environ.update(MULTICAST_OFF)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    found = torch.device("cpu")
    options: dict[str, Any] = {}
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        _require_gpus(local + 1, count)
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
        options["device_id"] = found
    if not dist.is_available():
        raise MachineError("this build of torch has no torch.distributed")
    if not dist.is_initialized():
        with lost():
            store = _all_started(rank, count)
            backend, wait = "nccl" if found.type == "cuda" else "gloo", timedelta(seconds=timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=wait, **options)
    return Ranks(rank, count, found, timeout)


def check_devices(count: int, device: str) -> None:
    """Refuse to start more ranks than this host has devices for.

    Args:
        count: of ranks.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        MachineError: fewer GPUs than ranks.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        _require_gpus(count, count)


def _require_gpus(needed: int, count: int) -> None:
    here = torch.cuda.device_count()
    if needed > here:
        raise MachineError(f"tensor_parallel {count} (flag --tensor-parallel) needs a GPU a rank; there are {here}")


def _all_started(rank: int, count: int) -> Any:
    """torch's store of the launcher, when all ranks are there: importing takes one longer than another."""
    wait = timedelta(seconds=_START_SECONDS)
    store, *_ = next(dist.rendezvous("env://", rank, count, timeout=wait))
    store.set(f"started {rank}", "")
    store.wait([f"started {each}" for each in range(count)], wait)
    return store


def leave() -> None:
    """End the group, where this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that hold a model together; None where one holds all of it."""
    return getattr(model, "teal_ranks", None)


def slowest(model: Any, seconds: float) -> float:
    """A time of this process, or the longest of all ranks that hold the model: what is chosen by it, all choose."""
    ranks = ranks_of(model)
    return seconds if ranks is None else ranks.longest(seconds)


def over_ranks(model: Any, number: int) -> int:
    """A number of this process, or the sum of those of all ranks that hold the model."""
    ranks = ranks_of(model)
    return number if ranks is None else ranks.totals([number])[0]


def over_ranks_(model: Any, counts: Tensor) -> Tensor:
    """The same of a tensor on the model's device, in place. What all ranks see alike is counted by each."""
    ranks = ranks_of(model)
    return counts if ranks is None else ranks.sum_(counts)


Hook = Callable[[Any, Any, Tensor], Tensor]


def summing(ranks: Ranks) -> Hook:
    """A forward hook of a layer of which each rank has some inputs."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return ranks.sum_(output.contiguous())

    return hook


def gathering(ranks: Ranks, size: int) -> Hook:
    """A forward hook of a layer of which each rank has some outputs, `size` of all together."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return ranks.gathered(output)[..., :size]

    return hook
