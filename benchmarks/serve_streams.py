"""Streams through the server beside the same decoding without it, in one process, in turn.

    python benchmarks/serve_streams.py --model smollm2-135m --device cpu --out benchmarks/results/serve-cpu.json
    python benchmarks/serve_streams.py --model llama-3-8b --random-weights --streams 1,2,4 \\
        --out benchmarks/results/serve-gpu.json

The client is a process of its own, which reads server-sent events. Of streams the speed is that of all together, from
the latest first token to the earliest last one; beside it stands a loop of one sequence, as `teal bench` times it.
"""

import argparse
import contextlib
import http.client
import json
import shlex
import socket
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
from teal_cli.steps.prepared import Prepared, prepare
from teal_cli.versions import device_description, library_versions

WARM_UP = 8
"""Steps of the loop without a server before the clock, in which kernels are compiled and graphs captured."""


def ask(port: int, streams: int, tokens: int, prompt: list[int], level: float) -> None:
    """The client: as many streams at once; prints of each its tokens, and when its events came."""
    found: list[dict[str, Any]] = [{"times": [], "tokens": 0} for _ in range(streams)]

    def one(own: dict[str, Any], number: int) -> None:
        asked = {"model": "served", "prompt": [*prompt[:-1], prompt[-1] + number], "max_tokens": tokens}
        how = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "sparsity": level}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**asked, **how}), headers)
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["usage"] is not None:
                    own["tokens"] = event["usage"]["completion_tokens"]
                elif event["choices"][0]["text"]:
                    own["times"].append(time.perf_counter())

    threads = [threading.Thread(target=one, args=(own, number)) for number, own in enumerate(found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def tokens_per_second(found: list[dict[str, Any]]) -> float:
    """Of all streams together, while all of them decode. An event has a token, or some where the client is behind."""
    start, end = max(own["times"][0] for own in found), min(own["times"][-1] for own in found)
    each = (sum(start < at <= end for at in own["times"]) * own["tokens"] / len(own["times"]) for own in found)
    return float(sum(each) / (end - start))


def streamed(port: int, streams: int, tokens: int, prompt: list[int], level: float) -> float:
    """Tokens a second of so many streams, which another process reads."""
    words = [port, streams, tokens, level, json.dumps(prompt)]
    client = subprocess.run(  # noqa: S603 (this file)
        [sys.executable, __file__, "--ask", *map(str, words)], capture_output=True, text=True, check=True
    )
    return tokens_per_second(json.loads(client.stdout))


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


def served(prepared: Prepared, engine: Engine, slots: int) -> Served:
    """What the server needs of a prepared model."""
    tokenizer = load_tokenizer(find_model("smollm2-135m").folder)
    levels = {plan.target_sparsity: plan for plan in prepared.plans}
    scheduler = Scheduler(engine, slots=slots, positions=1024, levels=levels)
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
        speculates=None,
        close=lambda: None,
    )


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    config = BenchConfig(
        model=asked.model,
        runs=asked.runs,
        device=asked.device,
        dtype=asked.dtype,
        sparsity=asked.sparsity,
        random_weights=asked.random_weights,
        prompt_tokens=64,
    )
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
    listening = bind("127.0.0.1", 0)
    service = Service(ServeConfig(max_new_tokens=900), lambda: served(prepared, engine, max(counts)))
    server = make_server(service, None)
    thread = threading.Thread(target=run, args=(server, service, listening))
    thread.start()
    while not service.is_ready:
        if service.failure is not None:
            raise service.failure
        time.sleep(0.05)
    port = _port(listening)
    rows: dict[tuple[float, int], list[float]] = {}
    for _ in range(asked.repeats + 1):
        for level in [0.0, *(plan.target_sparsity for plan in prepared.plans[-1:])]:
            rows.setdefault((level, 0), []).append(alone(engine, asked.tokens, prompt, level))
            for count in counts:
                rows.setdefault((level, count), []).append(streamed(port, count, asked.tokens, prompt, level))
    server.should_exit = True
    thread.join()
    runs: list[dict[str, Any]] = []
    for (level, count), values in rows.items():
        first, *timed = values  # the first round warms up
        runs.append({"sparsity": level, "streams": count, "tokens_per_second": asdict(Spread.of(timed or [first]))})
        name = f"{count} streams" if count else "no server"
        print(f"sparsity {level:4}  {name:10} {runs[-1]['tokens_per_second']['median']:8.1f} tokens/s")
    return {
        "command": shlex.join(["python", "benchmarks/serve_streams.py", *sys.argv[1:]]),
        "model": prepared.name,
        "device": device_description(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "path": engine.path.reported,
        "tokens": asked.tokens,
        "repeats": asked.repeats,
        "versions": library_versions(),
        "runs": runs,
    }


def _port(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])


def main() -> None:
    if sys.argv[1:2] == ["--ask"]:
        port, streams, tokens, level, prompt = sys.argv[2:]
        ask(int(port), int(streams), int(tokens), json.loads(prompt), float(level))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--streams", default="1")
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
