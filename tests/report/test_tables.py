"""Tables that put results side by side."""

from typing import Any

import pytest
from rich.console import Console

from teal_cli.report.tables import eval_tables, run_table


def _quality(allocations: list[str]) -> dict[str, Any]:
    runs = [
        {
            "quantization": "",
            "dense_prefix": 32,
            "dense": {"perplexity": 10.0, "stderr": 1.0},
            "sparse": {
                "allocation": name,
                "target_sparsity": 0.5,
                "realised_sparsity": 0.49,
                "perplexity": 20.0 + index,
                "stderr": 1.0,
            },
            "perplexity_ratio": 2.0 + index / 10,
        }
        for index, name in enumerate(allocations)
    ]
    return {**runs[0], "runs": runs}


def _speed(allocation: str) -> dict[str, Any]:
    dense = {"quantization": "", "allocation": None, "sparsity": 0.0, "realised_sparsity": 0.0, "speedup": 1.0}
    sparse = {**dense, "allocation": allocation, "sparsity": 0.5, "realised_sparsity": 0.51, "speedup": 1.5}
    speeds = [{**run, "tokens_per_second": {"median": 10.0 * run["speedup"]}} for run in (dense, sparse)]
    return {"runs": speeds}


def _lines(quality: dict[str, Any], speed: dict[str, Any]) -> list[list[str]]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(run_table({"eval": quality, "bench": speed}))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_quality_and_speed_are_of_one_allocation() -> None:
    dense, sparse = _lines(_quality(["greedy", "fisher"]), _speed("fisher"))
    assert dense == ["0 (dense)", "0", "10.00 ± 1.00", "1", "10.00", "1.00x"]
    assert sparse == ["0.50", "0.490", "21.00 ± 1.00", "2.100", "15.00", "1.50x"]


def test_what_was_timed_but_not_evaluated_has_a_row_of_its_own() -> None:
    _, evaluated, timed = _lines(_quality(["greedy"]), _speed("fisher"))
    assert evaluated == ["0.50", "0.490", "20.00 ± 1.00", "2.000", "", ""]
    assert timed == ["0.50 fisher", "0.510", "", "", "15.00", "1.50x"]


@pytest.mark.parametrize(
    ("allocation", "said"),
    [
        ("fisher", "the first 4 dense"),
        ("routed", "behind the first 4"),
        ("intrinsic", "behind the first 4"),
        ("intrinsic and fisher", "behind the first 4"),
    ],
)
def test_no_position_is_called_dense_where_every_pass_leaves_something_out(allocation: str, said: str) -> None:
    sparse = {"allocation": allocation, "target_sparsity": 0.5, "realised_sparsity": 0.5, "bytes_per_token": 1.0}
    sparse |= {"perplexity": 9.0, "stderr": 0.1, "kl": 0.1, "top1_agreement": 0.9}
    result: dict[str, Any] = {"model": "tiny", "dataset": "sotu", "sequences": 2, "seq_len": 8, "tokens": 6}
    result |= {"runs": [{"generation": None}], "dense_prefix": 4, "sparse": sparse}
    result |= {"dense": {"perplexity": 8.0, "stderr": 0.1}}
    result |= {"dense_bytes_per_token": 2.0, "perplexity_ratio": 1.1, "perplexity_ratio_stderr": 0.01, "tasks": {}}
    (table,) = eval_tables(result)
    assert table.heading.endswith(said)
