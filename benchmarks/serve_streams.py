"""Streams through the server beside the same decoding without it, in one process, in turn.

    python benchmarks/serve_streams.py --model smollm2-135m --device cpu --out benchmarks/results/serve-cpu.json
    python benchmarks/serve_streams.py --model llama-3-8b --random-weights --streams 1,2,4 \\
        --out benchmarks/results/serve-gpu.json
    python benchmarks/serve_streams.py --device cpu --dtype float32 --streams 1,2 --speculate lookup+int8 --cpu-time \\
        --out benchmarks/results/serve-speculation-cpu.json

The client is a process of its own, which reads server-sent events. Of streams the speed is that of all together, from
the latest first token to the earliest last one; beside it stands a loop of one sequence, as `teal bench` times it.

With `--speculate`, servers that draft are measured in turn with the one that does not, all dense. Streams then begin
with the prompts of `teal bench --speculate`, another one in each round, since what drafts give depends on the text.

`--cpu-time` measures by the processor time of the process, with one thread: on a machine that others use, what they
take is left out, but for the caches and the memory that all share. The speed of streams is then what the server says of
each, added up.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.timing import Spread
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig, ServeConfig
from teal_cli.console import Reporter
from teal_cli.decode.chat import stop_ids
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.timing import seconds_of
from teal_cli.model_source import find_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.serve.grammars import Grammars
from teal_cli.serve.prompts import Prompts
from teal_cli.serve.server import bind, make_server, run
from teal_cli.serve.service import Served, Service
from teal_cli.sparse import apply_plan_, control_of, use_backend
from teal_cli.speculation import Speculation
from teal_cli.steps.bench_speculation import encoded_prompts
from teal_cli.steps.drafts import speculator_for
from teal_cli.steps.prepared import Prepared, prepare
from teal_cli.versions import device_description, library_versions

CLIENT = Path(__file__).with_name("stream_client.py")
WARM_UP = 8
"""Steps of the loop without a server before the clock, in which kernels are compiled and graphs captured."""


def tokens_per_second(found: list[dict[str, Any]]) -> float:
    """Of all streams together, while all of them decode. An event has a token, or some; the first has one."""
    start, end = max(own["times"][0] for own in found), min(own["times"][-1] for own in found)
    each = (
        sum(start < at <= end for at in own["times"])
        * (own["usage"]["completion_tokens"] - 1)
        / (len(own["times"]) - 1)
        for own in found
    )
    return float(sum(each) / (end - start))


def streamed(port: int, tokens: int, prompts: list[list[int]], level: float, *, cpu_time: bool) -> float:
    """Tokens a second of so many streams, which another process reads."""
    words = [port, tokens, level, json.dumps(prompts)]
    client = subprocess.run(  # noqa: S603 (our own file)
        [sys.executable, str(CLIENT), *map(str, words)], capture_output=True, text=True, check=True
    )
    found = json.loads(client.stdout)
    if cpu_time:
        return float(sum(own["usage"]["teal"]["tokens_per_second"] for own in found))
    return tokens_per_second(found)


def alone(engine: Engine, tokens: int, prompt: list[int], level: float) -> float:
    """Tokens a second of a loop of one sequence, without server and scheduler."""
    control = engine.control
    ids = torch.tensor([prompt], device=engine.device)
    cache = engine.new_cache(len(prompt) + tokens + WARM_UP)
    sampler = Sampler(SamplingConfig(), engine.device)
    with contextlib.nullcontext() if control is None or level > 0 else control.switched_off():
        loop = TokenLoop(engine, cache, sampler.next_token(engine.prefill(ids, cache)), sampler)
        for _ in range(WARM_UP):
            loop.advance()
        return tokens / seconds_of(lambda: [loop.advance() for _ in range(tokens)], engine.device)


def served(prepared: Prepared, engine: Engine, slots: int, drafts: Speculation | None, count: int | None) -> Served:
    """What the server needs of a prepared model."""
    tokenizer = load_tokenizer(find_model("smollm2-135m").folder)
    levels = {plan.target_sparsity: plan for plan in prepared.plans}
    speculator = None if drafts is None else speculator_for(engine, drafts, count, Reporter(), {})[0]
    scheduler = Scheduler(engine, slots=slots, positions=1024, levels=levels, speculator=speculator)
    stop = frozenset[int]() if prepared.name.endswith("(random weights)") else stop_ids(prepared.model, tokenizer)
    return Served(
        name="served",
        scheduler=scheduler,
        prompts=Prompts(tokenizer, None, scheduler.positions),
        decoder=tokenizer,
        grammars=Grammars(tokenizer, 1, stop),
        chat=False,
        tools=None,
        stop=stop,
        intrinsic=False,
        speculates=None if drafts is None else drafts.text,
        close=lambda: None,
    )


class Running:
    """A server of a prepared model, in this process, ready to answer."""

    def __init__(
        self, prepared: Prepared, engine: Engine, slots: int, drafts: Speculation | None, count: int | None
    ) -> None:
        self.name = None if drafts is None else drafts.text
        listening = bind("127.0.0.1", 0)
        self.port = int(listening.getsockname()[1])
        config = ServeConfig(max_new_tokens=900)
        self._service = Service(config, lambda: served(prepared, engine, slots, drafts, count))
        self._server = make_server(self._service, None)
        self._thread = threading.Thread(target=run, args=(self._server, self._service, listening))
        self._thread.start()
        while not self._service.is_ready:
            if self._service.failure is not None:
                raise self._service.failure
            time.sleep(0.05)

    def statistics(self) -> dict[str, int | None]:
        """What was drafted."""
        found = self._service.served.scheduler.statistics()
        tokens = {"drafted_tokens": found.drafted_tokens, "accepted_tokens": found.accepted_tokens}
        return {**tokens, "passes": found.passes, "completion_tokens": found.completion_tokens}

    def close(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    config = BenchConfig(
        model=asked.model,
        runs=asked.runs,
        device=asked.device,
        dtype=asked.dtype,
        sparsity=asked.sparsity,
        random_weights=asked.random_weights,
        prompt_tokens=64,
        threads=1 if asked.cpu_time else None,
    )
    if asked.cpu_time:
        time.perf_counter = time.process_time
    prepared = prepare(config, Reporter())
    model = prepared.model
    apply_plan_(model, prepared.plans[-1])
    use_backend(control_of(model), "auto", model.device, model.dtype)
    if asked.random_weights:  # no tokens that the tokenizer here does not have
        with torch.no_grad():
            model.get_output_embeddings().weight[len(load_tokenizer(find_model("smollm2-135m").folder)) :] = 0
    engine = Engine(model)
    prompt = prepared.prompt[0].tolist()
    counts = [int(count) for count in asked.streams.split(",")]
    kinds = [None, *(Speculation.parse(kind) for kind in asked.speculate.split(",") if kind)]
    of_texts = [ids[0].tolist() for ids in encoded_prompts(load_tokenizer(find_model("smollm2-135m").folder)).values()]
    servers = [Running(prepared, engine, max(counts), kind, asked.draft_tokens) for kind in kinds]
    rows: dict[tuple[float, int, str | None], list[float]] = {}
    levels = [0.0, *(plan.target_sparsity for plan in prepared.plans[-1:] if not asked.speculate)]
    for turn in range(asked.repeats + 1):
        for level in levels:
            rows.setdefault((level, 0, None), []).append(alone(engine, asked.tokens, prompt, level))
            for count in counts:
                prompts = [[*prompt[:-1], prompt[-1] + number] for number in range(count)]
                if len(servers) > 1:
                    prompts = [of_texts[(turn * count + number) % len(of_texts)] for number in range(count)]
                for kind, server in zip(kinds, servers, strict=True):
                    speed = streamed(server.port, asked.tokens, prompts, level, cpu_time=asked.cpu_time)
                    rows.setdefault((level, count, None if kind is None else kind.text), []).append(speed)
    counted = {server.name: server.statistics() for server in servers if server.name is not None}
    for server in servers:
        server.close()
    runs: list[dict[str, Any]] = []
    for (level, count, drafts), values in rows.items():
        first, *timed = values  # the first round warms up
        timed = timed or [first]
        how = {"sparsity": level, "streams": count, "speculate": drafts}
        runs.append({**how, "tokens_per_second": asdict(Spread.of(timed)), "rounds": timed})
        name = f"{count} streams" if count else "no server"
        speed = runs[-1]["tokens_per_second"]["median"]
        print(f"sparsity {level:4}  {name:10} {drafts or '':14} {speed:8.1f} tokens/s")
    for name, found in counted.items():
        print(f"{name}: {found}")
    return {
        "command": shlex.join(["python", "benchmarks/serve_streams.py", *sys.argv[1:]]),
        "model": prepared.name,
        "device": device_description(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "path": engine.path.reported,
        "clock": "processor time, one thread" if asked.cpu_time else "wall",
        "drafts": counted,
        "tokens": asked.tokens,
        "repeats": asked.repeats,
        "versions": library_versions(),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--streams", default="1")
    parser.add_argument("--speculate", default="", help="kinds of drafts, comma-separated")
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    quieten_libraries()
    result = measure(asked)
    if asked.out is not None:
        write_json(asked.out, result)


if __name__ == "__main__":
    main()
