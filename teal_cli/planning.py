"""From a calibration to the thresholds of one export: allocate, then recalibrate in the sparse network."""

import gc
from typing import Any

from torch import Tensor

from teal_cli.allocation import make_plan
from teal_cli.checkpoint.calibration import KEPT_TOKENS, Calibration
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import SparseConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.data import recorded_datasets, token_blocks
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_dense
from teal_cli.model_source import ModelSource
from teal_cli.models.architectures import architecture_for
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import recalibrate_, sparsify_

DEFAULT_SPARSITY = 0.5


def allocations(config: SparseConfig, calibration: Calibration, reporter: Reporter) -> list[str]:
    """The allocations that were asked for; where none was and there are no sensitivities, greedy or else uniform."""
    if "allocation" not in config.model_fields_set and not calibration.sensitivities:
        fallback = "greedy" if calibration.paths else "uniform"
        reporter.say(f"this calibration has no sensitivities: allocation {fallback} in place of fisher")
        return [fallback]
    return config.allocations


def allocate(config: SparseConfig, calibration: Calibration, target: float | None, allocation: str) -> SparsityPlan:
    """A plan with the thresholds that the dense network's hidden states give.

    Raises:
        TealError: what `make_plan` raises.
    """
    if target is None and not is_allocation_file(allocation):
        target = DEFAULT_SPARSITY
    # Limits and costs are fisher's; the other allocations of one command go without.
    return make_plan(calibration, target, allocation, limits=config.limits, cost=config.cost)


def recalibrate(
    config: SparseConfig,
    plan: SparsityPlan,
    calibration: Calibration,
    source: ModelSource,
    reporter: Reporter,
    model: Any = None,
) -> tuple[SparsityPlan, bool]:
    """The plan with thresholds that were measured in the sparse network, and whether that could be done.

    Args:
        config: whether to, and where.
        plan: from `allocate`.
        calibration: names the text.
        source: the dense model.
        reporter: told what takes a while, and why it could not be done.
        model: with sparse layers, to save loading it; takes on other thresholds.

    Raises:
        ArtefactError: recalibration was asked for by name, and the text of the calibration cannot be had.
    """
    if not config.recalibrate or not any(entry.expected_sparsity for entry in plan.projections.values()):
        return plan, False
    try:
        text = _text(calibration, source)
    except ArtefactError as error:
        if "recalibrate" in config.model_fields_set:
            raise
        reporter.say(f"thresholds of the dense network: recalibrating them needs the calibration's text ({error})")
        return plan, False
    loaded = model is None
    if loaded:
        model, _ = load_dense(source.folder, config, calibration)
        sparsify_(model, plan)
        reporter.say(f"recalibrating thresholds on {text.numel():,} tokens of {calibration.info.dataset}")
    # As `teal eval` runs text: encoders have no prompt that runs dense.
    prefix = text.shape[1] // 2 if architecture_for(model).kind == "causal" else 0
    measured = recalibrate_(model, plan, text, dense_prefix=prefix)
    if loaded:
        del model
        gc.collect()  # hooks and sites refer to one another; a GPU has no room for a second copy
    return measured, True


def _text(calibration: Calibration, source: ModelSource) -> Tensor:
    """The first sequences that the calibration read: (sequences, tokens) int64."""
    if calibration.text is not None:
        return calibration.text
    info = calibration.info
    if info.imported:
        raise ArtefactError(f"it was imported from {info.imported}, which does not hold the text")
    return token_blocks(
        recorded_datasets(info.dataset)[0],
        load_tokenizer(source.folder),
        tokens=max(min(KEPT_TOKENS, info.tokens), info.seq_len),
        seq_len=info.seq_len,
        seed=info.seed,
        half="calibration",
    )
