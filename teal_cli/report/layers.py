"""Projections by layer and kind: how tables and plots lay out one value for each of them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_IN_A_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """Where a projection, or a hidden state, is."""

    stack: str
    """Module path of its list of blocks."""
    layer: int
    kind: str
    """What it is called in every block: q, down; as much of its path as tells it from the others."""


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """Names to places, in the order given; those outside of any layer are left out."""
    found = {name: match for name in names if (match := _IN_A_LAYER.fullmatch(name))}
    # T5 numbers the parts of a block, and its decoder has one more than its encoder.
    paths = {name: _without_numbers(match[3]) for name, match in found.items()}
    taken = Counter((match[1], match[2], paths[name]) for name, match in found.items())
    if max(taken.values(), default=0) > 1:
        paths = {name: match[3] for name, match in found.items()}
    kinds = _kinds(dict.fromkeys(paths.values()))
    return {name: Place(match[1], int(match[2]), kinds[paths[name]]) for name, match in found.items()}


def _without_numbers(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _kinds(paths: Iterable[str]) -> dict[str, str]:
    """The shortest ends of paths that are all different: q for self_attn.q_proj; attn.c and mlp.c for two c_proj."""
    kinds = dict.fromkeys(paths, 1)
    while True:
        ends = {path: ".".join(path.split(".")[-parts:]).removesuffix("_proj") for path, parts in kinds.items()}
        shared = {end for end, count in Counter(ends.values()).items() if count > 1}
        longer = {path for path, end in ends.items() if end in shared and kinds[path] < len(path.split("."))}
        if not longer:
            return ends
        kinds |= {path: kinds[path] + 1 for path in longer}


def short_name(name: str, places: Mapping[str, Place]) -> str:
    """The kind of a projection; `head` for the output layer, which is the one in no layer."""
    return places[name].kind if name in places else "head"


@dataclass(frozen=True)
class Grid:
    """Projections of the layers, as rows and columns."""

    labels: list[str]
    """Of the rows: the layer, and its stack where there are several."""
    kinds: list[str]
    names: list[list[str | None]]
    """By row and kind; None where a layer lacks one."""

    def rows(self, values: Mapping[str, float]) -> list[list[float | None]]:
        """One row a layer, one value a kind; None where there is none."""
        return [[None if name is None else values.get(name) for name in row] for row in self.names]


def grid_of(projections: Iterable[str]) -> Grid:
    """Lay those of the layers out, kinds in the order in which they first come, stack after stack."""
    places = places_of(projections)
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    stacks = list(dict.fromkeys(place.stack for place in places.values()))
    layers = sorted({(stacks.index(place.stack), place.layer) for place in places.values()})
    at = {(stacks.index(place.stack), place.layer, place.kind): name for name, place in places.items()}
    labels = [layer_label(stacks[stack], layer, len(stacks) > 1) for stack, layer in layers]
    return Grid(labels, kinds, [[at.get((*layer, kind)) for kind in kinds] for layer in layers])


def layer_label(stack: str, layer: int, several: bool) -> str:
    """A layer by its number; with the first part of its stack's path where there are several."""
    return f"{stack.partition('.')[0]} {layer}" if several else str(layer)


def site_kind(site: str) -> str:
    """A site's name without its layer: attention_input, mlp_intermediate."""
    return site.rpartition(".")[2]
