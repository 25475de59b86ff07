"""What a token costs over size and GPUs, on paper, from what `tensor_parallel.py` measured.

    python benchmarks/tensor_parallel_paper.py --out benchmarks/results/tensor-parallel-computed.json

A token's time is that of reading the weights that one GPU holds, and a time for each block: launches, products that do
not fill a GPU, sums over ranks. Both follow from two measurements of the largest model with weights of this kind, on
one GPU and on several, which the table repeats. Each rank beyond those adds the time of the words that it sends, at the
speed of a link. All else in the table is computed, and whoever quotes it says so.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.atomic import write_json
from teal_cli.models.aliases import require_alias
from teal_cli.versions import library_versions

GPUS = (1, 2, 4, 8)
LINK_BYTES_A_SECOND = 450e9
"""Of NVLink in one direction, on H100 and H200."""
MEMORY_BYTES_A_SECOND = 4.35e12
"""That an H200 was measured to read (`reading_gb_s` in speculation-llama-3-8b-gpu.json)."""
MEMORY_BYTES = 141e9
"""Of an H200; `--memory` names another."""
_SPARE = 0.93
"""Share of the memory that weights may take: the rest is for the cache, the runtime and buffers."""
LARGEST = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHAPES = {
    "Llama-3-8B": require_alias("llama-3-8b").shape,
    "Llama-3-70B": require_alias("llama-3-70b").shape,
    "Llama-3.1-405B": LARGEST,
}
ALIASES = {"llama-3-8b": "Llama-3-8B", "llama-3-70b": "Llama-3-70B"}
BYTES = {"bfloat16": 2.0, "int4-128": 0.5 + 4 / 128}
"""Of a weight of a block; int4 with a scale and a zero point of 16 bits a group."""


@dataclass(frozen=True)
class Cost:
    """What a kind of weights costs, as it was measured."""

    seconds: dict[float, tuple[float, float]]
    """Sparsity -> seconds for a byte that a GPU holds, read or skipped, and for a block beside that."""
    ranks: int


def weights(shape: dict[str, Any]) -> tuple[int, int]:
    """Of all blocks, and of the output layer."""
    hidden, neurons = int(shape["hidden_size"]), int(shape["intermediate_size"])
    head = hidden // int(shape["num_attention_heads"])
    attention = 2 * hidden * hidden + 2 * hidden * head * int(shape["num_key_value_heads"])
    return int(shape["num_hidden_layers"]) * (attention + 3 * hidden * neurons), hidden * int(shape["vocab_size"])


def bytes_held(shape: dict[str, Any], kind: str, gpus: int) -> float:
    """Of one GPU, of what a token reads: blocks and output layer, which stays in 16 bits."""
    blocks, output = weights(shape)
    return (blocks * BYTES[kind] + output * 2) / gpus


def cost_of(cases: list[dict[str, Any]], kind: str) -> Cost | None:
    """From the largest case with weights of this kind on one GPU and on several; None where there is none."""
    known = [
        case
        for case in cases
        if case["weights"] == kind and case["model"] in ALIASES and len({run["gpus"] for run in case["runs"]}) == 2
    ]
    if not known:
        return None
    case = max(known, key=lambda each: sum(weights(SHAPES[ALIASES[each["model"]]])))
    blocks, ranks = int(case["layers"]), int(case["ranks"])
    alone = bytes_held({**SHAPES[ALIASES[case["model"]]], "num_hidden_layers": blocks}, kind, 1)
    tokens = {(run["gpus"], run["sparsity"]): 1.0 / run["tokens_per_second"]["median"] for run in case["runs"]}
    seconds = {}
    for sparsity in sorted({sparsity for _, sparsity in tokens}):
        one, several = tokens[1, sparsity], tokens[ranks, sparsity]
        a_byte = (one - several) / (alone * (1 - 1 / ranks))
        seconds[sparsity] = a_byte, (one - a_byte * alone) / blocks
    return Cost(seconds, ranks)


def token_seconds(cost: Cost, shape: dict[str, Any], kind: str, gpus: int) -> dict[float, float]:
    """Of a token at each sparsity, on so many GPUs."""
    blocks, hidden = int(shape["num_hidden_layers"]), int(shape["hidden_size"])
    words = 2 * blocks * max(0, gpus - cost.ranks) * 4 * hidden / LINK_BYTES_A_SECOND
    held = bytes_held(shape, kind, gpus)
    return {sparsity: held * a_byte + blocks * a_block + words for sparsity, (a_byte, a_block) in cost.seconds.items()}


def table(cases: list[dict[str, Any]], memory: float) -> list[dict[str, Any]]:
    """One entry for each model, kind of weights and number of GPUs."""
    found = []
    for kind in BYTES:
        cost = cost_of(cases, kind)
        if cost is None:
            continue
        for model, shape in SHAPES.items():
            for gpus in GPUS:
                held = bytes_held(shape, kind, gpus) + 2.0 * shape["hidden_size"] * shape["vocab_size"]
                times = token_seconds(cost, shape, kind, gpus)
                found.append(
                    {
                        "model": model,
                        "weights": kind,
                        "gpus": gpus,
                        "gigabytes_a_gpu": held / 1e9,
                        "limit": MEMORY_BYTES_A_SECOND / bytes_held(shape, kind, gpus),
                        "fits": held <= _SPARE * memory,
                        "milliseconds": {str(sparsity): seconds * 1e3 for sparsity, seconds in times.items()},
                        "tokens_per_second": {str(sparsity): 1.0 / seconds for sparsity, seconds in times.items()},
                    }
                )
    return found


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md: tokens a second, dense and sparse, and what reading all weights at the memory's
    speed would allow; a dash where they do not fit."""
    lines = [f"| | weights | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |"]
    lines.append("|---" * (2 + len(GPUS)) + "|")
    for model, kind in dict.fromkeys((entry["model"], entry["weights"]) for entry in entries):
        cells = []
        for entry in entries:
            if (entry["model"], entry["weights"]) == (model, kind):
                speeds = " / ".join(f"{speed:.0f}" for speed in entry["tokens_per_second"].values())
                speeds += f" ({entry['limit']:.0f})"
                cells.append(speeds if entry["fits"] else f"- ({entry['gigabytes_a_gpu']:.0f} GB)")
        lines.append(f"| {model} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = [Path("benchmarks/results") / name for name in ("tensor-parallel.json", "tensor-parallel-70b.json")]
    parser.add_argument("--measured", type=Path, nargs="+", default=files)
    parser.add_argument("--memory", type=float, default=MEMORY_BYTES, help="bytes of a GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases = [case for file in arguments.measured for case in json.loads(file.read_text(encoding="utf-8"))["cases"]]
    entries = table(cases, arguments.memory)
    if arguments.out is not None:
        names = [file.name for file in arguments.measured]
        made = {"computed_from": names, "versions": library_versions(), "memory_bytes": arguments.memory}
        write_json(arguments.out, {**made, "entries": entries})
    print(markdown(entries))


if __name__ == "__main__":
    main()
