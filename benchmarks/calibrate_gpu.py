"""What sensitivities and allocation cost on a GPU: time and peak memory, random weights.

python benchmarks/calibrate_gpu.py --model llama-3-8b --json calibrate-gpu.json
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from teal_cli.allocation import make_plan
from teal_cli.bench.decode import random_prompt
from teal_cli.calibration.collect import collect
from teal_cli.calibration.sensitivity import measure
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.models.aliases import require_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import build_random_model
from teal_cli.sparse import recalibrate_, sparsify_
from teal_cli.versions import device_description, library_versions

SINK_TOKENS = 4


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
    alias = require_alias(options.model)
    model = build_random_model(alias, device=options.device, dtype="auto", seed=0)
    on_gpu = model.device.type == "cuda"
    steps: dict[str, dict[str, float | None]] = {}

    def timed(name: str, work: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        steps[name] = {"seconds": time.perf_counter() - started, "peak_gb": peak}
        print(name, steps[name], flush=True)
        return result

    projections = find_projections(model, output_layer=None)
    sequences = options.tokens // options.seq_len
    text = random_prompt(int(alias.shape["vocab_size"]), options.seq_len, 1, sequences)
    histograms = timed("histograms", lambda: collect(model, projections, text.split(1), sink_tokens=SINK_TOKENS))
    sensitivities = timed("sensitivities", lambda: measure(model, projections, text.split(1), sink_tokens=SINK_TOKENS))
    info = CalibrationInfo(
        model=alias.name,
        weights="random, seed 0",
        dataset="random tokens",
        tokens=text.numel(),
        seq_len=options.seq_len,
        sink_tokens=SINK_TOKENS,
        seed=1,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        seconds=steps["histograms"]["seconds"] or 0.0,
        sensitivity_tokens=text.numel(),
        sensitivity_seconds=steps["sensitivities"]["seconds"] or 0.0,
    )
    calibration = Calibration(info, projections, histograms, sensitivities)
    plan = timed("allocation fisher", lambda: make_plan(calibration, options.sparsity, "fisher"))
    sparsify_(model, plan)
    timed("propagation", lambda: recalibrate_(model, plan, text, dense_prefix=options.seq_len // 2))
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "calibration": asdict(info),
        "sparsity": options.sparsity,
        "steps": steps,
        "device": device_description(model.device),
        "versions": library_versions(),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
