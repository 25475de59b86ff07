"""What docs/speculation.md says of drafts."""

from typing import Any

from tests.figures.page import Cell, Page, result


def _row(run: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        run["acceptance"],
        run["tokens_per_pass"],
        run["tokens_per_second"]["median"],
        (run["speedup"]["median"], run["speedup"]["min"], run["speedup"]["max"]),
    )


def drafts_on_a_cpu(page: Page) -> None:
    """The table of drafts, and the times of passes."""
    measured = result("speculation-smollm2-135m-cpu")
    runs = measured["speculation"]
    rows = {
        f"`{run['drafts']}`" + (f", {run['sparsity']:.0%}".replace("%", " %") if run["sparsity"] else ""): _row(run)
        for run in runs
    }
    page.table("| drafts | acceptance | tokens a pass | tokens/s | speedup (least to greatest) |", rows)
    int8 = next(run for run in runs if run["drafts"] == "int8")
    step = int8["step_seconds"]["median"]
    passes = (int8["pass_seconds"][tokens]["median"] / step for tokens in ("2", "4", "8"))
    page.says("2 tokens took {} times a dense step, over 4 tokens {} times, over 8 tokens {} times", *passes)
    page.says("a step of the int8 copy {} times", int8["draft_step_seconds"]["median"] / step)
    assert all(run["differing"] == 0 for run in runs), "No token differed."


def drafts_on_a_gpu(page: Page) -> None:
    """What drafts and passes of an 8B cost."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for run in result("speculation-llama-3-8b-gpu")["speculation"]:
        label = f"`{run['drafts'].removesuffix('+sparse')}`" + (", 50 %" if run["sparsity"] else "")
        step = run["step_seconds"]["median"]
        rows[label] = (
            run["draft_bytes"] / 1e6,
            run["draft_step_seconds"]["median"] / step,
            run["pass_seconds"]["4"]["median"] / step,
            run["expected_speedups"]["0.85"]["speedup"],
        )
    page.table(
        "| drafts | MB beside the model | a draft over a dense step | a pass over 4 tokens | computed speedup |", rows
    )
    page.says("for an acceptance of {} and", "0.85")
    measured = result("speculation-llama-3-8b-gpu")
    dense = next(run for run in measured["runs"] if not run["sparsity"])["tokens_per_second"]["median"]
    step = measured["speculation"][0]["step_seconds"]["median"]
    page.says("took {} ms a token, and a step here {}", 1e3 / dense, 1e3 * step)
    first = measured["speculation"][0]
    page.says("draft in 4 bits costs {} of a dense step", first["draft_step_seconds"]["median"] / step)
    page.says("over 2 tokens it takes {} times", first["pass_seconds"]["2"]["median"] / step)
    page.says("over 8 {} times", first["pass_seconds"]["8"]["median"] / step)
    tuned = result("tile-configs-llama-3-8b-h200")
    after, before = (tuned[key]["speculation"][0] for key in ("speculation", "speculation_before"))
    steps = [(run, run["step_seconds"]["median"]) for run in (after, before)]
    page.says(
        "{} in place of {}, a pass over 4 tokens {} in place of {}, and the computed speedup is {} in place of {}",
        *(run["draft_step_seconds"]["median"] / step for run, step in steps),
        *(run["pass_seconds"]["4"]["median"] / step for run, step in steps),
        *(run["expected_speedups"]["0.85"]["speedup"] for run in (after, before)),
    )
