"""Tensor parallel decoding on the GPUs of one host, beside one of them in turn.

    python benchmarks/tensor_parallel.py --ranks 2 --out benchmarks/results/tensor-parallel.json

Random weights of the models' shapes, thresholds calibrated on them. For each case the first GPU holds the whole model
too, where it has room, and dense and sparse steps of both are timed in turn. Beside that: a sum over ranks by each way
that there is, and what all sums take of a token, which is the time of a token with them less that without.

    --cases NAME,..   of `CASES`, by default all; they join those that the file has, or take their place
    --tune            first find tile configs for the products of the shards, on one GPU
    --device cpu      with --layers and --cases, to try the script out
"""

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.decode.timing import seconds_of
from teal_cli.errors import TealError
from teal_cli.models.aliases import Alias, require_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import outline
from teal_cli.models.random_weights import residual_scale
from teal_cli.models.shards import plan_shards
from teal_cli.planning import allocate
from teal_cli.quantise.model import pack_
from teal_cli.ranks.environment import end_with_launcher, is_first, is_rank
from teal_cli.ranks.group import Ranks, join, leave
from teal_cli.ranks.workers import run_workers
from teal_cli.schemes import Scheme
from teal_cli.shard_loading import join_, random_shard
from teal_cli.sparse import apply_plan_, control_of, recalibrate_, replace_projections_
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.steps.bench import measure
from teal_cli.steps.prepared import prepare_random
from teal_cli.versions import device_description, library_versions
from teal_kernels.packing import Packed

SPARSITY = 0.5
PROMPT, NEW_TOKENS = 64, 64
SEQUENCES, SEQ_LEN, SINK_TOKENS = 4, 128, 4
PEER_SECONDS = 480.0
Measured = tuple[Engine, SparsityPlan]
_REPLAYS = 50


@dataclass(frozen=True)
class Case:
    """A model, the width of its weights, and whether one GPU holds it as well."""

    model: str
    scheme: Scheme | None
    alone: bool


CASES = {
    "llama-3-8b": Case("llama-3-8b", None, True),
    "llama-3-70b": Case("llama-3-70b", None, False),
    "llama-3-70b-int4": Case("llama-3-70b", Scheme.parse("int4"), True),
    "smollm2": Case("smollm2-135m", None, True),
    "smollm2-int4": Case("smollm2-135m", Scheme.parse("int4:64"), True),
}
DEFAULT = ("llama-3-8b", "llama-3-70b-int4", "llama-3-70b")


def alias_of(case: Case, layers: int | None) -> Alias:
    """The case's shape, of fewer blocks where asked."""
    alias = require_alias(case.model)
    return alias if layers is None else replace(alias, shape={**alias.shape, "num_hidden_layers": layers})


def random_codes(inputs: int, outputs: int, scheme: Scheme, device: torch.device, deviation: float) -> Packed:
    """Random weights of a deviation: a 70B has no room in 16 bits, from which codes could be made."""
    group = scheme.group_of(inputs)
    words = torch.randint(-(1 << 31), 1 << 31, (inputs, outputs * scheme.bits // 32), device=device)
    shape = (-(-inputs // group), outputs)
    scales = torch.full(shape, deviation / (16**2 / 12) ** 0.5, dtype=torch.float16, device=device)
    zeros = torch.full(shape, 7.5, dtype=torch.float16, device=device)
    return Packed(words.to(torch.int32), scales, zeros, scheme.bits, group, (outputs,))


@torch.no_grad()
def prepared(case: Case, alias: Alias, ranks: Ranks, reporter: Reporter) -> Measured:
    """A model with random weights that ranks share, or that one rank has alone, and its plan."""
    plan = plan_shards(outline(alias), ranks.rank, ranks.count, group=0 if case.scheme is None else case.scheme.group)
    model = random_shard(alias, plan, ranks.device, dtype="auto", seed=0, projections=case.scheme is None)
    if ranks.count > 1:
        ranks.copy_of_first_(model.get_input_embeddings().weight.data)
        join_(model, plan, ranks)
    projections = find_projections(model, output_layer=None)
    control = replace_projections_(model, [projection.name for projection in projections])
    if case.scheme is not None:
        summed = 0.02 * residual_scale(model.config.num_hidden_layers)
        packs = {
            p.name: random_codes(
                p.in_features, p.out_features, case.scheme, ranks.device, summed if p.name in plan.sums else 0.02
            )
            for p in projections
            if not p.is_output
        }
        pack_(model, packs)
    vocabulary = int(model.config.vocab_size)
    text = random_prompt(vocabulary, SEQ_LEN, 1, SEQUENCES)
    with control.dense():
        histograms = collect(model, projections, text.split(1), sink_tokens=SINK_TOKENS)
    info = CalibrationInfo(
        model=case.model,
        weights="random, seed 0",
        dataset="random tokens",
        tokens=text.numel(),
        seq_len=SEQ_LEN,
        sink_tokens=SINK_TOKENS,
        seed=0,
        dtype=str(model.dtype).removeprefix("torch."),
        device=ranks.device.type,
        seconds=0.0,
    )
    calibration = Calibration(info, projections, histograms, {})
    half = allocate(BenchConfig(allocation="uniform"), calibration, SPARSITY, "uniform")
    half = recalibrate_(model, half, text, dense_prefix=SEQ_LEN // 2)
    apply_plan_(model, half)
    engine = Engine(model)
    for line in engine.path.notes:
        reporter.say(f"{case.model} on {ranks.count}: {line}")
    return engine, half


def timed_in_turn(
    together: Measured, alone: Measured | None, ranks: Ranks, repeats: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Tokens/s dense and sparse of all ranks, and of the one that holds the model alone while the others wait."""
    prompt = random_prompt(int(together[0].model.config.vocab_size), PROMPT, 0, 1)

    def speeds(measured: Measured) -> list[float]:
        engine, plan = measured
        return [NEW_TOKENS / decode_seconds(engine, kind, prompt, NEW_TOKENS) for kind in (None, plan)]

    of_all, of_one = [], []
    for _ in range(repeats + 1):
        of_all.append(speeds(together))
        of_one.append([0.0, 0.0] if alone is None else speeds(alone))
        ranks.wait()
    return [list(column) for column in zip(*of_all[1:], strict=True)], [
        list(column) for column in zip(*of_one[1:], strict=True)
    ]


@torch.no_grad()
def realised(engine: Engine, plan: SparsityPlan) -> tuple[float, int]:
    """Realised sparsity of some steps, over all ranks, and bytes a token."""
    control = control_of(engine.model)
    prompt = random_prompt(int(engine.model.config.vocab_size), PROMPT, 0, 1)
    with control.counting() as counter:
        decode_seconds(engine, plan, prompt, NEW_TOKENS // 4)
    found = counter.by_projection()
    return counter.model_wide() or 0.0, weight_bytes_per_token(engine.model, found)


@torch.no_grad()
def microseconds_of_sums(engine: Engine, ranks: Ranks) -> float | None:
    """What a sum takes of a dense token: all launches in a graph, less all but those of the sums, over their number."""
    if ranks.device.type != "cuda":
        return None
    control = control_of(engine.model)
    with control.switched_off():
        cache = engine.new_cache(PROMPT + _REPLAYS + 8)
        engine.prefill(random_prompt(1000, PROMPT, 0, 1).to(ranks.device), cache)
        session = engine.open(cache)
        if not isinstance(session, FusedSession):
            return None
        every = session._steps
        others = [step for step in every if not _is_sum(step)]
        count = sum(_name(step) == "sum_ranks" for step in every)

        def seconds(steps: list[Callable[[], object]]) -> float:
            session._steps = steps
            session.move([PROMPT - 1])
            session.launch()
            torch.cuda.synchronize(ranks.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                session.launch()
            session.move([PROMPT - 1])
            ranks.wait()
            return ranks.longest(seconds_of(lambda: replay(graph), ranks.device) / _REPLAYS)

        def replay(graph: torch.cuda.CUDAGraph) -> None:
            for _ in range(_REPLAYS):
                graph.replay()

        pairs = [(seconds(every), seconds(others)) for _ in range(3)]
    with_sums, without = (float(sorted(column)[1]) for column in zip(*pairs, strict=True))
    return (with_sums - without) / count * 1e6


def _name(step: Any) -> str:
    return str(getattr(getattr(step, "func", step), "__name__", ""))


def _is_sum(step: Any) -> bool:
    return _name(step) in ("sum_ranks", "sum_", "one_shot")


def run_case(name: str, layers: int | None, ranks: Ranks, repeats: int, reporter: Reporter) -> dict[str, Any]:
    """One case, as JSON."""
    case = CASES[name]
    alias = alias_of(case, layers)
    together = prepared(case, alias, ranks, reporter)
    alone = None
    if case.alone and ranks.rank == 0:
        alone = prepared(case, alias, replace(ranks, rank=0, count=1), reporter)
    ranks.wait()
    model = together[0].model
    share, size = realised(*together)
    sums = microseconds_of_sums(together[0], ranks)
    if sums is not None:
        reporter.say(f"{name}: a sum takes {sums:.1f} us of a token")
    of_all, of_one = timed_in_turn(together, alone, ranks, repeats)
    plan = plan_shards(outline(alias), 0, ranks.count, group=0 if case.scheme is None else case.scheme.group)
    runs: list[dict[str, Any]] = []
    for sparsity, ours, theirs in zip((0.0, SPARSITY), of_all, of_one, strict=True):
        over = None if alone is None else asdict(Spread.of_ratios(ours, theirs))
        entry: dict[str, Any] = {
            "gpus": ranks.count,
            "sparsity": sparsity,
            "tokens_per_second": asdict(Spread.of(ours)),
        }
        runs.append({**entry, "over_one_gpu": over})
        if alone is not None:
            runs.append({**entry, "gpus": 1, "tokens_per_second": asdict(Spread.of(theirs)), "over_one_gpu": None})
    if (because := together[0].general_because) is not None:
        reporter.say(f"{name}: the general path decoded: {because}")
    for run in runs:
        speed, over = run["tokens_per_second"], run["over_one_gpu"]
        times = f", {over['median']:.2f} times one GPU" if over is not None else ""
        reporter.say(f"{name}, {run['gpus']} GPUs, sparsity {run['sparsity']}: {speed['median']:.1f} tokens/s{times}")
    return {
        "case": name,
        "model": case.model,
        "weights": case.scheme.name if case.scheme else str(model.dtype).removeprefix("torch."),
        "layers": int(model.config.num_hidden_layers),
        "hidden_size": int(model.config.hidden_size),
        "ranks": ranks.count,
        "path": together[0].path.reported,
        "general_because": because,
        "heads": plan.heads[1] - plan.heads[0],
        "neurons": sum(stop - start for start, stop in plan.neurons.values()),
        "realised_sparsity": share,
        "bytes_per_token": size,
        "sums": together[0].path.notes,
        "sum_microseconds_in_token": sums,
        "memory_bytes": torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else None,
        "runs": runs,
    }


def tune_shards(name: str, layers: int | None, count: int, reporter: Reporter) -> None:
    """Find tile configs for the products of one rank's shard, on one GPU: they are kept for every later command."""
    case = CASES[name]
    alias = alias_of(case, layers or 4)
    plan = plan_shards(outline(alias), 0, count, group=0 if case.scheme is None else case.scheme.group)
    shape = {
        **alias.shape,
        "num_attention_heads": plan.heads[1] - plan.heads[0],
        "num_key_value_heads": plan.kv_heads[1] - plan.kv_heads[0],
        "intermediate_size": sum(stop - start for start, stop in plan.neurons.values()),
        "head_dim": plan.head_size,
        "vocab_size": plan.width,
    }
    from teal_cli.models.loading import build_random_model

    config = BenchConfig(
        model=case.model,
        random_weights=True,
        sparsity=[SPARSITY],
        quantise=case.scheme,
        kernels=True,
        tune=True,
        repeats=1,
        device="cuda",
        dtype="bfloat16",
    )
    shard = replace(alias, shape=shape)
    model = build_random_model(shard, device="cuda", dtype="bfloat16", seed=0)
    measure(config, prepare_random(config, f"a shard of {case.model}", model), reporter)


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(DEFAULT))
    parser.add_argument("--layers", type=int, help="fewer blocks than the models have")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--logs", help="folder for what the other ranks print")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tensor-parallel.json"))
    arguments = parser.parse_args()
    quieten_libraries()
    reporter = Reporter(quiet=not is_first())
    if not is_rank():
        for name in arguments.cases if arguments.tune else ():
            tune_shards(name, arguments.layers, arguments.ranks, reporter)
            gc.collect()
            torch.cuda.empty_cache()
        try:
            sys.exit(run_workers(arguments.ranks, sys.argv, arguments.logs))
        except TealError as error:
            sys.exit(f"{error}")
    end_with_launcher()
    ranks = join(arguments.ranks, arguments.device, PEER_SECONDS)
    if ranks is None:
        raise SystemExit("--ranks 1 is what gpu_decode.py measures")
    command = shlex.join(["python", *sys.argv])
    result: dict[str, Any] = {
        "device": device_description(ranks.device),
        "versions": library_versions(),
        "ranks": ranks.count,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "repeats": arguments.repeats,
        "random_weights": True,
        "cases": [],
    }
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        if any(earlier[key] != value for key, value in result.items() if key != "cases"):
            raise SystemExit(f"{arguments.out} is of another device, version or size: name another file")
        result["cases"] = [case for case in earlier["cases"] if case["case"] not in arguments.cases]
    for name in arguments.cases:
        with nullcontext() if ranks.device.type == "cpu" else torch.cuda.device(ranks.device):
            found = run_case(name, arguments.layers, ranks, arguments.repeats, reporter)
        result["cases"].append({"command": command, **found})
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if is_first():
            write_json(arguments.out, result)
    leave()


if __name__ == "__main__":
    main()
