"""What each of several ranks does in tests: a script that they run, and how a test starts them."""

import json
import os
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
        )
        for rank in range(count)
    ]
    try:
        ends = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, said) in zip(started, ends, strict=True):
        assert process.returncode == 0, said
    found_by_first: dict[str, Any] = json.loads(ends[0][0].splitlines()[-1])
    return found_by_first


def families(folder: Path) -> dict[str, Any]:
    """Of each model in the folder, how far logits are from those of the whole one, or why it is not divided."""
    import torch
    from fused_pair import half_plan, random_tokens

    from teal_cli.decode.engine import Engine
    from teal_cli.errors import TealError, UsageError
    from teal_cli.model_loading import load_model
    from teal_cli.models.loading import outline
    from teal_cli.models.shards import plan_shards
    from teal_cli.ranks.group import join
    from teal_cli.sparse import sparsify_

    ranks = join(int(os.environ["WORLD_SIZE"]), "cpu", 120.0)
    assert ranks is not None
    found: dict[str, Any] = {}
    prompt, tokens = random_tokens(2, 12), random_tokens(2, 5, seed=1)

    def decoded(model: Any, path: str) -> dict[str, Any]:
        control = model.control_in_test
        control.backend = {"fused": "triton", "general": "reference"}[path]
        engine = Engine(model, path=path)
        cache = engine.new_cache(20)
        with control.counting() as counter:
            logits = [engine.prefill(prompt, cache)]
            logits += [engine.step(tokens[:, step : step + 1], cache) for step in range(5)]
        return {"logits": torch.stack(logits), "realised": counter.by_projection(), "wide": counter.model_wide()}

    for own in sorted(folder.iterdir()):
        shares = {"device": "cpu", "dtype": "float32"}
        try:
            model = load_model(own, **shares, ranks=ranks)
        except TealError as error:
            found[own.name] = str(error)
            assert isinstance(error, UsageError), error
            continue
        whole = load_model(own, **shares)
        masks = whole(input_ids=prompt, use_cache=False).logits
        dense = model(input_ids=prompt, use_cache=False).logits
        for each in (model, whole):
            each.control_in_test = sparsify_(each, half_plan(each))
        expected = decoded(whole, "general")
        paths = {"general": decoded(model, "general")}
        if os.environ.get("TRITON_INTERPRET") == "1":
            paths["fused"] = decoded(model, "fused")
        found[own.name] = {
            "dense": error_of(dense, masks),
            **{path: error_of(got["logits"], expected["logits"]) for path, got in paths.items()},
            "realised": {path: got["realised"] == expected["realised"] for path, got in paths.items()},
            "wide": [expected["wide"], *(got["wide"] for got in paths.values())],
            "cuts": len(plan_shards(outline(own), ranks.rank, ranks.count).cuts),
        }
    return found


def error_of(got: Any, expected: Any) -> float:
    """Relative, of norms."""
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    """Do the task that was asked for; the first rank prints what it found."""
    import torch

    with torch.no_grad():
        found = globals()[sys.argv[1]](Path(sys.argv[2]))
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
