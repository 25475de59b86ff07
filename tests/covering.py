"""Covering sets: few cases of many, in which any values of three arguments meet.

Pairs are not enough where one argument is the backend: of twelve planted faults pairs missed two, one of them
"relu2 is not squared with three rows" of one backend; triples, like the whole matrices, found them all.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from covertable import make


def covering(strength: int = 3, **arguments: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test with a covering array in place of every combination.

    A fault that shows whenever `strength` arguments have certain values is found as by the whole matrix.

    Args:
        strength: any values of so many different arguments stand together in at least one case.
        arguments: name -> its values.
    """
    # By index: the order of the cases must not depend on how a value is hashed.
    rows = make([range(len(values)) for values in arguments.values()], strength=strength)
    cases = [[values[index] for values, index in zip(arguments.values(), row, strict=True)] for row in rows]
    ids = ["-".join(_name(value) for value in case) for case in cases]
    return pytest.mark.parametrize(list(arguments), cases, ids=ids)


def _name(value: Any) -> str:
    return str(getattr(value, "kind", value)).replace(" ", "")
