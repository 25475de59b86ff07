"""What a token costs over size and GPUs, on paper, from what `tensor_parallel.py` measured.

    python benchmarks/tensor_parallel_paper.py --measured benchmarks/results/tensor-parallel.json --out table.json

A token's time is that of reading the weights that one GPU holds, and that of two sums a block. The first is taken from
the largest measured model with weights of this kind: its time, less its sums, over the bytes that a GPU held. The
second is what was measured, for so many ranks as were measured; each further rank adds the time of the words that it
sends, at the speed of a link. Nothing in the table is measured, and whoever quotes it says so.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.atomic import write_json
from teal_cli.models.aliases import require_alias

GPUS = (1, 2, 4, 8)
LINK_BYTES_A_SECOND = 450e9
"""Of NVLink in one direction, on H100 and H200."""
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

    seconds_a_byte: dict[float, float]
    """Sparsity -> seconds for a byte that a GPU holds, read or skipped."""
    sum_seconds: float
    """Of a sum over `ranks`."""
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


def cost_of(measured: dict[str, Any], kind: str) -> Cost | None:
    """From the largest case with weights of this kind; None where there is none."""
    cases = [case for case in measured["cases"] if case["weights"] == kind and case["model"] in ALIASES]
    if not cases:
        return None
    case = max(cases, key=lambda each: sum(weights(SHAPES[ALIASES[each["model"]]])))
    shape = {**SHAPES[ALIASES[case["model"]]], "num_hidden_layers": case["layers"]}
    seconds: dict[float, float] = {}
    fewest = min(run["gpus"] for run in case["runs"])
    sums = case["sum_microseconds_in_token"] * 1e-6
    for run in case["runs"]:
        if run["gpus"] == fewest:
            of_sums = 2 * case["layers"] * sums if fewest > 1 else 0.0
            token = 1.0 / run["tokens_per_second"]["median"]
            seconds[run["sparsity"]] = (token - of_sums) / bytes_held(shape, kind, fewest)
    return Cost(seconds, sums, case["ranks"])


def sum_seconds(cost: Cost, hidden: int, gpus: int) -> float:
    """Of one sum over so many."""
    if gpus == 1:
        return 0.0
    return cost.sum_seconds + max(0, gpus - cost.ranks) * 4 * hidden / LINK_BYTES_A_SECOND


def table(measured: dict[str, Any], memory: float) -> list[dict[str, Any]]:
    """One entry for each model, kind of weights and number of GPUs."""
    found = []
    for kind in BYTES:
        cost = cost_of(measured, kind)
        if cost is None:
            continue
        for model, shape in SHAPES.items():
            for gpus in GPUS:
                held = bytes_held(shape, kind, gpus) + 2.0 * shape["hidden_size"] * shape["vocab_size"]
                sums = 2 * int(shape["num_hidden_layers"]) * sum_seconds(cost, int(shape["hidden_size"]), gpus)
                times = {
                    sparsity: bytes_held(shape, kind, gpus) * each + sums
                    for sparsity, each in cost.seconds_a_byte.items()
                }
                found.append(
                    {
                        "model": model,
                        "weights": kind,
                        "gpus": gpus,
                        "gigabytes_a_gpu": held / 1e9,
                        "fits": held <= _SPARE * memory,
                        "milliseconds": {str(sparsity): seconds * 1e3 for sparsity, seconds in times.items()},
                        "tokens_per_second": {str(sparsity): 1.0 / seconds for sparsity, seconds in times.items()},
                        "share_of_sums": {str(sparsity): sums / seconds for sparsity, seconds in times.items()},
                    }
                )
    return found


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md: tokens a second, dense and sparse; a dash where the weights do not fit."""
    lines = [f"| | weights | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |"]
    lines.append("|---" * (2 + len(GPUS)) + "|")
    for model, kind in dict.fromkeys((entry["model"], entry["weights"]) for entry in entries):
        cells = []
        for entry in entries:
            if (entry["model"], entry["weights"]) == (model, kind):
                speeds = " / ".join(f"{speed:.0f}" for speed in entry["tokens_per_second"].values())
                cells.append(speeds if entry["fits"] else f"- ({entry['gigabytes_a_gpu']:.0f} GB)")
        lines.append(f"| {model} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=Path("benchmarks/results/tensor-parallel.json"))
    parser.add_argument("--memory", type=float, default=MEMORY_BYTES, help="bytes of a GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    entries = table(json.loads(arguments.measured.read_text(encoding="utf-8")), arguments.memory)
    if arguments.out is not None:
        write_json(arguments.out, {"computed_from": arguments.measured.name, "entries": entries})
    print(markdown(entries))


if __name__ == "__main__":
    main()
