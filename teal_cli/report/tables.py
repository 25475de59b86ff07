"""Results as Rich tables: the one place where they become something to look at."""

import itertools
from typing import Any

from teal_cli.checkpoint.rules import INTRINSIC, ROUTED
from teal_cli.plain_table import PlainTable, facts_table


def _with_error(value: float, error: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def calibration_table(result: dict[str, Any]) -> PlainTable:
    """What `teal calibrate` measured."""
    table = facts_table(f"Calibration of {result['model']}")
    sites = ("sites", f"{result['sites']} hidden states feeding {result['projections']} projections")
    if result["imported"]:
        rows = [("imported", f"{result['imported']}, {result['tokens']:,} tokens"), sites]
    else:
        rows = [
            ("text", f"{result['dataset']}, {result['tokens']:,} tokens in sequences of {result['seq_len']:,}"),
            sites,
            ("time", f"{result['seconds']:.1f} s, {result['tokens'] / max(result['seconds'], 1e-9):,.0f} tokens/s"),
        ]
    if result["sensitivity_tokens"]:
        rows.append(
            ("sensitivities", f"{result['sensitivity_tokens']:,} tokens, {result['sensitivity_seconds']:.1f} s")
        )
    if result["greedy_tokens"]:
        took = f"{result['greedy_tokens']:,} tokens, {result['greedy_seconds']:.1f} s, "
        runs = f"{result['greedy_forwards']:,} runs of a block ({result['greedy_naive_forwards']:,} naively)"
        rows.append(("greedy paths", took + runs))
    for label, value in rows:
        table.add_row(label, value)
    return table


def eval_tables(result: dict[str, Any]) -> list[PlainTable]:
    """Dense against sparse quality: one run in full, or several side by side; then what was written."""
    runs = result["runs"]
    if result.get("kind") == "encoder":
        return [_encoder(result)]
    title = f"{_model(result)} on {result['dataset']}\n"
    positions = f"decoded positions in {result['sequences']} sequences of {result['seq_len']:,}"
    if len(runs) == 1:
        prefix = result["dense_prefix"]
        where = f"behind the first {prefix}" if in_every_pass(result["sparse"]) else f"the first {prefix} dense"
        title += f"{result['tokens']:,} {positions}, {where}"
        return [_one_run(title, result), *_written(runs)]
    return [_several_runs(title + positions, result), *_written(runs), *_scored(runs)]


def in_every_pass(sparse: dict[str, Any]) -> bool:
    """Whether routers or zeros of the model's own leave inputs out in prompts as well: no position is dense."""
    return str(sparse["allocation"]).split()[0] in (ROUTED, INTRINSIC)


def _encoder(result: dict[str, Any]) -> PlainTable:
    first = result["runs"][0]
    title = (
        f"{_model(result)} on {result['dataset']}\n{first['sequences']} sequences of {result['seq_len']:,}, all sparse"
    )
    columns = ("allocation", "target", "realised", "cosine to dense", "least", "relative error")
    table = PlainTable(title, *columns)
    for run in result["runs"]:
        table.add_row(
            run["allocation"],
            f"{run['target_sparsity']:.2f}",
            f"{run['realised_sparsity']:.3f}",
            _with_error(run["cosine"], run["cosine_stderr"], 4),
            f"{run['least_cosine']:.4f}",
            f"{run['relative_error']:.3f}",
        )
    return table


def _one_run(title: str, result: dict[str, Any]) -> PlainTable:
    dense, sparse = result["dense"], result["sparse"]
    table = PlainTable(title, "", "dense", "sparse")
    own = sparse.get("neuron_sparsity")
    target = f"{sparse['target_sparsity']:.3f} ({sparse['allocation']})" if own is None else "the model's own"
    table.add_row("target sparsity", "0", target)
    table.add_row("realised sparsity", "0", f"{sparse['realised_sparsity']:.3f}")
    if own is not None:
        table.add_row("MLP neurons that are zero", "", f"{own:.3f}")
    table.add_row(
        "MB of weights a token",
        _megabytes(result["dense_bytes_per_token"]),
        _megabytes(sparse["bytes_per_token"]),
    )
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
    for task, metric, dense_score, sparse_score in _metrics(result["tasks"]):
        table.add_row(f"{task}: {metric}", f"{dense_score:.4g}", f"{sparse_score:.4g}")
    return table


def _weights(quantization: str) -> str:
    """What a kind of weights is called in a table."""
    return quantization or "as they are"


def _model(result: dict[str, Any]) -> str:
    """The model, and its kind of weights if they are quantised and all of one kind."""
    kinds = {run.get("quantization", result.get("quantization", "")) for run in result["runs"]}
    return ", ".join(filter(None, (result["model"], *(kinds if len(kinds) == 1 else ()))))


def _several_runs(title: str, result: dict[str, Any]) -> PlainTable:
    kinds = list(dict.fromkeys(run.get("quantization", "") for run in result["runs"]))
    several = len(kinds) > 1
    table = PlainTable(
        title,
        *(["weights"] if several else []),
        "allocation",
        "target",
        "realised",
        "dense first",
        "perplexity",
        "over dense",
        *(["over first dense"] if several else []),
        "KL",
        "same choice",
        "MB/token",
    )
    prefixes = list(dict.fromkeys(run["dense_prefix"] for run in result["runs"]))
    for prefix, kind in itertools.product(prefixes, kinds):
        of_prefix = [run for run in result["runs"] if run["dense_prefix"] == prefix]
        runs = [run for run in of_prefix if run.get("quantization", "") == kind]
        dense, plain = runs[0]["dense"], of_prefix[0]["dense"]["perplexity"]
        name = [_weights(kind)] if several else []
        over_first = [f"{dense['perplexity'] / plain:.3f}"] if several else []
        size = _megabytes(dense.get("bytes_per_token", result["dense_bytes_per_token"]))
        perplexity = _with_error(dense["perplexity"], dense["stderr"], 2)
        table.add_row(*name, "dense", "0", "0", str(prefix), perplexity, "1", *over_first, "0", "1", size)
        for run in runs:
            sparse = run["sparse"]
            table.add_row(
                *name,
                sparse["allocation"],
                f"{sparse['target_sparsity']:.2f}",
                f"{sparse['realised_sparsity']:.3f}",
                str(prefix),
                _with_error(sparse["perplexity"], sparse["stderr"], 2),
                _with_error(run["perplexity_ratio"], run["perplexity_ratio_stderr"], 3),
                *([f"{run['over_first_dense']:.3f}"] if several else []),
                f"{sparse['kl']:.3f}",
                f"{sparse['top1_agreement']:.3f}",
                _megabytes(sparse["bytes_per_token"]),
            )
        table.add_section()
    return table


def _plans(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run for each plan, whatever the dense prefix."""
    return list({_name(run): run for run in runs}.values())


def _name(run: dict[str, Any]) -> str:
    kind = run.get("quantization", "")
    return ", ".join([*([kind] if kind else []), run["sparse"]["allocation"], f"{run['sparse']['target_sparsity']:g}"])


def _written(runs: list[dict[str, Any]]) -> list[PlainTable]:
    """How continuations agree, where they were written."""
    first = runs[0]["generation"]
    if first is None:
        return []
    table = PlainTable(
        f"Greedy continuations, {first['new_tokens']} tokens after each of {first['prompts']} prompts of "
        f"{first['prompt_tokens']}",
        "",
        "realised",
        "identical",
        "tokens until they part",
        "same choice along dense",
        "perplexity by dense",
    )
    table.add_row("dense", "0", "1", "", "1", f"{first['dense_text_perplexity']:.2f}")
    for run in _plans(runs):
        found = run["generation"]
        table.add_row(
            _name(run),
            f"{found['realised_sparsity']:.3f}",
            f"{found['identical']:.2f}",
            f"{found['tokens_until_difference']:.1f}",
            f"{found['top1_agreement']:.3f}",
            f"{found['sparse_text_perplexity']:.2f}",
        )
    return [table]


def _metrics(tasks: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """(task, metric, dense, sparse) of harness tasks, without their errors."""
    return [
        (task, metric.removesuffix(",none"), value, scores["sparse"][metric])
        for task, scores in tasks.items()
        for metric, value in scores["dense"].items()
        if "stderr" not in metric and metric in scores["sparse"]
    ]


def _scored(runs: list[dict[str, Any]]) -> list[PlainTable]:
    """Harness tasks of several plans."""
    if not runs[0]["tasks"]:
        return []
    table = PlainTable("Tasks", "", *[f"{task}: {metric}" for task, metric, _, _ in _metrics(runs[0]["tasks"])])
    table.add_row("dense", *[f"{dense:.4g}" for _, _, dense, _ in _metrics(runs[0]["tasks"])])
    for run in _plans(runs):
        table.add_row(_name(run), *[f"{sparse:.4g}" for _, _, _, sparse in _metrics(run["tasks"])])
    return [table]


def _sparsity(entry: dict[str, Any]) -> str:
    """Target and, in brackets, what was realised."""
    if entry.get("neuron_sparsity") is not None:
        return f"own ({entry['realised_sparsity']:.3f}), neurons {entry['neuron_sparsity']:.3f}"
    return f"{entry['sparsity']:.2f} ({entry['realised_sparsity']:.3f})" if entry["sparsity"] else "0"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['min']:.1f}-{spread['max']:.1f})"


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}x ({spread['min']:.2f}-{spread['max']:.2f})"


def _share(value: float, limit: float | None) -> str:
    return "" if limit is None else f"{value / limit:.0%} of {limit:,.0f}"


def bench_tables(result: dict[str, Any]) -> list[PlainTable]:
    """Decoding speed, and kernels where measured."""
    limit, llama_cpp = result["reading_gb_s"], result.get("llama_cpp")
    because = f"\ntransformers' forward, not our own ({result['general_because']})" if result["general_because"] else ""
    several = len({run.get("quantization", "") for run in result["runs"]}) > 1
    table = PlainTable(
        f"{_model(result)}, {result['dtype']}, batch {result['batch']}, {result['device']}\n"
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}; median of {result['repeats']} (min-max); "
        f"sparsity: target (realised){because}",
        *(["weights"] if several else []),
        "backend",
        "sparsity",
        "tokens/s",
        "MB/token",
        "GB/s",
        *([] if limit is None else ["of the memory limit"]),
        "speedup",
        *([] if llama_cpp is None else ["over llama.cpp"]),
    )
    for run in result["runs"]:
        table.add_row(
            *([_weights(run.get("quantization", ""))] if several else []),
            run["backend"],
            _sparsity(run),
            _spread(run["tokens_per_second"]),
            "" if run["bytes_per_token"] is None else f"{run['bytes_per_token'] / 1e6:,.0f}",
            "" if run["bandwidth_gb_s"] is None else f"{run['bandwidth_gb_s']:.1f}",
            *([] if limit is None else [_share(run["tokens_per_second"]["median"], run["limit_tokens_per_second"])]),
            f"{run['speedup']:.2f}x",
            *([] if llama_cpp is None else [_times(run["over_llama_cpp"])]),
        )
    if llama_cpp is not None:
        speed, size = llama_cpp["tokens_per_second"], llama_cpp["weight_bytes"]
        drawn = f"{size * speed['median'] / 1e9:.1f}"
        table.add_row(
            f"llama.cpp {llama_cpp['weights']}", "dense", _spread(speed), f"{size / 1e6:,.0f}", drawn, "", "1"
        )
    tables = [table]
    if result["kernels"]:
        kernels = PlainTable(
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
    if result.get("speculation"):
        tables.append(_speculation_table(result["speculation"]))
    return tables


def _speculation_table(runs: list[dict[str, Any]]) -> PlainTable:
    """What drafts cost and give; of random weights, what they would give at some acceptance."""
    written = runs[0]["tokens_per_second"] is not None
    table = PlainTable(
        "Decoding from drafts, verified by the dense model; median (min-max)"
        + ("" if written else "\nrandom weights: speedups are computed from the times of passes, for acceptance 0.85"),
        "drafts",
        "sparsity",
        "MB beside",
        "draft / step",
        "4 tokens / step",
        "acceptance",
        "tokens a pass",
        "tokens/s",
        "speedup",
        "other tokens",
    )
    for run in runs:
        step, draft = run["step_seconds"]["median"], run["draft_step_seconds"]
        expected = run["expected_speedups"]["0.85"]["speedup"]
        table.add_row(
            run["drafts"],
            f"{run['sparsity']:g}",
            f"{run['draft_bytes'] / 1e6:,.0f}",
            "" if draft is None else f"{draft['median'] / step:.2f}",
            f"{run['pass_seconds']['4']['median'] / step:.2f}",
            "" if run["acceptance"] is None else f"{run['acceptance']:.3f}",
            "" if run["tokens_per_pass"] is None else f"{run['tokens_per_pass']:.2f}",
            "" if not written else _spread(run["tokens_per_second"]),
            f"{expected:.2f}x" if not written else _times(run["speedup"]),
            "" if not written else f"{run['differing']} of {run['tokens']:,}",
        )
    return table


_OWN = 1.0
"""In place of a target, where the sparsity is the model's own; behind every target."""


def _of_first_weights(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of several kinds of weights the runs of the first; the others stand in the table of their verb."""
    runs = result["runs"] if result else []
    return [run for run in runs if run.get("quantization", "") == runs[0].get("quantization", "")]


def run_table(results: dict[str, dict[str, Any]]) -> PlainTable:
    """The end of a recipe: quality and speed side by side, dense against sparse."""
    quality, speed = results.get("eval"), results.get("bench")
    if quality and quality.get("kind") == "encoder":  # its measures stand in the table of eval
        quality = None
    table = PlainTable(
        "Dense against sparse", "sparsity", "realised", "perplexity", "over dense", "tokens/s", "speedup"
    )
    timed = [run.get("allocation") for run in _of_first_weights(speed)]
    tried = [run["sparse"]["allocation"] for run in _of_first_weights(quality)]
    own = next((name for name in tried if name in timed), tried[0] if tried else None)
    prefix = quality["dense_prefix"] if quality else None
    dense_row = (0.0, "")
    rows = {dense_row: ["0 (dense)", "0", "", "", "", ""]}

    def row(sparsity: float, allocation: str | None) -> list[str]:
        other = "" if allocation is None or own in (None, allocation) else allocation
        label = "own" if sparsity == _OWN else f"{sparsity:.2f} {other}".rstrip()
        return rows.setdefault(dense_row if sparsity == 0.0 else (sparsity, other), [label, "", "", "", "", ""])

    for run in _of_first_weights(quality):
        dense, sparse = run["dense"], run["sparse"]
        if sparse["allocation"] != own or run["dense_prefix"] != prefix:
            continue  # what was also tried stands in the table of eval
        rows[dense_row][2:4] = [_with_error(dense["perplexity"], dense["stderr"], 2), "1"]
        target = row(sparse["target_sparsity"] if sparse.get("neuron_sparsity") is None else _OWN, own)
        target[1] = f"{sparse['realised_sparsity']:.3f}"
        target[2] = _with_error(sparse["perplexity"], sparse["stderr"], 2)
        target[3] = f"{run['perplexity_ratio']:.3f}"
    for run in _of_first_weights(speed):
        target = row(run["sparsity"] if run.get("neuron_sparsity") is None else _OWN, run.get("allocation"))
        target[1] = target[1] or f"{run['realised_sparsity']:.3f}"
        target[4:6] = [f"{run['tokens_per_second']['median']:.2f}", f"{run['speedup']:.2f}x"]
    for key in sorted(rows):
        table.add_row(*rows[key])
    return table
