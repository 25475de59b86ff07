"""Where the tensors of weight files belong whose names are not those of the model.

transformers has experts in one parameter, and files often have them one by one: it puts them together as it loads. A
process that reads slices of them does so itself, by transformers' own table of names.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a stored tensor belongs."""

    parameter: str
    """As the model's `state_dict` has it."""
    part: int = 0
    """Which of `parts` it is that stand side by side along outputs: gate or up."""
    parts: int = 1
    expert: bool = False
    """Whether it is of one expert, the next ones of which follow it in the order of their numbers."""


def places(keys: Iterable[str], model: Any) -> dict[str, Place]:
    """Where transformers would put tensors.

    Args:
        keys: of weight files, none of which is a name of the model.
        model: the model, or its outline.

    Returns:
        For each key that it has a place for.

    Raises:
        ValueError: a tensor that it computes something of; with its key.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names:
            continue
        if pattern is None:
            found[key] = Place(name)
            continue
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        sources = converter.source_patterns
        if not _stacks(converter.operations, len(sources)):
            raise ValueError(key)
        found[key] = Place(name, sources.index(pattern), len(sources), expert=True)
    return found


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys by the numbers in them: expert 10 behind expert 9."""
    return sorted(keys, key=lambda key: [int(number) for number in re.findall(r"\d+", key)])


def _stacks(operations: list[Any], parts: int) -> bool:
    """Whether operations only stack experts, and then put parts side by side along outputs."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(MergeModulelist, 0), (Concatenate, 1)][: 2 if parts > 1 else 1]
    return [(type(operation), getattr(operation, "dim", None)) for operation in operations] == kinds
