"""Configuration: one typed model a verb, filled from defaults, then YAML, then flags (`config_files`).

A field here is at once a YAML key, a command-line flag (underscores become dashes) and a documented
option: `cli.options` makes the flags from these models, so the three cannot disagree. Everything is
checked before any model is loaded.
"""

from teal_cli.config.adapt import AdaptConfig
from teal_cli.config.calibrate import CalibrateConfig
from teal_cli.config.decoding import BenchConfig, ComparingConfig, DecodingConfig, GenerateConfig
from teal_cli.config.evaluation import EvalConfig
from teal_cli.config.serve import ServeConfig
from teal_cli.config.shared import OTHER_SPELLINGS, ModelConfig, OutputConfig, SharedConfig
from teal_cli.config.sparsity import ExportConfig, OneAllocation, SparseConfig
from teal_cli.config.verbs import (
    DEFAULT_STAGES,
    STAGE_CONFIGS,
    STAGES,
    VERB_CONFIGS,
    ImportConfig,
    InfoConfig,
    InspectConfig,
    ReportConfig,
    RunConfig,
)

__all__ = [
    "DEFAULT_STAGES",
    "OTHER_SPELLINGS",
    "STAGES",
    "STAGE_CONFIGS",
    "VERB_CONFIGS",
    "AdaptConfig",
    "BenchConfig",
    "CalibrateConfig",
    "ComparingConfig",
    "DecodingConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "InfoConfig",
    "InspectConfig",
    "ModelConfig",
    "OneAllocation",
    "OutputConfig",
    "ReportConfig",
    "RunConfig",
    "ServeConfig",
    "SharedConfig",
    "SparseConfig",
]
