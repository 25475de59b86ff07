"""The three lines that a report starts with: what was run, what it cost, what it bought."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.checkpoint.rules import ROUTED
from teal_cli.config import VERB_CONFIGS
from teal_cli.config_files import keys_of
from teal_cli.config_values import ALLOCATION_NAMES
from teal_cli.report.inputs import Material, Result


@dataclass(frozen=True)
class Line:
    """One of the three."""

    label: str
    text: str


def summary(material: Material) -> list[Line]:
    """What, cost and gain, of the export in focus or of what was measured in its place; each with its figures."""
    quality = _quality(material)
    speed = _speed(material, quality[2] if quality else None)
    cost = _cost(*quality) if quality else f"not measured: {how_to_measure('eval', material)}"
    gain = _gain(*speed) if speed else f"not measured: {how_to_measure('bench', material)}"
    if material.is_encoder:
        gain = "an encoder reads all at once, so that skipped inputs save no time"
    return [Line("What", _what(material)), Line("Cost", cost), Line("Gain", gain)]


def how_to_measure(verb: str, material: Material) -> str:
    """The command that makes what is absent."""
    focus, run = material.focus, material.run
    # A plan that no flag makes (exact zeros, a file of somebody's own) is measured as the checkpoint that has it.
    own = focus is not None and focus.plan.allocation not in ALLOCATION_NAMES and verb in ("eval", "bench")
    model = str(focus.folder) if own and focus is not None else _model_option(material)
    words = ["teal", verb, "--model", model, *([] if own else _quantise_options(material))]
    if not own and focus is not None and "sparsity" in keys_of(VERB_CONFIGS[verb]):
        words += ["--sparsity", f"{focus.plan.target_sparsity:g}", "--allocation", focus.plan.allocation]
    if run is not None and run.parent != Path("runs"):
        words += ["--runs", str(run.parent)]
    if run is not None and verb in ("eval", "bench"):
        words += ["--json", str(run / f"{verb}.json")]
    return shlex.join(words)


def _model_option(material: Material) -> str:
    """What --model was: results tell, their name for it may be that of a folder."""
    given = ((result.content.get("config") or {}).get("model") for result in material.results)
    return next((str(model) for model in given if model), material.model)


def _quantise_options(material: Material) -> list[str]:
    if material.calibration is not None:
        quantization = material.calibration.info.quantization
    else:
        quantization = "" if material.focus is None else material.focus.weights
    scheme = quantization.removesuffix("-output")
    output = ["--quantise-output"] if scheme != quantization else []
    return ["--quantise", scheme.replace("-", ":"), *output] if scheme else []


def _what(material: Material) -> str:
    focus, calibration = material.focus, material.calibration
    if focus is None:
        if any(result.content.get("mode") == "intrinsic" for result in material.results):
            return (
                f"{material.model}, of which decoding skips only the zeros that the model makes itself (mode intrinsic)"
            )
        if calibration is None:
            return f"{material.model}; no export here"
        info = calibration.info
        return f"{info.model}, calibrated on {info.tokens:,} tokens of {info.dataset}; nothing exported yet"
    made = focus.summary.get("calibration", {})
    text = (
        f"{material.model}, which while it decodes reads {focus.plan.target_sparsity:.0%} less of the weights of its "
        f"projections (allocation {focus.plan.allocation})"
    )
    if made:
        what = "routers" if focus.plan.allocation == ROUTED else "thresholds"
        text += f"; {what} from {made['tokens']:,} tokens of {made['dataset']}, measured in {made['dtype']}"
    if focus.quantization is not None:
        text += f"; weights quantised to {focus.quantization['projections']}"
    return text


def _quality(material: Material) -> tuple[Result, dict[str, Any], dict[str, Any]] | None:
    """(eval, run, plan) of the export in focus; where there is none, of the first eval."""
    focus = material.focus
    return next(material.measured() if focus is None else material.evals_of(focus), None)


def _speed(material: Material, sparse: dict[str, Any] | None) -> tuple[Result, dict[str, Any], dict[str, Any]] | None:
    """(bench, dense run, sparse run) at the sparsity whose cost is told; where that was not timed, none."""
    if sparse is not None:
        target, allocation = sparse["target_sparsity"], sparse["allocation"]
    elif material.focus is not None:
        target, allocation = material.focus.plan.target_sparsity, material.focus.plan.allocation
    else:
        target = allocation = None
    for result in material.of_kind("bench"):
        for dense, *others in result.by_weights().values():
            if material.focus is not None and not material.is_of(material.focus, result, dense):
                continue
            for run in others:
                if target is None or (run["sparsity"] == target and run.get("allocation", allocation) == allocation):
                    return result, dense, run
    return None


def _cost(result: Result, run: dict[str, Any], plan: dict[str, Any]) -> str:
    content = result.content
    half = "text that was not calibrated on" if content["half"] == "evaluation" else "another text than calibration's"
    skipped = f"sparsity {plan['realised_sparsity']:.1%} "
    own = plan.get("neuron_sparsity")
    skipped += f"(target {plan['target_sparsity']:.0%})" if own is None else f"({own:.1%} of the MLP neurons are zero)"
    where = f"on {run['tokens']:,} tokens of {content['dataset']} ({half}), with {skipped}"
    if result.kind == "encoder":
        cosine = _with_error(run["cosine"], run["cosine_stderr"])
        return f"cosine between the last hidden states, dense and sparse, {cosine}, {where}"
    ratio = _with_error(run["perplexity_ratio"], run["perplexity_ratio_stderr"])
    dense = run["dense"]
    return (
        f"perplexity {plan['perplexity']:.2f} in place of {dense['perplexity']:.2f}, {ratio} times dense, {where}; "
        f"the first choice is that of the dense model at {plan['top1_agreement']:.1%} of the tokens"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _gain(result: Result, dense: dict[str, Any], sparse: dict[str, Any]) -> str:
    content = result.content
    before, after = dense["tokens_per_second"], sparse["tokens_per_second"]
    text = (
        f"{_speed_text(after)} tokens/s in place of {_speed_text(before)}, "
        f"{after['median'] / before['median']:.2f} times dense, on "
        f"{content['device']} in {content['dtype']} (median of {content['repeats']}, least to most in brackets)"
    )
    if dense["bytes_per_token"] and sparse["bytes_per_token"]:
        read, full = sparse["bytes_per_token"], dense["bytes_per_token"]
        text += f"; {read / 1e6:,.0f} MB of weights read a token in place of {full / 1e6:,.0f}"
    if after["min"] <= before["max"] and before["min"] <= after["max"]:
        text += "; the ranges of the two overlap, so the machine was too busy to tell: time it again"
    return text


def _speed_text(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})"
