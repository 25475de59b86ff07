"""Evaluate: a sparse model on text that it was not calibrated on, beside its dense self."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_cli.checkpoint.export import read_summary
from teal_cli.config import EvalConfig
from teal_cli.data import Half, token_blocks
from teal_cli.errors import ArtefactError
from teal_cli.evaluate.perplexity import Comparison, compare
from teal_cli.evaluate.tasks import run_tasks
from teal_cli.models.loading import load_model, load_tokenizer
from teal_cli.models.source import ModelSource
from teal_cli.report.console import Reporter
from teal_cli.sparse import control_of, use_backend
from teal_cli.steps.calibrate import dataset_identity
from teal_cli.versions import device_description, library_versions
from teal_cli.workspace import Workspace, checkpoint_for


@dataclass(frozen=True)
class EvalResult:
    """Quality at one sparsity."""

    model: str
    dataset: str
    half: Half
    """Which half of the dataset was read; `all` where calibration read another dataset."""
    seq_len: int
    dense_prefix: int
    allocation: str
    target_sparsity: float
    comparison: Comparison
    tasks: dict[str, dict[str, dict[str, float]]]
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal eval --json` (docs/formats.md)."""
        found = self.comparison
        return {
            "model": self.model,
            "dataset": self.dataset,
            "half": self.half,
            "tokens": found.tokens,
            "sequences": found.sequences,
            "seq_len": self.seq_len,
            "dense_prefix": self.dense_prefix,
            "dense": asdict(found.dense),
            "sparse": {
                **asdict(found.sparse),
                "allocation": self.allocation,
                "target_sparsity": self.target_sparsity,
                "realised_sparsity": found.realised_sparsity,
                "kl": found.kl,
                "top1_agreement": found.top1_agreement,
            },
            "perplexity_ratio": found.ratio,
            "perplexity_ratio_stderr": found.ratio_stderr,
            "realised_by_projection": found.realised_by_projection,
            "tasks": self.tasks,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "versions": self.versions,
        }


def evaluate(config: EvalConfig, reporter: Reporter, workspace: Workspace | None = None) -> EvalResult:
    """Perplexity, drift and realised sparsity on held-out text; harness tasks where asked.

    Raises:
        TealError: anything wrong with model, text or machine.
    """
    workspace = workspace or Workspace.of(config, reporter)
    dataset = config.dataset if config.text is None else str(config.text)
    if config.text is not None and config.text.suffix not in (".txt", ".jsonl"):
        raise ArtefactError(f"text file {config.text} must be a .txt or .jsonl file")
    tokenizer = load_tokenizer(workspace.source.folder)
    folder = checkpoint_for(config, config.sparsity, workspace, reporter)
    plan = ModelSource(workspace.source.name, folder).plan
    half = _half(dataset, folder)

    def text(model: Any = None) -> Tensor:
        return token_blocks(
            dataset,
            tokenizer,
            tokens=config.tokens,
            seq_len=config.seq_len,
            seed=config.seed,
            half=half,
            model=model,
        )

    # Text comes before the model: a missing file should not cost a load.
    blocks = None if dataset == "self" else text()
    model = load_model(folder, device=config.device, dtype=config.dtype)
    control = control_of(model)
    use_backend(control, config.backend, model.device, model.dtype)
    if blocks is None:
        with control.switched_off():
            blocks = text(model)
    with reporter.progress(f"evaluating on {dataset}", blocks.numel()) as advance:
        comparison = compare(model, control, blocks, dense_prefix=config.prefix, on_sequence=advance)
    tasks = {}
    if config.tasks:
        reporter.say(f"tasks: {', '.join(config.tasks)}, dense and sparse")
        tasks = run_tasks(
            model,
            tokenizer,
            control,
            config.tasks,
            task_path=config.task_path,
            limit=config.task_limit,
            seed=config.seed,
        )
    return EvalResult(
        model=workspace.source.name,
        dataset=dataset,
        half=half,
        seq_len=config.seq_len,
        dense_prefix=config.prefix,
        allocation=plan.allocation,
        target_sparsity=plan.target_sparsity,
        comparison=comparison,
        tasks=tasks,
        device=device_description(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seed=config.seed,
        versions=library_versions(),
    )


def _half(dataset: str, folder: Path) -> Half:
    """Held-out text: the other half of what calibration read, or all of another dataset."""
    try:
        calibrated_on = str(read_summary(folder).get("calibration", {}).get("dataset", ""))
    except ArtefactError:  # saved again by transformers, which keeps no teal.json: be careful
        return "evaluation"
    return "evaluation" if dataset_identity(dataset) in (calibrated_on, *calibrated_on.split(" + ")) else "all"
