"""How weights are quantised: the value of `--quantise`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FORM = re.compile(r"int8|int4(?::(\d+))?")
DEFAULT_GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """Bits, and how many inputs share a scale."""

    bits: int
    group: int
    """Inputs of one output that share a scale and a zero point; 0 for all of them."""

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read `int8`, `int4` or `int4:GROUP`.

        Raises:
            ValueError: anything else.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not int8, int4 or int4:GROUP")
        if text == "int8":
            return cls(8, 0)
        group = int(found[1] or DEFAULT_GROUP)
        if group < 32 or group & (group - 1):
            raise ValueError(f"groups of {group} inputs: a power of two from 32 on is needed")
        return cls(4, group)

    @property
    def name(self) -> str:
        """As a folder is called."""
        return "int8" if self.bits == 8 else f"int4-{self.group}"

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return "int8" if self.bits == 8 else f"int4:{self.group}"

    def __str__(self) -> str:
        return self.text

    @property
    def has_zeros(self) -> bool:
        """Whether groups have zero points: with 4 bits they use 15 steps where a sign would use 7 of 8."""
        return self.bits == 4

    def group_of(self, inputs: int) -> int:
        """Inputs a group, of a projection with so many."""
        return inputs if self.group == 0 else min(self.group, inputs)

    def stored_bytes(self, inputs: int, outputs: int) -> int:
        """What a quantised projection takes: codes, and four bytes a group (a scale, or one and a zero point)."""
        codes = 4 * inputs * -(-outputs // (32 // self.bits))
        groups = -(-inputs // self.group_of(inputs))
        return codes + groups * outputs * 4


INT8 = Scheme(8, 0)
"""Of output layers."""


def kind_of_weights(stored: Mapping[str, str | None] | None) -> str:
    """What results call the weights of a checkpoint: empty, int8, int4-128, with -output where the output layer is too.

    Args:
        stored: as its config.json has it; None where nothing is quantised.

    Raises:
        ValueError: quantised in a way unknown here.
    """
    if stored is None:
        return ""
    return Scheme.parse(str(stored["projections"])).name + ("-output" if stored["output"] else "")
