"""What `teal adapt` did, as tables."""

from typing import Any

from teal_cli.plain_table import PlainTable, facts_table


def adapt_table(result: dict[str, Any]) -> PlainTable:
    """A run in facts; quality before and after where both were measured."""
    table = facts_table(f"{result['source']['name']} adapted by {result['recipe']}")
    text = ", ".join(used["dataset"] for used in result["text"])
    repeats = f", read up to {result['repeats']:.1f} times" if result["repeats"] > 1.0 else ""
    stopped = ", stopped early" if result["stopped_early"] else ""
    rows = [
        ("text", f"{result['tokens']:,} tokens of {text}{repeats}"),
        ("steps", f"{result['steps']:,}{stopped}, {result['seconds']:,.0f} s on {result['device']}"),
        ("trained", f"{result['parameters']:,} parameters"),
    ]
    if result["best"]:
        best = result["best"]
        rows.append(("best", f"loss {best['loss']:.4f} on the held-out slice, after step {best['step']:,.0f}"))
    for label, quality in (("before", result["before"]), ("after", result["after"])):
        if quality is not None:
            rows.append((label, _quality(quality)))
    for label, value in rows:
        table.add_row(label, value)
    return table


def _quality(found: dict[str, Any]) -> str:
    return (
        f"perplexity {found['perplexity_ratio']:.3f} times dense on the held-out slice, sparsity "
        f"{found['realised_sparsity']:.1%}, {found['bytes_per_token'] / 1e6:,.0f} MB of weights a token in place of "
        f"{found['dense_bytes_per_token'] / 1e6:,.0f}"
    )
