"""What each of several ranks does in tests: a script that they run, and how a test starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

COUNT = 2


def run_ranks(task: str, folder: Path, *, count: int = COUNT, timeout: float = 900.0, **extra: str) -> dict[str, Any]:
    """Have so many processes do a task of this module on the models of a folder; what the first one found.

    Raises:
        AssertionError: one failed; with what it printed.
    """
    with __import__("socket").socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    tests = Path(__file__).parent
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": os.pathsep.join([str(tests), str(tests / "decode"), *sys.path])}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, task, str(folder)],
            env={**os.environ, **path, **shared, **extra, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(1 if extra.get("TEAL_TEST_DEVICE", "cpu") == "cpu" else count)
    ]
    try:
        ends = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, (_, said) in zip(started, ends, strict=True):
        assert process.returncode == 0, said
    found_by_first: dict[str, Any] = json.loads(ends[0][0].splitlines()[-1])
    return found_by_first


def fork_others() -> list[int]:
    """On a CPU the first rank forks the others, which then need not import torch again: half of a short task.

    Returns:
        Their process ids, in the first rank.
    """
    import fused_pair  # noqa: F401  (with all of teal_cli behind it)

    started = []
    for rank in range(1, int(os.environ["WORLD_SIZE"])):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return []
        started.append(child)
    return started


def own_ranks(seconds: float = 120.0) -> Any:
    """The ranks of this process, on the device that the test named."""
    from teal_cli.ranks.group import join

    ranks = join(int(os.environ["WORLD_SIZE"]), os.environ.get("TEAL_TEST_DEVICE", "cpu"), seconds)
    assert ranks is not None
    return ranks


def families(folder: Path) -> dict[str, Any]:
    """Of each model in the folder, how far logits are from those of the whole one, or why it is not divided."""
    import pytest
    import torch
    from fused_pair import half_plan, random_tokens, use_small_tiles

    from teal_cli.decode.engine import Engine
    from teal_cli.decode.sampling import SamplingConfig
    from teal_cli.errors import TealError
    from teal_cli.model_loading import load_model
    from teal_cli.models.loading import outline
    from teal_cli.models.shards import plan_shards
    from teal_cli.sparse import sparsify_

    ranks = own_ranks()
    found: dict[str, Any] = {}
    prompt, tokens = (random_tokens(2, 12).to(ranks.device), random_tokens(2, 5, seed=1).to(ranks.device))
    interpreted = os.environ.get("TEAL_TEST_FUSED", "").split(",")
    if interpreted != [""]:
        use_small_tiles(pytest.MonkeyPatch())

    def decoded(model: Any, path: str) -> dict[str, Any]:
        control = model.control_in_test
        control.backend = {"fused": "triton", "general": "reference"}[path]
        engine = Engine(model, path=path)
        cache = engine.new_cache(20)
        with control.counting() as counter:
            logits = [engine.prefill(prompt, cache)]
            logits += [engine.step(tokens[:, step : step + 1], cache) for step in range(5)]
        return {"logits": torch.stack(logits), "realised": counter.by_projection(), "wide": counter.model_wide()}

    def greedy(model: Any, path: str) -> list[int]:
        model.control_in_test.backend = {"fused": "triton", "general": "reference"}[path]
        return list(Engine(model, path=path).generate(prompt[:1], max_new_tokens=8, sampling=SamplingConfig()))

    for own in sorted(folder.iterdir()):
        shares = {"device": ranks.device.type, "dtype": "float32"}
        try:
            model = load_model(own, **shares, ranks=ranks)
        except TealError as error:
            found[own.name] = str(error)
            continue
        dense = model(input_ids=prompt, use_cache=False).logits
        model.control_in_test = sparsify_(model, half_plan(model))
        ways = ["general", *(["fused"] if ranks.device.type == "cuda" or own.name in interpreted else [])]
        if ranks.rank != 0:  # the first compares with the whole model
            for work in (decoded, greedy):
                for way in ways:
                    work(model, way)
            continue
        whole = load_model(own, **shares)
        masks = whole(input_ids=prompt, use_cache=False).logits
        whole.control_in_test = sparsify_(whole, half_plan(whole))
        expected = decoded(whole, "general")
        paths = {way: decoded(model, way) for way in ways}
        found[own.name] = {
            "dense": error_of(dense, masks),
            **{path: error_of(got["logits"], expected["logits"]) for path, got in paths.items()},
            "realised": {path: got["realised"] == expected["realised"] for path, got in paths.items()},
            "wide": [expected["wide"], *(got["wide"] for got in paths.values())],
            "cuts": len(plan_shards(outline(own), ranks.rank, ranks.count).cuts),
            "texts": [greedy(whole, "general"), *(greedy(model, way) for way in ways)],
        }
    return found


def sums(folder: Path) -> dict[str, Any]:
    """Sums by each way that there is, three a turn, in a graph on a GPU: their bits on all ranks, and what they are."""
    import torch

    from teal_cli.decode.paths.fused_ranks import Summed, measure_sums
    from teal_kernels.triton_ranks import squares_of_sum

    ranks = own_ranks()
    size, width = 1000, 300
    times = measure_sums(ranks, size, torch.bfloat16, ranks.device.type == "cuda")
    found: dict[str, Any] = {"microseconds": times.microseconds, "line": times.line}
    parts = [torch.randn(2, size, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks.count)]
    mine = parts[ranks.rank].to(ranks.device, torch.bfloat16)
    for name in times.ways:
        way = times.ways[name](ranks, 2, times.pdl)
        way.begin(3, size, width)
        own, stream = way.buffer(size, torch.bfloat16), torch.zeros(2, size, dtype=torch.bfloat16, device=ranks.device)
        squares = torch.zeros(2, squares_of_sum(size), device=ranks.device)
        logits, of_all = (torch.zeros(2, columns, device=ranks.device) for columns in (width, 2 * width - 1))
        logits.fill_(float(ranks.rank))
        steps = [step for _ in range(3) for step in way.sum(own, Summed(stream, True, 1.0, squares))]
        per_sum = len(steps) // 3
        gather = way.gather(logits, of_all)

        def run() -> None:
            for nth, step in enumerate(steps):  # noqa: B023  (it is called before the next way)
                if nth % per_sum == 0:  # noqa: B023
                    own.copy_(mine)  # noqa: B023
                step()
            for step in gather:  # noqa: B023
                step()

        turns, graph = [], None
        for turn in range(6):
            stream.zero_()
            if turn == 1 and ranks.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    run()
            run() if graph is None else graph.replay()
            turns.append((stream.clone(), squares.clone(), of_all.clone()))
        everywhere = ranks.gathered(turns[0][0].float().flatten()).view(ranks.count, -1)
        expected = 3 * torch.stack([part.bfloat16().float() for part in parts]).sum(0)
        found[name] = {
            "error": error_of(turns[0][0].cpu().float(), expected),
            "repeats": all(torch.equal(a, b) for turn in turns[1:] for a, b in zip(turn, turns[0], strict=True)),
            "alike": bool((everywhere == everywhere[0]).all()),
            "squares": error_of(turns[0][1].sum(1), turns[0][0].float().square().sum(1)),
            "gathered": [float(of_all[1, 0]), float(of_all[1, width]), float(of_all[1, -1])],
        }
    return found


def silent(folder: Path) -> dict[str, Any]:
    """The last rank stops to answer: how long another waits, and what it says."""
    import time

    import torch

    from teal_cli.decode.paths.fused_ranks import Summed, measure_sums

    ranks = own_ranks(float(os.environ.get("TEAL_TEST_SECONDS", "5")))
    times = measure_sums(ranks, 256, torch.float32, ranks.device.type == "cuda")
    way = times.ways.get("inboxes", next(iter(times.ways.values())))(ranks, 1, times.pdl)
    way.begin(2, 256, 256)
    own, y = way.buffer(256, torch.float32), torch.zeros(1, 256, device=ranks.device)
    steps = way.sum(own, Summed(y))
    done = folder / "done"
    if ranks.rank == ranks.count - 1:
        end = time.monotonic() + 60
        while time.monotonic() < end and not done.exists():
            time.sleep(0.1)
        os._exit(0)
    started, said = time.monotonic(), ""
    try:
        for step in steps:
            step()
        y.sum().item()
    except Exception as error:  # of a GPU whose kernel gave up, or of Gloo
        said = str(error).splitlines()[0]
    print(json.dumps({"seconds": time.monotonic() - started, "said": said}), flush=True)
    done.touch()
    os._exit(0)


def error_of(got: Any, expected: Any) -> float:
    """Relative, of norms."""
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    """Do the task that was asked for; the first rank prints what it found."""
    import torch

    from teal_cli.ranks.group import leave

    others = fork_others() if os.environ.get("TEAL_TEST_DEVICE", "cpu") == "cpu" else []
    with torch.no_grad():
        found = globals()[sys.argv[1]](Path(sys.argv[2]))
    leave()  # a process that ends with Gloo's threads at work is aborted now and then
    if os.environ["RANK"] == "0":
        assert all(os.waitpid(child, 0)[1] == 0 for child in others), "another rank failed"
        print(json.dumps(found))


if __name__ == "__main__":
    main()
