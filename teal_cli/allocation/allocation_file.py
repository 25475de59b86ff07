"""Allocations as files: YAML (or JSON) that people read, edit and hand back with --allocation FILE."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from teal_cli.errors import UsageError, nearest, shown
from teal_cli.models.architectures import Projection
from teal_cli.reading import read_yaml


def by_pattern(patterns: Mapping[str, Any], projections: Iterable[Projection], origin: str) -> dict[str, Any]:
    """Projection name -> value of the last pattern that it matches; shell-style patterns (`*`, `?`, `[]`).

    Patterns are for the blocks: the output layer has a value where its very name is a key.

    Raises:
        UsageError: a pattern that matches no projection.
    """
    is_output = {projection.name: projection.is_output for projection in projections}
    names = list(is_output)
    found = {}
    for pattern, value in patterns.items():
        matching = [name for name in names if name == pattern or (fnmatchcase(name, pattern) and not is_output[name])]
        if not matching:
            hint = nearest(pattern, names)
            if "did you mean" not in hint:  # the whole list would be hundreds of names
                hint = f"; they are called like {names[0]!r}"
            raise UsageError(f"{origin}: {shown(pattern)} matches no projection of this model{hint}")
        found.update(dict.fromkeys(matching, value))
    return found


def read_allocation(path: Path, projections: Sequence[Projection]) -> dict[str, float]:
    """The sparsity of every projection, from the mapping `projections` of a file.

    Args:
        path: YAML or JSON; its keys are names or patterns as `by_pattern` takes them. The output layer is dense
            unless its name is a key.
        projections: the model's.

    Raises:
        UsageError: not such a file, a sparsity outside [0, 1), or a projection without one.
    """
    patterns = read_yaml(path, "allocation file").get("projections")
    if not isinstance(patterns, dict) or not patterns:
        raise UsageError(f"allocation file {path} must hold a mapping 'projections' of names to sparsities")
    for pattern, value in patterns.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(pattern, str) and number and 0.0 <= value < 1.0):
            raise UsageError(
                f"allocation file {path}: {shown(pattern)}: {shown(value)} is not a sparsity, at least 0 and below 1"
            )
    found = by_pattern(patterns, projections, f"allocation file {path}")
    left = [p.name for p in projections if p.name not in found and not p.is_output]
    if left:
        raise UsageError(f"allocation file {path} says nothing of {len(left)} projections, {left[0]} first")
    return {projection.name: float(found.get(projection.name, 0.0)) for projection in projections}
