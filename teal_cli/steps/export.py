"""Export: a calibration and a target in, a TEAL checkpoint out."""

from teal_cli.checkpoint.export import ExportSummary
from teal_cli.config import ExportConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.models.loading import use_threads
from teal_cli.planning import allocate, allocations
from teal_cli.steps.artefacts import calibration_for, write_recalibrated
from teal_cli.workspace import Workspace


def export(config: ExportConfig, reporter: Reporter, workspace: Workspace | None = None) -> ExportSummary:
    """Write the TEAL checkpoint of a model at one sparsity.

    Raises:
        TealError: anything wrong with model, calibration or disk.
    """
    use_threads(config.threads)
    workspace = workspace or Workspace.of(config, reporter)
    workspace.require_dense("export")
    calibration = calibration_for(config, workspace, reporter)
    (allocation,) = allocations(config, calibration, reporter)
    own = is_allocation_file(allocation) and "sparsity" not in config.model_fields_set  # the file says itself
    plan = allocate(config, calibration, None if own else config.sparsity, allocation)
    folder = config.out or workspace.export_folder(plan.allocation, plan.target_sparsity)
    return write_recalibrated(config, plan, calibration, workspace, folder, reporter, weights=config.weights)
