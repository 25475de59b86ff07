"""Greedy allocation (TEAL, arXiv 2408.14690): block after block, the next step to whom it hurts least.

The steps were tried when the model was calibrated (`calibration.block_error`), on the error of each
block's output. What is left to do here is to find where on its path every block reaches the target.
"""

from teal_cli.calibration.block_error import at_sparsity
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import UsageError


def greedy(calibration: Calibration, target: float) -> dict[str, float]:
    """Every block at the target, each spread over its projections along its path; the output layer stays dense.

    Raises:
        UsageError: a calibration without paths, or a target beyond their end.
    """
    if not calibration.paths:
        raise UsageError(
            "this calibration has no greedy paths, which allocation greedy needs: calibrate again with "
            "--greedy-tokens above 0, or take another --allocation"
        )
    sparsity = {projection.name: 0.0 for projection in calibration.projections if projection.is_output}
    for block, path in calibration.paths.items():
        members = [p for p in calibration.projections if p.name.startswith(f"{block}.")]
        try:
            found = at_sparsity(path.tolist(), [p.weights_read for p in members], target)
        except ValueError as error:
            raise UsageError(f"allocation greedy does not reach sparsity {target:g}: {error}") from error
        sparsity |= {member.name: value for member, value in zip(members, found, strict=True)}
    return sparsity
