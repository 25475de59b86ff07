"""What a tuning table holds: measured products, and where each was measured.

Pure data: no file and no GPU is touched here (`teal_kernels.tuning_files`, `teal_kernels.tuning`).
"""

import math
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import TileConfig

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
"""Of one weight, by the kind of the weights."""


@dataclass(frozen=True)
class Provenance:
    """Where an entry was measured. None is: not known."""

    device: str | None = None
    """The GPU, as torch names it."""
    torch: str | None = None
    """Version."""
    triton: str | None = None
    """Version."""
    commit: str | None = None
    """The checkout that was measured, `-dirty` behind it where files had changed."""
    recorded_in: str | None = None
    """Of entries whose measured commit is not known: the commit that has the entry first."""

    @classmethod
    def here(cls, device: str, commit: str | None) -> "Provenance":
        """With the versions of torch and triton that are installed."""
        return cls(device=device, torch=_version("torch"), triton=_version("triton"), commit=commit)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Entry:
    """One product at one sparsity.

    Raises:
        ValueError: neither a measured figure nor one that decides.
    """

    inputs: int
    outputs: tuple[int, ...]
    """Of each part."""
    dtype: str
    """Of the weights; int8 or int4 where they are quantised."""
    rows: int
    epilogue: str
    sparsity: float
    """Realised by every row; 0 for a dense read."""
    microseconds: float | None
    """Median of a launch alone, as measured; None where it was not kept."""
    config: TileConfig
    deciding_microseconds: float | None = None
    """What is compared with other entries where that is not `microseconds`: where skipping did not pay in the model,
    the dense read's figure times what a token that skips takes of a dense one, if that is more."""
    deciding_because: str | None = None
    """Why there is a figure that decides."""
    measured: Provenance = Provenance()

    def __post_init__(self) -> None:
        if self.microseconds is None and self.deciding_microseconds is None:
            raise ValueError("an entry has neither microseconds nor deciding_microseconds")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Entry":
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: no such entry.
        """
        fields = dict(content)
        fields["outputs"] = tuple(fields["outputs"])
        fields["config"] = TileConfig(**fields["config"])
        fields["measured"] = Provenance(**fields["measured"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """What a table's line holds: a figure that decides is named only where there is one."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in ("deciding_microseconds", "deciding_because")
        }

    @property
    def cost(self) -> float:
        """Microseconds that decide between entries."""
        cost = self.microseconds if self.deciding_microseconds is None else self.deciding_microseconds
        assert cost is not None  # noqa: S101 (__post_init__)
        return cost

    @property
    def product(self) -> tuple[int, tuple[int, ...], str, int, str]:
        """What was measured, whatever the sparsity."""
        return self.inputs, self.outputs, self.dtype, self.rows, self.epilogue

    def distance(self, inputs: int, outputs: tuple[int, ...], bits: int, rows: int, epilogue: str) -> float:
        """How unlike another product is: 0 for the same. Weights of other bits are further than twice the rows."""
        size = abs(math.log2(self.inputs / inputs)) + abs(math.log2(sum(self.outputs) / sum(outputs)))
        unlike = abs(math.log2(BITS[self.dtype] / bits)) + 4.0 * ((BITS[self.dtype] < 16) != (bits < 16))
        return size + 10.0 * abs(math.log2(self.rows / rows)) + (epilogue != self.epilogue) + 12.0 * unlike


def kind_of(table: Tensor | Packed) -> str:
    """What a tuning table calls the weights: their dtype, or int8 or int4."""
    return f"int{table.bits}" if isinstance(table, Packed) else str(table.dtype).removeprefix("torch.")
