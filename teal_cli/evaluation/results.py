"""What `teal eval` found, and the JSON that it is kept as."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from teal_cli.data import Half
from teal_cli.evaluation.generation import Agreement
from teal_cli.evaluation.perplexity import Comparison
from teal_cli.evaluation.samples import Sample
from teal_cli.evaluation.similarity import Similarity

Scores = dict[str, dict[str, dict[str, float]]]
"""Harness task -> dense or sparse -> metric -> value."""


@dataclass(frozen=True)
class EvalRun:
    """Quality of one plan after one dense prefix."""

    quantization: str
    """Of the weights, as `ModelConfig.quantisation`; empty where they are not."""
    allocation: str
    target_sparsity: float
    dense_prefix: int
    comparison: Comparison
    bytes_per_token: int
    """Weight bytes that a decoded token reads, at the realised sparsity."""
    dense_bytes_per_token: int
    """The same, with nothing dropped."""
    neuron_sparsity: float | None
    """Of the realised sparsity, the share of MLP neurons that were zero, in mode intrinsic."""
    generation: Agreement | None
    samples: list[Sample]
    """The first of what was written."""
    tasks: Scores

    def to_json(self) -> dict[str, Any]:
        """An entry of `runs`."""
        found = self.comparison
        return {
            "quantization": self.quantization,
            "dense_prefix": self.dense_prefix,
            "tokens": found.tokens,
            "sequences": found.sequences,
            "dense": {**asdict(found.dense), "bytes_per_token": self.dense_bytes_per_token},
            "sparse": {
                **asdict(found.sparse),
                "allocation": self.allocation,
                "target_sparsity": self.target_sparsity,
                "realised_sparsity": found.realised_sparsity,
                "neuron_sparsity": self.neuron_sparsity,
                "kl": found.kl,
                "top1_agreement": found.top1_agreement,
                "bytes_per_token": self.bytes_per_token,
            },
            "perplexity_ratio": found.ratio,
            "perplexity_ratio_stderr": found.ratio_stderr,
            "generation": None if self.generation is None else self._written(self.generation),
            "tasks": self.tasks,
            "realised_by_projection": found.realised_by_projection,
        }

    def _written(self, found: Agreement) -> dict[str, Any]:
        numbers = {key: value for key, value in vars(found).items() if key != "continuations"}
        return {**numbers, "samples": [asdict(sample) for sample in self.samples]}


@dataclass(frozen=True)
class EncoderRun:
    """An encoder's hidden states by one plan."""

    allocation: str
    target_sparsity: float
    similarity: Similarity

    def to_json(self) -> dict[str, Any]:
        """An entry of `runs`."""
        found = asdict(self.similarity)
        realised = found.pop("realised_by_projection")
        return {
            "allocation": self.allocation,
            "target_sparsity": self.target_sparsity,
            **found,
            "realised_by_projection": realised,
        }


@dataclass(frozen=True)
class EncoderResult:
    """How near an encoder stays to its dense self, at one or several sparsities and allocations."""

    model: str
    dataset: str
    half: Half
    seq_len: int
    quantization: str
    """Of the weights, as `ModelConfig.quantisation`; empty where they are not."""
    runs: list[EncoderRun]
    """By allocation, then sparsity, as asked for."""
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal eval --json` for an encoder (docs/formats.md)."""
        return {**asdict(self), "kind": "encoder", "runs": [run.to_json() for run in self.runs]}


@dataclass(frozen=True)
class EvalResult:
    """Quality at one or several sparsities, allocations and dense prefixes."""

    model: str
    dataset: str
    half: Half
    """Which half of the dataset was read; `all` where calibration read another dataset."""
    seq_len: int
    mode: str
    """`calibrated`, or `intrinsic`: only the model's own zeros are skipped."""
    compared_with: str
    """Name of the dense model: `model` itself, or what it was before it was adapted."""
    runs: list[EvalRun]
    """By kind of weights, then allocation, then sparsity, then dense prefix, as asked for."""
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]

    def beside(self, other: "EvalResult") -> "EvalResult":
        """Both as one, of the same model and text with other weights."""
        return replace(self, runs=[*self.runs, *other.runs])

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal eval --json` (docs/formats.md): the first run also stands at the top."""
        plain = {run.dense_prefix: run.comparison.dense.perplexity for run in reversed(self.runs)}
        runs = [
            {**run.to_json(), "over_first_dense": run.comparison.sparse.perplexity / plain[run.dense_prefix]}
            for run in self.runs
        ]
        first = {key: value for key, value in runs[0].items() if key != "realised_by_projection"}
        return {
            "model": self.model,
            "dataset": self.dataset,
            "half": self.half,
            "seq_len": self.seq_len,
            "mode": self.mode,
            "compared_with": self.compared_with,
            "dense_bytes_per_token": self.runs[0].dense_bytes_per_token,
            **first,
            "runs": runs,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "versions": self.versions,
        }
