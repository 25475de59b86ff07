"""What sensitivities and allocation cost on a GPU: time and peak memory, random weights.

python benchmarks/calibrate_gpu.py --model llama-3-8b --json calibrate-gpu.json
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from teal_cli.allocation import make_plan
from teal_cli.bench.decode import random_prompt
from teal_cli.calibration.collect import collect
from teal_cli.calibration.sensitivity import measure
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.models.aliases import Alias, require_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import build_random_model
from teal_cli.sparse import recalibrate_, sparsify_
from teal_cli.versions import device_description, library_versions

SINK_TOKENS = 4


class Steps:
    """Times what is done, and the memory that it takes of the fullest GPU."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float | None]] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives."""
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        started = time.perf_counter()
        result = work()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        peak = max((torch.cuda.max_memory_allocated(gpu) / 1e9 for gpu in gpus), default=None)
        self.found[name] = {"seconds": time.perf_counter() - started, "peak_gb": peak}
        print(name, self.found[name], flush=True)
        return result


def calibrated_(
    model: Any, alias: Alias, steps: Steps, *, tokens: int, seq_len: int, sparsity: float
) -> tuple[SparsityPlan, CalibrationInfo]:
    """Each step from random text to thresholds, which the model has afterwards."""
    projections = find_projections(model, output_layer=None)
    text = random_prompt(int(alias.shape["vocab_size"]), seq_len, 1, tokens // seq_len)
    rows = text.split(1)
    histograms = steps.timed("histograms", lambda: collect(model, projections, rows, sink_tokens=SINK_TOKENS))
    sensitivities = steps.timed("sensitivities", lambda: measure(model, projections, rows, sink_tokens=SINK_TOKENS))
    info = CalibrationInfo(
        model=alias.name,
        weights="random, seed 0",
        dataset="random tokens",
        tokens=text.numel(),
        seq_len=seq_len,
        sink_tokens=SINK_TOKENS,
        seed=1,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        seconds=steps.found["histograms"]["seconds"] or 0.0,
        sensitivity_tokens=text.numel(),
        sensitivity_seconds=steps.found["sensitivities"]["seconds"] or 0.0,
    )
    calibration = Calibration(info, projections, histograms, sensitivities)
    plan = steps.timed("allocation fisher", lambda: make_plan(calibration, sparsity, "fisher"))
    sparsify_(model, plan)
    return steps.timed("propagation", lambda: recalibrate_(model, plan, text, dense_prefix=seq_len // 2)), info


def main() -> None:
    """Time each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    alias, steps = require_alias(options.model), Steps()
    model = build_random_model(alias, device=options.device, dtype="auto", seed=0)
    sizes = {"tokens": options.tokens, "seq_len": options.seq_len}
    _, info = calibrated_(model, alias, steps, **sizes, sparsity=options.sparsity)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "calibration": asdict(info),
        "sparsity": options.sparsity,
        "steps": steps.found,
        "device": device_description(model.device),
        "versions": library_versions(),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
