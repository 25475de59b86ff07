"""What a sparsity saves: bytes, or time by a table of measured kernels."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teal_cli.checkpoint.fields import checked
from teal_cli.checkpoint.results import KernelTable
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Projection
from teal_cli.reading import read_json


@dataclass(frozen=True)
class Saving:
    """What one projection saves over its sparsity: a line through points, never falling."""

    sparsity: tuple[float, ...]
    saved: tuple[float, ...]
    """Weights not read, or microseconds; 0 at sparsity 0."""

    def at(self, sparsity: float) -> float:
        """What is saved at a sparsity."""
        return float(np.interp(sparsity, self.sparsity, self.saved))

    def sparsity_for(self, saved: float) -> float:
        """The least sparsity that saves this much."""
        stop = int(np.searchsorted(self.saved, saved))
        if stop == 0:
            return 0.0
        (s_0, s_1), (before, after) = self.sparsity[stop - 1 : stop + 1], self.saved[stop - 1 : stop + 1]
        return s_0 + (s_1 - s_0) * (saved - before) / (after - before)


def weights_saved(projections: Iterable[Projection]) -> dict[str, Saving]:
    """Projection -> weights that it does not read."""
    return {p.name: Saving((0.0, 1.0), (0.0, float(p.weights_read))) for p in projections}


def time_saved(table: Path, projections: Iterable[Projection]) -> dict[str, Saving]:
    """Projection -> microseconds that it saves, by the kernels in a result of `teal bench --kernels --json`.

    Where the table has the product of a whole site (as on a GPU), a projection has the part of it that
    its outputs are. Between measured sparsities a straight line; above the last one, on at its slope. An output
    layer that is not in the table saves nothing.

    Raises:
        ArtefactError: not such a result, or a product is missing from it.
    """
    times: defaultdict[tuple[int, int], dict[float, float]] = defaultdict(dict)
    content = read_json(table, "kernel table")
    advice = "write it with `teal bench --kernels --json FILE`"
    for entry in checked(KernelTable, content, "kernel table", table, advice).kernels:
        shape = (entry.out_features, entry.in_features)
        # Of the dense products the faster one: it is what decoding takes.
        before = times[shape].get(entry.realised_sparsity, entry.microseconds.median)
        times[shape][entry.realised_sparsity] = min(entry.microseconds.median, before)
    sites: defaultdict[str, int] = defaultdict(int)
    found = list(projections)
    for projection in found:
        sites[projection.site] += projection.out_features
    return {p.name: _saving(times, table, p, sites[p.site]) for p in found}


def _saving(
    times: Mapping[tuple[int, int], Mapping[float, float]], table: Path, projection: Projection, site_out: int
) -> Saving:
    for outputs in (site_out, projection.out_features):  # a GPU runs a site at once
        measured = times.get((outputs, projection.in_features), {})
        if 0.0 in measured and len(measured) > 1:
            break
    else:
        if projection.is_output:
            return Saving((0.0, 1.0), (0.0, 0.0))
        raise ArtefactError(
            f"{table} has no times of {projection.name} ({projection.out_features} x {projection.in_features}), dense "
            "and sparse: write it with `teal bench --kernels --sparsity 0.25,0.4,0.5,0.65,0.8 --json FILE`"
        )
    share = projection.out_features / outputs * (projection.chosen or projection.copies)
    sparsity = sorted(measured)
    raw = [(measured[0.0] - measured[s]) * share for s in sparsity]
    last_slope = (raw[-1] - raw[-2]) / (sparsity[-1] - sparsity[-2])
    sparsity.append(1.0)
    raw.append(raw[-1] + max(last_slope, 0.0) * (1.0 - sparsity[-2]))
    return Saving(tuple(sparsity), tuple(np.maximum.accumulate(raw).tolist()))
