"""Tokens of models whose MLPs are routed, beside dense ones and beside gate first, on a GPU or a CPU.

    python benchmarks/routed_tokens.py --out benchmarks/results/routed-tokens-gpu.json [--rows 1,4]

Random weights of Llama-2-7B's and Mistral-7B's shapes, SiLU as they have it, and random routers that leave out a share
of the groups. Gate first has the same shape with FATReLU, whose thresholds leave the same share of neurons dead: it
reads all of the gate, and needs no router.

For each share, ways in turn: dense on ordinary tables; routed, every neuron computed; routed; gate first.
"""

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gate_first_tokens import leave_dead_, skip_nothing_
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Routed
from teal_cli.cli.output import quieten_libraries
from teal_cli.decode.engine import Engine
from teal_cli.models.aliases import Alias, require_alias
from teal_cli.models.loading import build_random_model
from teal_cli.sparse import control_of, make_intrinsic_, neuron_sparsity, sparsify_
from teal_cli.sparse.routing import plan_of_routers, set_random_routers_
from teal_cli.versions import device_description, library_versions

PROMPT = 128
Way = tuple[Engine, SparsityPlan | None]


class _Unchecked(Engine):
    """Without the check before the first token: a group whose logit is near zero may be there or not, by rounding, and
    with random weights there is one in every block."""

    def check(self, prompt: Tensor) -> None:
        """Nothing."""


def _build(alias: Alias, options: argparse.Namespace, **changes: object) -> Any:
    shape = {**alias.shape, **changes}
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    return build_random_model(replace(alias, shape=shape), device=options.device, dtype=options.dtype, seed=0)


def engine_of(model: Any, options: argparse.Namespace) -> Engine:
    """On the path that the engine takes by itself, unless one was named."""
    return _Unchecked(model, path=options.path) if options.path else _Unchecked(model)


@torch.no_grad()
def ways_of(alias: Alias, share: float, options: argparse.Namespace) -> dict[str, Way]:
    """Engines and plans, by name."""
    ordinary = _build(alias, options)
    ids = random_prompt(int(ordinary.config.vocab_size), PROMPT, 1).to(ordinary.device)
    skip_nothing_(ordinary)
    routed = _build(alias, options)
    plan = plan_of_routers(routed, Routed(options.group, options.rank, share))
    sparsify_(routed, plan)
    set_random_routers_(routed, ids, share)
    gated = _build(alias, options, hidden_act="fatrelu", hidden_act_param=0.0)
    zeros = make_intrinsic_(gated)
    leave_dead_(gated, ids, share)
    engines = [engine_of(model, options) for model in (ordinary, routed, gated)]
    print(f"{alias.name}, {share:.0%}: paths {[engine.path.name for engine in engines]}", flush=True)
    return {
        "dense": (engines[0], None),
        "routed, all computed": (engines[1], None),
        "routed": (engines[1], plan),
        "gate first": (engines[2], zeros),
    }


def realised(way: Way, prompt: Tensor) -> dict[str, float]:
    """Of a few tokens: neurons that down does not read, and weights not read, routers taken off."""
    engine, plan = way
    with control_of(engine.model).counting() as counter:
        decode_seconds(engine, plan, prompt, 8)
    neurons = neuron_sparsity(engine.model, counter.by_projection()) or 0.0
    return {"neurons": neurons, "model_wide": counter.model_wide() or 0.0}


def in_turn(ways: dict[str, Way], prompt: Tensor, new_tokens: int, repeats: int) -> dict[str, tuple[Spread, Spread]]:
    """Tokens a second of all rows of a prompt, and how often those of the way `dense` in the same turn."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (engine, plan) in ways.items():
            seconds = decode_seconds(engine, plan, prompt, new_tokens)
            speeds[name].append(prompt.shape[0] * new_tokens / seconds)
    return {name: (Spread.of(own), Spread.of_ratios(own, speeds["dense"])) for name, own in speeds.items()}


def measure(alias: Alias, share: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of each way, for each number of rows."""
    ways, found = ways_of(alias, share, options), []
    for batch in (int(number) for number in options.rows.split(",")):
        prompt = random_prompt(int(alias.shape["vocab_size"]), PROMPT, 0, batch)
        shares = {name: realised(way, prompt) for name, way in ways.items() if way[1] is not None}
        for name, (speed, over) in in_turn(ways, prompt, options.new_tokens, options.repeats).items():
            said = f"neurons {shares[name]['neurons']:.3f}" if name in shares else ""
            print(
                f"  {batch} rows  {name:22} {speed.median:8.1f} ({speed.min:.1f}-{speed.max:.1f}) tokens/s  "
                f"{over.median:5.2f}x  {said}",
                flush=True,
            )
            found.append(
                {
                    "model": alias.name,
                    "share": share,
                    "rows": batch,
                    "way": name,
                    "path": ways[name][0].path.name,
                    "tokens_per_second": asdict(speed),
                    "speedup": asdict(over),
                    "realised": shares.get(name),
                }
            )
    return found


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--models", default="llama-2-7b,mistral-7b", help="aliases, comma-separated")
    found.add_argument("--shares", default="0.5,0.7,0.9", help="of groups that are left out")
    found.add_argument("--group", type=int, default=32, help="neurons of a group")
    found.add_argument("--rank", type=int, help="of routers of two layers")
    found.add_argument("--rows", default="1", help="of a batch, comma-separated")
    found.add_argument("--new-tokens", type=int, default=64)
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--layers", type=int, help="blocks of the model, by default all")
    found.add_argument("--device", default="cuda")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--path", help="of decoding, by default the engine's choice")
    return found


def main() -> None:
    """Measure, and write after each share, so that an interrupted run keeps what it has."""
    options = parser().parse_args()
    quieten_libraries()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_description(torch.device(options.device)),
        "versions": library_versions(),
        "group": options.group,
        "rank": options.rank,
        "runs": [],
    }
    for name in options.models.split(","):
        for share in map(float, options.shares.split(",")):
            with torch.no_grad():
                result["runs"] += measure(require_alias(name), share, options)
            write_json(options.out, result)
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
