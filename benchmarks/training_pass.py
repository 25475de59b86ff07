"""What a step of `teal adapt` takes on a GPU, with and without kernels for norms and for the loss.

    python benchmarks/training_pass.py --json benchmarks/results/training-pass-gpu.json

Runs take turns. A step is timed from the 17th on: passes are captured as graphs by then.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from teal_cli.adapt import distil, loop
from teal_cli.api import adapt_model, calibrate
from teal_cli.atomic import write_json
from teal_cli.models.loading import pick_device
from teal_cli.versions import device_description, library_versions

_WARM = 16
"""Steps that are not timed."""
_FUSED = (loop.fused_norms, distil.distils)
FORMS = {
    "by PyTorch": (lambda models: nullcontext(0), lambda logits: False),
    "norms": (_FUSED[0], lambda logits: False),
    "norms and loss": _FUSED,
}


class Stopwatch:
    """Told of each step; `seconds` is the mean of those after the warm ones."""

    def __init__(self, steps: int) -> None:
        self._steps, self._at = steps, [0.0, 0.0]

    def __call__(self, step: int) -> None:
        if step in (_WARM, self._steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._at[step == self._steps] = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of a step."""
        return (self._at[1] - self._at[0]) / (self._steps - _WARM)


def timed(form: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run."""
    watch, rows = Stopwatch(options.steps), options.batch_size * options.seq_len
    loop.fused_norms, distil.distils = FORMS[form]  # type: ignore[assignment]
    added = loop._add

    def told(on_step: Callable[[int], None], before: int, step: int) -> None:
        watch(before + step)
        added(on_step, before, step)

    loop._add = told
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        adapt_model(
            options.model,
            recipe="recover",
            sparsity=0.5,
            allocation="uniform",
            text_weight=1.0,
            tokens=options.steps * rows,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            held_out_tokens=2 * options.seq_len,
            evaluate_every=options.steps,
            runs=str(folder),
            out=str(folder / f"out-{time.monotonic_ns()}"),
            device=options.device,
        )
    finally:
        loop._add = added
        loop.fused_norms, distil.distils = _FUSED
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"step_seconds": watch.seconds, "tokens_per_second": rows / watch.seconds, "most_bytes": memory}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.steps <= _WARM:
        parser.error(f"--steps must be above {_WARM}")
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as place:
        size = {"tokens": 32 * options.seq_len, "seq_len": options.seq_len, "sensitivity_tokens": 4 * options.seq_len}
        calibrate(options.model, runs=place, device=options.device, **size)
        for _ in range(options.repeats):
            for form, of_form in found.items():
                of_form.append(timed(form, options, Path(place)))
                print(f"{form}: {of_form[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    for form, of_form in found.items():
        speeds = [run["tokens_per_second"] for run in of_form]
        print(f"{form}: median {median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})")
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model,
        "size": {"steps": options.steps, "batch_size": options.batch_size, "seq_len": options.seq_len},
        "device": device_description(pick_device(options.device)),
        "versions": library_versions(),
        "runs": found,
    }
    write_json(options.json, content)


if __name__ == "__main__":
    main()
