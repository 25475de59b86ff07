"""What the benchmarks of `teal adapt` keep of an evaluation."""

from typing import Any


def figures_of(result: Any) -> dict[str, float | None]:
    """Of the first sparse run of an evaluation, beside the original dense model.

    Args:
        result: what `teal_cli.evaluate` gave, of a decoder.
    """
    run = result.runs[0]
    return {
        "perplexity_ratio": run.comparison.ratio,
        "stderr": run.comparison.ratio_stderr,
        "kl": run.comparison.kl,
        "realised_sparsity": run.comparison.realised_sparsity,
        "bytes_per_token": run.bytes_per_token,
    }
