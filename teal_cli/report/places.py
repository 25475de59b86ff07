"""Projections by layer and kind: how tables and plots lay out one value for each of them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_IN_A_LAYER = re.compile(r".*?\.(\d+)\.(?:.*\.)?([^.]+)")


def place(name: str) -> tuple[int | None, str]:
    """Layer and short name: model.layers.3.self_attn.q_proj is (3, "q"), lm_head is (None, "lm_head")."""
    found = _IN_A_LAYER.fullmatch(name)
    if found is None:
        return None, name.rpartition(".")[2]
    return int(found[1]), found[2].removesuffix("_proj")


def site_kind(site: str) -> str:
    """A site's name without its layer: attention_input, mlp_intermediate."""
    return site.rpartition(".")[2]


@dataclass(frozen=True)
class Grid:
    """Projections of the layers, as rows and columns."""

    layers: list[int]
    kinds: list[str]
    names: dict[tuple[int, str], str]

    def rows(self, values: Mapping[str, float]) -> list[list[float | None]]:
        """One row a layer, one value a kind; None where there is none."""
        return [[values.get(self.names.get((layer, kind), "")) for kind in self.kinds] for layer in self.layers]


def grid_of(projections: Iterable[str]) -> Grid:
    """Lay those of the layers out, kinds in the order in which they first come."""
    names: dict[tuple[int, str], str] = {}
    kinds: dict[str, None] = {}
    for name in projections:
        layer, kind = place(name)
        if layer is not None:
            names[layer, kind] = name
            kinds[kind] = None
    return Grid(sorted({layer for layer, _ in names}), list(kinds), names)
