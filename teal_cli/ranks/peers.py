"""Memory of the GPUs of one host that every rank can write to: torch's symmetric memory, without multicast."""

from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teal_cli.ranks.group import Ranks
from teal_kernels.triton_ranks import LOOKS_A_SECOND, Inboxes

_MOST_LOOKS = (1 << 31) - 1
_FEWEST = 1 << 10
"""Words of an inbox."""


def peers_reach(ranks: Ranks) -> bool:
    """Whether each rank's GPU can write to the memory of all others: all are on one host and linked."""
    here = torch.cuda.device_count() if ranks.device.type == "cuda" else 0
    reach = here >= ranks.count and all(
        torch.cuda.can_device_access_peer(*pair) for pair in permutations(range(ranks.count), 2)
    )
    return ranks.totals([int(reach)]) == [ranks.count]


def shared_memory(ranks: Ranks, elements: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Memory of this rank that all can reach, and torch's handle of everybody's. All ranks ask at the same time."""
    from torch.distributed import _symmetric_memory as symmetric

    found = symmetric.empty(elements, dtype=dtype, device=ranks.device)
    return found, symmetric.rendezvous(found, group_name())


def group_name() -> Any:
    """Of all ranks, as ops of symmetric memory want it.

    Raises:
        TypeError: there is no process group.
    """
    group = dist.group.WORLD
    if group is None:
        raise TypeError("there is no process group")
    return group.group_name


def open_inboxes(ranks: Ranks, places: int) -> Inboxes:
    """Empty inboxes of so many words, of all ranks. All ask at the same time."""
    size = max(places, _FEWEST)
    own, handle = shared_memory(ranks, size, torch.int32)
    words = [
        own if rank == ranks.rank else handle.get_buffer(rank, (size,), torch.int32) for rank in range(ranks.count)
    ]
    inboxes = Inboxes(ranks.rank, words, min(int(ranks.timeout * LOOKS_A_SECOND), _MOST_LOOKS))
    inboxes.empty_()
    torch.cuda.synchronize(ranks.device)
    ranks.wait()  # nobody sends before all are empty
    return inboxes
