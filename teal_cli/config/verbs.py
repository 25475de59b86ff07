"""The other verbs, and all of them by name."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from teal_cli.config.adapt import AdaptConfig
from teal_cli.config.calibrate import CalibrateConfig
from teal_cli.config.decoding import BenchConfig, GenerateConfig
from teal_cli.config.evaluation import EvalConfig
from teal_cli.config.serve import ServeConfig
from teal_cli.config.shared import OutputConfig, SharedConfig
from teal_cli.config.sparsity import ExportConfig
from teal_cli.config_values import FileList, OutputFile, OutputFolder, SparsityList


class ImportConfig(SharedConfig):
    """`teal import`."""

    sparsity: SparsityList = Field(
        [0.5], description="targets to write the lookup's allocation file for, comma-separated"
    )
    out: OutputFolder | None = Field(None, description="RUN folder to write (default RUNS/<model>)")


class InfoConfig(SharedConfig):
    """`teal info`."""


class ReportConfig(OutputConfig):
    """`teal report`."""

    out: OutputFile | None = Field(None, description="the page (default RUN/report.html)")
    plots: OutputFolder | None = Field(
        None, description="folder of the plots as SVG and PNG files (default beside the page, without its .html)"
    )
    results: FileList = Field(
        default_factory=list, description="further JSON results of eval, bench and generate, comma-separated"
    )


class InspectConfig(OutputConfig):
    """`teal inspect`."""

    verify: bool = Field(False, description="read every byte of the weights and compare digests")


STAGE_CONFIGS: dict[str, type[SharedConfig]] = {
    "calibrate": CalibrateConfig,
    "adapt": AdaptConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
    "bench": BenchConfig,
    "generate": GenerateConfig,
}
"""What `teal run` can chain, in the order that it does."""
STAGES = tuple(STAGE_CONFIGS)
DEFAULT_STAGES = tuple(stage for stage in STAGES if stage != "adapt")
"""Of a recipe that lists none: training is asked for by name."""
VERB_CONFIGS: dict[str, type[OutputConfig]] = {
    **STAGE_CONFIGS,
    "serve": ServeConfig,
    "import": ImportConfig,
    "info": InfoConfig,
    "report": ReportConfig,
    "inspect": InspectConfig,
}


class RunConfig(BaseModel):
    """`teal run`: the stages of a recipe with their configurations, all checked."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    stages: dict[str, SharedConfig]
    json_file: Path | None = None
    quiet: bool = False
