"""Recovery of SmolLM2-135M under thresholds: every arm, its control, two seeds, three texts that were never trained on.

    python benchmarks/corpora.py --out corpora
    python benchmarks/adapt_recover.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt --minutes 9 \\
        --json benchmarks/results/adapt-recover-smollm2-135m.json

A call does as many jobs as fit its minutes, writes the JSON after each, and goes on where the last call ended; a job
that was cut short resumes by itself. `--quick` does every arm on 2,048 tokens, to see that it works.

The arms are those of docs/adapt.md. `dense` is the control: the dense model trained the same way, at sparsity 0. With
the distillation alone it cannot change, since it is its own teacher; with the loss of the text (`text`) it does, and
shows how much of a gain is not recovery.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from adapted_quality import figures_of

import teal_cli
from teal_cli.atomic import write_json
from teal_cli.versions import device_description, library_versions

ARMS: dict[str, dict[str, Any]] = {
    "weights": {"learning_rate": 1e-4},
    "weights, straight-through": {"learning_rate": 1e-4, "options": {"gradient": "straight-through"}},
    "adapters": {"lora": 32, "learning_rate": 5e-4},
    "adapters, straight-through": {"lora": 32, "learning_rate": 5e-4, "options": {"gradient": "straight-through"}},
    "vectors": {"options": {"vectors": True}},
    "weights, text": {"learning_rate": 1e-4, "text_weight": 0.5},
}
CONTROLS = {
    "dense": {"learning_rate": 1e-4, "sparsity": 0.0},
    "dense, text": {"learning_rate": 1e-4, "text_weight": 0.5, "sparsity": 0.0},
}
SPARSITIES = (0.65, 0.5, 0.8)
SEEDS = (0, 1)
MODEL = "smollm2-135m"


def jobs() -> list[tuple[str, float, int]]:
    """Arm, sparsity and seed, the most telling ones first."""
    found = []
    for seed in SEEDS:
        found += [(arm, sparsity, seed) for sparsity in SPARSITIES for arm in ARMS]
        found += [(arm, 0.0, seed) for arm in CONTROLS]
    return found


def main() -> None:
    """Do the jobs that fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="", help="text files besides sotu, comma-separated")
    parser.add_argument("--dataset", default="sotu", help="to train on")
    parser.add_argument("--tokens", type=int, default=3 << 20, help="to train on")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each text")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="arms, or parts of their names, separated by ;")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    small = {"tokens": 2048, "seq_len": 128, "batch_size": 4, "held_out_tokens": 256}
    large = {"tokens": options.tokens, "seq_len": 512, "batch_size": 16, "held_out_tokens": 32768, "evaluate_every": 24}
    size = small if options.quick else large
    shared = {"runs": str(options.runs), "device": options.device, "dataset": options.dataset, "quiet": False, **size}
    texts = {"sotu": {"dataset": "sotu"}} | {Path(p).stem: {"text": p} for p in filter(None, options.text.split(","))}
    content: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "model": MODEL,
        "eval_tokens": options.eval_tokens,
        "size": size,
        "dataset": options.dataset,
        "device": device_description(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": library_versions(),
        "before": [],
        "results": [],
    }
    if options.json.exists():
        earlier = json.loads(options.json.read_text(encoding="utf-8"))
        if (earlier["size"], earlier["dataset"], earlier["model"]) != (size, options.dataset, MODEL):
            raise SystemExit(f"{options.json} is of another size or text: name another file")
        content |= {"before": earlier["before"], "results": earlier["results"]}

    def quality(model: str, **more: Any) -> dict[str, dict[str, float | None]]:
        found = {}
        for name, text in texts.items():
            result = teal_cli.evaluate(
                model, runs=str(options.runs), device=options.device, tokens=options.eval_tokens, **text, **more
            )
            found[name] = figures_of(result)
        return found

    def keep(list_name: str, entry: dict[str, Any]) -> None:
        content[list_name].append(entry)
        write_json(options.json, content)
        ratios = ", ".join(f"{name} {found['perplexity_ratio']:.3f}" for name, found in entry["texts"].items())
        print(f"{entry.get('arm', 'training-free'):28} {entry['sparsity']:.2f} seed {entry.get('seed', 0)}: {ratios}")

    for sparsity in SPARSITIES:
        if all(entry["sparsity"] != sparsity for entry in content["before"]):
            keep("before", {"sparsity": sparsity, "texts": quality(MODEL, sparsity=sparsity)})
    longest = 0.0
    for arm, sparsity, seed in jobs():
        if not any(part in arm for part in options.only.split(";")):
            continue
        if any((e["arm"], e["sparsity"], e["seed"]) == (arm, sparsity, seed) for e in content["results"]):
            continue
        if time.monotonic() + longest > ends:
            break
        began = time.monotonic()
        name = f"{arm.replace(', ', '-')}-{sparsity:.2f}-{seed}"
        own = {**shared, "sparsity": sparsity, **(ARMS | CONTROLS)[arm]}
        summary = teal_cli.adapt_model(MODEL, seed=seed, out=str(options.runs / "adapt-recover" / name), **own)
        record = summary.record
        keep(
            "results",
            {
                "arm": arm,
                "sparsity": sparsity,
                "seed": seed,
                "options": (ARMS | CONTROLS)[arm],
                "tokens": record.tokens,
                "repeats": record.repeats,
                "parameters": record.parameters,
                "seconds": record.seconds,
                "best": record.best,
                "curve": record.curve,
                "texts": quality(summary.folder),
            },
        )
        longest = max(longest, time.monotonic() - began)


if __name__ == "__main__":
    main()
