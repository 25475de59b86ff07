"""The shapes that are timed beside llama.cpp are of families of the table, and as large as they are said to be."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from teal_cli.models.aliases import Alias
from teal_cli.models.architectures import table
from teal_cli.models.loading import outline

_SHAPES = yaml.safe_load((Path(__file__).parents[2] / "benchmarks" / "family_shapes.yaml").read_text(encoding="utf-8"))
_OF_THE_SCRIPT = ("like", "older_keys", "widths")


@pytest.mark.parametrize("model_type", _SHAPES["families"])
def test_a_shape_has_a_row_and_a_modest_size(model_type: str) -> None:
    row: dict[str, Any] = _SHAPES["families"][model_type]
    own = {key: value for key, value in row.items() if key not in _OF_THE_SCRIPT}
    shape = {"model_type": model_type, **_SHAPES[row.get("like", "base")], **own}
    model = outline(Alias(model_type, "", shape, None))
    assert 100e6 < sum(parameter.numel() for parameter in model.parameters()) < 500e6
    assert model_type in table()
