"""Which sparsity, from which calibration, spread how; and `teal export`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from teal_cli.config.calibrate import CalibrateConfig
from teal_cli.config.shared import ModelConfig
from teal_cli.config_values import AllocationName, InputFile, Limits, OutputFolder, Sparsity


class SparseConfig(ModelConfig):
    """Which sparsity, from which calibration."""

    _calibrate: CalibrateConfig = PrivateAttr(default_factory=CalibrateConfig)

    @property
    def calibrate(self) -> CalibrateConfig:
        """How to calibrate if there is no calibration yet: as the YAML says, with this verb's shared options."""
        shared = {key: getattr(self, key) for key in ModelConfig.model_fields if key != "json_file"}
        return self._calibrate.model_copy(update=shared)

    calibration: Path | None = Field(None, description="RUN folder of a calibration (default RUNS/<model>)")
    limits: Limits = Field(
        default_factory=dict,
        description="fisher: least and greatest sparsity of projections, as PATTERN=LEAST:MOST,..",
    )
    cost: InputFile | None = Field(
        None, description="fisher: result of teal bench --kernels --json; buys time by it in place of bytes"
    )
    recalibrate: bool = Field(True, description="measure the thresholds again in the sparse network (one more pass)")

    @property
    def allocations(self) -> list[str]:
        """How the sparsity is spread: one way, or several to compare."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _limits_and_cost_are_of_fisher(self) -> Self:
        if (self.limits or self.cost) and "fisher" not in self.allocations:
            raise ValueError(
                "limits (flag --limits) and cost (flag --cost) are for allocation fisher (flag --allocation)"
            )
        return self


class OneAllocation(SparseConfig):
    """Which sparsity, spread one way."""

    allocation: AllocationName = Field(
        "fisher",
        description="how the sparsity is spread: uniform, greedy, fisher, fisher-site, or a .yaml or .json file",
    )

    @property
    def allocations(self) -> list[str]:
        """The one."""
        return [self.allocation]


class ExportConfig(OneAllocation):
    """`teal export`."""

    sparsity: Sparsity = Field(0.5, description="share of the blocks' weights that a token is not to read, in [0, 1)")
    out: OutputFolder | None = Field(None, description="folder to write (default RUNS/<model>/<allocation>-<sparsity>)")
    weights: Literal["link", "copy"] = Field("link", description="link to the dense weight files, or copy them")
