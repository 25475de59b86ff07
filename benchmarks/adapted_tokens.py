"""Tokens of what `teal adapt` made, beside the dense model that it came from, on a GPU or a CPU.

    python benchmarks/adapted_tokens.py "recover 65 %=runs/smollm2-135m/recover-0.65" .. --out FILE.json

All models are in one process and are timed in turn. A model with an activation of its own runs in `--mode intrinsic`.
What a token takes depends on what it skips, not on how well it is trained. So folders of short runs do, if they skip
as much.
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gate_first_tokens import skip_nothing_
from routed_tokens import Way, engine_of, in_turn, realised

from teal_cli.atomic import write_json
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.loading import pick_device
from teal_cli.steps.prepared import prepare
from teal_cli.versions import device_description, library_versions


def dense_way(options: argparse.Namespace) -> Way:
    """The model that all come from, with nothing skipped."""
    model = load_model(find_model(options.model).folder, device=options.device, dtype=options.dtype)
    skip_nothing_(model)
    return engine_of(model, options), None


def way_of(folder: Path, options: argparse.Namespace) -> tuple[Way, Any]:
    """How it decodes, and a prompt."""
    own = {} if find_model(str(folder)).is_teal_checkpoint else {"mode": "intrinsic"}
    config = BenchConfig(
        model=str(folder), device=options.device, dtype=options.dtype, prompt_tokens=options.prompt_tokens, **own
    )
    prepared = prepare(config, Reporter(quiet=True))
    return (engine_of(prepared.model, options), prepared.plans[0]), prepared.prompt


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of each, and what they leave out."""
    ways: dict[str, Way] = {"dense": dense_way(options)}
    for pair in options.folders:
        name, _, folder = pair.rpartition("=")
        ways[name], prompt = way_of(Path(folder), options)
    shares = {name: realised(way, prompt) for name, way in ways.items() if way[1] is not None}
    in_turn(ways, prompt, options.new_tokens, 1)  # to warm up
    found = []
    for name, (speed, over) in in_turn(ways, prompt, options.new_tokens, options.repeats).items():
        print(f"{name:32} {speed.median:7.1f} ({speed.min:.1f}-{speed.max:.1f}) {over.median:5.2f}x {shares.get(name)}")
        entry = {"what": name, "path": ways[name][0].path.name, "tokens_per_second": asdict(speed)}
        found.append(entry | {"speedup": asdict(over), "realised": shares.get(name)})
    return found


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("folders", nargs="+", help="NAME=FOLDER, of teal adapt")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--model", default="smollm2-135m", help="that they come from")
    found.add_argument("--prompt-tokens", type=int, default=64)
    found.add_argument("--new-tokens", type=int, default=64)
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--device", default="auto")
    found.add_argument("--dtype", default="auto")
    found.add_argument("--path", help="of decoding, by default the engine's choice")
    return found


def main() -> None:
    """Measure and write."""
    options = parser().parse_args()
    quieten_libraries()
    with torch.no_grad():
        runs = measure(options)
    write_json(
        options.out,
        {
            "command": shlex.join(["python", *sys.argv]),
            "device": device_description(pick_device(options.device)),
            "versions": library_versions(),
            "model": options.model,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
