"""Groups of neurons that are alike: balanced k-means, and putting the neurons of an MLP into another order."""

import torch
from torch import Tensor, nn

_ROUNDS = 20
"""Of k-means: after them few neurons change their group."""


@torch.no_grad()
def balanced_groups(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Divide vectors into groups of one size, each near to the mean of its own (LTE, arXiv 2402.06126).

    k-means whose assignment is balanced: in turns, all that are left ask the nearest group that has room, and it takes
    the nearest of them.

    Args:
        vectors: (n, dim) of any dtype.
        size: of each group; divides n.
        seed: of the first means, which are some of the vectors.

    Returns:
        (n,) int64, the numbers of the vectors, group after group, on their device; inside a group in their order.

    Raises:
        ValueError: n is no multiple of the size.
    """
    count, rest = divmod(len(vectors), size)
    if rest:
        raise ValueError(f"{len(vectors)} vectors are no whole number of groups of {size}")
    if size == 1 or count == 1:
        return torch.arange(len(vectors), device=vectors.device)
    vectors = vectors.float()
    first = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:count]
    means, before = vectors[first.to(vectors.device)], None
    for _ in range(_ROUNDS):
        group = _assigned(torch.cdist(vectors, means), size)
        if before is not None and torch.equal(group, before):
            break
        before = group
        means = torch.zeros_like(means).index_add_(0, group, vectors) / size
    return torch.argsort(group, stable=True)


def _assigned(distances: Tensor, size: int) -> Tensor:
    """(n, groups) -> (n,) int64: the group of each, `size` in all of them."""
    n, count = distances.shape
    group = torch.full((n,), -1, dtype=torch.int64, device=distances.device)
    room = torch.full((count,), size, dtype=torch.int64, device=distances.device)
    while len(left := (group < 0).nonzero().view(-1)):
        nearest, asked = distances[left].masked_fill(room == 0, torch.inf).min(1)
        order = torch.argsort(nearest, stable=True)
        order = order[torch.argsort(asked[order], stable=True)]  # by group, the nearest first
        of_group = asked[order]
        begins = torch.searchsorted(of_group, torch.arange(count, device=of_group.device))
        taken = torch.arange(len(order), device=of_group.device) - begins[of_group] < room[of_group]
        group[left[order[taken]]] = of_group[taken]
        room -= torch.bincount(of_group[taken], minlength=count)
    return group


@torch.no_grad()
def reorder_neurons_(gate: nn.Linear, up: nn.Linear, down: nn.Linear, order: Tensor) -> None:
    """Put the neurons of an MLP into another order: rows of gate and up, columns of down. It computes what it did.

    Args:
        gate: (neurons, in)
        up: the same.
        down: (in, neurons)
        order: (neurons,) int64: which neuron comes to each place.
    """
    for layer in (gate, up):
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
    down.weight.copy_(down.weight[:, order])
