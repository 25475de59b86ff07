"""Streams of the scheduler beside batches of `teal bench`, and a conversation's time to its next reply.

    python benchmarks/streams.py --out benchmarks/results/streams-gpu.json --model llama-3-8b --random-weights
    python benchmarks/streams.py --out benchmarks/results/streams-cpu.json --model smollm2-135m --device cpu

One process, in turn. Of streams the speed while all of them decode, from their eighth token on; a batch of as many
rows is `teal bench --batch`. Of the conversation the seconds from a turn's prompt to its first token, with what is
kept of the turns before and without.

    --rows 1,2,4,8   how many streams
    --turn 0         no conversation
    --trace FOLDER   on a GPU: a trace of some steps of streams, and of a batch, for each number of rows
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.prompts import Keep
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.sparse import apply_plan_
from teal_cli.steps.prepared import Prepared, prepare
from teal_cli.versions import device_description, library_versions

PROMPT = 128
WARM_UP = 8
"""Tokens of each stream before the clock and behind it: as streams come and go, graphs of other numbers of rows are
captured."""
TRACED = 24
"""Tokens of each stream in a trace."""
TURNS = 5


def streams(scheduler: Scheduler, prompts: list[tuple[int, ...]], tokens: int, level: float) -> float:
    """Tokens a second of all streams together, while all decode."""
    times: list[list[float]] = [[] for _ in prompts]
    errors: list[str] = []

    def heard(own: list[float], emitted: Emitted) -> None:
        own.append(time.perf_counter())
        if emitted.error is not None:
            errors.append(emitted.error)

    loop = Thread(target=scheduler.run)
    for prompt, own in zip(prompts, times, strict=True):
        request = Request(prompt, tokens + 2 * WARM_UP, sparsity=level)
        scheduler.submit(request, lambda emitted, own=own: heard(own, emitted))  # type: ignore[misc]
    scheduler.stop()
    loop.start()
    loop.join()
    if errors:
        raise SystemExit(errors[0])
    start, end = max(own[WARM_UP - 1] for own in times), min(own[-WARM_UP] for own in times)
    return sum(1 for own in times for at in own if start < at <= end) / (end - start)


def conversation(engine: Engine, turn: int, reply: int, vocabulary: int) -> list[float]:
    """Seconds to the first token of each turn."""
    prompt: list[int] = []
    seconds = []
    for number in range(TURNS):
        prompt += random_prompt(vocabulary, turn, number)[0].tolist()
        start = time.perf_counter()
        found: list[int] = []
        for token in engine.generate(torch.tensor([prompt]), max_new_tokens=reply, sampling=SamplingConfig()):
            if not found:
                seconds.append(time.perf_counter() - start)
            found.append(token)
        prompt += found
    return seconds


def talk(engine: Engine, plan: SparsityPlan, arguments: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Time to the first token of each turn, by what is kept of the turns before."""
    model, repeats = engine.model, arguments.repeats
    apply_plan_(model, plan)
    keeps: tuple[Keep, ...] = ("nothing", "prompts", "replies")
    turns: dict[str, list[list[float]]] = {keep: [] for keep in keeps}
    for repeat in range(repeats + 1):
        for keep in keeps:
            found_turns = conversation(Engine(model, keep=keep), arguments.turn, arguments.turn, vocabulary)
            if repeat > 0:
                turns[keep].append(found_turns)
    medians = {
        keep: [statistics.median(column) for column in zip(*found, strict=True)] for keep, found in turns.items()
    }
    for kept, seconds in medians.items():
        shown = ", ".join(f"{value * 1e3:.0f}" for value in seconds)
        print(f"keeps {kept}: milliseconds to the first token of turns 1 to {TURNS}: {shown}", flush=True)
    return {
        "tokens_of_a_turn": arguments.turn,
        "tokens_of_a_reply": arguments.turn,
        "first_token_seconds": medians,
        "fifth_turn_over_nothing_kept": {keep: medians[keep][-1] / medians["nothing"][-1] for keep in keeps},
    }


def trace(path: Path, work: Callable[[], object]) -> None:
    """A trace of what the device does meanwhile, for chrome://tracing; the kernels that take longest are printed."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        work()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=12, max_name_column_width=60))


def measure(prepared: Prepared, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    model, plan = prepared.model, prepared.plans[0]
    vocabulary, level = int(model.config.get_text_config().vocab_size), plan.target_sparsity
    tokens, repeats = arguments.new_tokens, arguments.repeats
    engine = Engine(model)
    positions = PROMPT + max(tokens, TRACED) + 2 * WARM_UP
    new_scheduler = partial(Scheduler, engine, slots=8, positions=positions, levels={level: plan})
    rows = []
    for count in arguments.rows:
        batch = random_prompt(vocabulary, PROMPT, 0, batch=count)
        prompts = [tuple(own) for own in batch.tolist()]
        speeds: dict[str, list[float]] = {"batch": [], "streams": [], "streams dense": [], "batch dense": []}
        for repeat in range(repeats + 1):
            found = {
                "batch dense": count * tokens / decode_seconds(engine, None, batch, tokens),
                "batch": count * tokens / decode_seconds(engine, plan, batch, tokens),
            }
            found["streams"] = streams(new_scheduler(), prompts, tokens, level)
            found["streams dense"] = streams(new_scheduler(), prompts, tokens, 0.0)
            if repeat > 0:
                for name, value in found.items():
                    speeds[name].append(value)
        if arguments.trace is not None:
            trace(arguments.trace / f"streams-{count}.json", partial(streams, new_scheduler(), prompts, TRACED, level))
            trace(arguments.trace / f"batch-{count}.json", partial(decode_seconds, engine, plan, batch, TRACED))
        spreads = {name: asdict(Spread.of(values)) for name, values in speeds.items()}
        ratio = statistics.median(speeds["streams"]) / statistics.median(speeds["batch"])
        rows.append({"rows": count, "tokens_per_second": spreads, "streams_over_batch": ratio})
        shown = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in speeds.items())
        print(f"{count} rows: {shown}; streams over batch {ratio:.3f}", flush=True)
    talked = talk(engine, plan, arguments, vocabulary) if arguments.turn else None
    return {
        "path": engine.path.name,
        "sparsity": level,
        "new_tokens": tokens,
        "streams": rows,
        "conversation": talked,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--turn", type=int, default=400, help="tokens of a turn's prompt, and of its reply")
    arguments = parser.parse_args()
    quieten_libraries()
    config = BenchConfig(
        model=arguments.model,
        random_weights=arguments.random_weights,
        sparsity=[arguments.sparsity],
        prompt_tokens=PROMPT,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    prepared = prepare(config, Reporter())
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "device": device_description(prepared.model.device),
        "versions": library_versions(),
        **measure(prepared, arguments),
    }
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
