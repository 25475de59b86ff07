"""Results as Rich tables: the one place where they become something to look at."""

from typing import Any

from rich.table import Table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _with_error(value: float, error: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def calibration_table(result: dict[str, Any]) -> Table:
    """What `teal calibrate` measured."""
    table = Table(title=f"Calibration of {result['model']}", title_justify="left", show_header=False)
    for label, value in (
        ("text", f"{result['dataset']}, {result['tokens']:,} tokens in sequences of {result['seq_len']:,}"),
        ("sites", f"{result['sites']} hidden states feeding {result['projections']} projections"),
        ("time", f"{result['seconds']:.1f} s, {result['tokens'] / max(result['seconds'], 1e-9):,.0f} tokens/s"),
    ):
        table.add_row(label, value)
    return table


def eval_table(result: dict[str, Any]) -> Table:
    """Dense against sparse quality."""
    dense, sparse = result["dense"], result["sparse"]
    table = _table(
        f"{result['model']} on {result['dataset']}\n{result['tokens']:,} decoded positions in {result['sequences']} "
        f"sequences of {result['seq_len']:,}, the first {result['dense_prefix']} dense",
        "",
        "dense",
        "sparse",
    )
    table.add_row("target sparsity", "0", f"{sparse['target_sparsity']:.3f} ({sparse['allocation']})")
    table.add_row("realised sparsity", "0", f"{sparse['realised_sparsity']:.3f}")
    table.add_row(
        "perplexity",
        _with_error(dense["perplexity"], dense["stderr"], 2),
        _with_error(sparse["perplexity"], sparse["stderr"], 2),
    )
    table.add_row(
        "perplexity over dense", "1", _with_error(result["perplexity_ratio"], result["perplexity_ratio_stderr"], 3)
    )
    table.add_row("KL to dense, nats a token", "0", f"{sparse['kl']:.3f}")
    table.add_row("same first choice as dense", "1", f"{sparse['top1_agreement']:.3f}")
    for task, scores in result["tasks"].items():
        for metric, value in scores["dense"].items():
            if "stderr" not in metric and metric in scores["sparse"]:
                name = metric.removesuffix(",none")
                table.add_row(f"{task}: {name}", f"{value:.4g}", f"{scores['sparse'][metric]:.4g}")
    return table


def _sparsity(entry: dict[str, Any]) -> str:
    """Target and, in brackets, what was realised."""
    return f"{entry['sparsity']:.2f} ({entry['realised_sparsity']:.3f})" if entry["sparsity"] else "0"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['min']:.1f}-{spread['max']:.1f})"


def _share(value: float, limit: float | None) -> str:
    return "" if limit is None else f"{value / limit:.0%} of {limit:,.0f}"


def bench_tables(result: dict[str, Any]) -> list[Table]:
    """Decoding speed, and kernels where measured."""
    limit = result["reading_gb_s"]
    because = f"\ntransformers' forward, not our own ({result['general_because']})" if result["general_because"] else ""
    table = _table(
        f"{result['model']}, {result['dtype']}, batch {result['batch']}, {result['device']}\n"
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}; median of {result['repeats']} (min-max); "
        f"sparsity: target (realised){because}",
        "backend",
        "sparsity",
        "tokens/s",
        "MB/token",
        "GB/s",
        *([] if limit is None else ["of the memory limit"]),
        "speedup",
    )
    for run in result["runs"]:
        table.add_row(
            run["backend"],
            _sparsity(run),
            _spread(run["tokens_per_second"]),
            "" if run["bytes_per_token"] is None else f"{run['bytes_per_token'] / 1e6:,.0f}",
            "" if run["bandwidth_gb_s"] is None else f"{run['bandwidth_gb_s']:.1f}",
            *([] if limit is None else [_share(run["tokens_per_second"]["median"], run["limit_tokens_per_second"])]),
            f"{run['speedup']:.2f}x",
        )
    tables = [table]
    if result["kernels"]:
        kernels = _table(
            "One product, weights out of cache; median (min-max)",
            "out x in",
            "backend",
            "sparsity",
            "microseconds",
            "GB/s",
            "speedup",
        )
        for run in result["kernels"]:
            kernels.add_row(
                f"{run['out_features']} x {run['in_features']}",
                run["backend"],
                _sparsity(run),
                _spread(run["microseconds"]),
                f"{run['gb_s']:.1f}",
                f"{run['speedup']:.2f}x",
            )
        tables.append(kernels)
    return tables


def run_table(results: dict[str, dict[str, Any]]) -> Table:
    """The end of a recipe: quality and speed side by side, dense against sparse."""
    quality, speed = results.get("eval"), results.get("bench")
    table = _table("Dense against sparse", "sparsity", "realised", "perplexity", "over dense", "tokens/s", "speedup")
    rows: dict[float, list[str]] = {0.0: ["0 (dense)", "0", "", "", "", ""]}

    def row(sparsity: float) -> list[str]:
        return rows.setdefault(sparsity, [f"{sparsity:.2f}", "", "", "", "", ""])

    if quality:
        dense, sparse = quality["dense"], quality["sparse"]
        rows[0.0][2:4] = [_with_error(dense["perplexity"], dense["stderr"], 2), "1"]
        target = row(sparse["target_sparsity"])
        target[1] = f"{sparse['realised_sparsity']:.3f}"
        target[2] = _with_error(sparse["perplexity"], sparse["stderr"], 2)
        target[3] = f"{quality['perplexity_ratio']:.3f}"
    for run in speed["runs"] if speed else []:
        target = row(run["sparsity"])
        target[1] = target[1] or f"{run['realised_sparsity']:.3f}"
        target[4:6] = [f"{run['tokens_per_second']['median']:.2f}", f"{run['speedup']:.2f}x"]
    for sparsity in sorted(rows):
        table.add_row(*rows[sparsity])
    return table
