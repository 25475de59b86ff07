"""What the README and docs say of quality."""

from collections.abc import Iterable
from typing import Any

from tests.figures.page import TEXTS, Cell, Page, one, result

_STEM = "eval-smollm2-135m-"
_EVERY = (0.25, 0.4, 0.5, 0.65)


def _run(name: str, allocation: str, sparsity: float) -> Any:
    runs = result(_STEM + name)["runs"]
    found = [
        run
        for run in runs
        if run["sparse"]["allocation"] == allocation and run["sparse"]["target_sparsity"] == sparsity
    ]
    return found[0] if found else None


def _cell(name: str, allocation: str, sparsity: float, realised: bool = True) -> Cell:
    """Ratio, standard error and realised sparsity; None where it was not measured."""
    run = _run(name, allocation, sparsity)
    if run is None:
        return None
    cell = (run["perplexity_ratio"], run["perplexity_ratio_stderr"])
    return (*cell, run["sparse"]["realised_sparsity"]) if realised else cell


def _row(name: str, allocation: str, sparsities: Iterable[float] = _EVERY, realised: bool = True) -> tuple[Cell, ...]:
    return tuple(_cell(name, allocation, sparsity, realised) for sparsity in sparsities)


def readme_quality(page: Page) -> None:
    """The table of the README."""
    names = {"`uniform`": "uniform", "`greedy`, the paper's": "greedy", "`fisher`, the default": "fisher"}
    rows = {label: _row("sotu", allocation, (0.4, 0.5, 0.65)) for label, allocation in names.items()}
    page.table("| allocation | 40 % | 50 % | 65 % |", rows)


def benchmarks_quality(page: Page) -> None:
    """The table of docs/benchmarks.md, and what stands below."""
    rows = {
        "`uniform`": _row("sotu", "uniform", realised=False),
        "`greedy`, the paper's": _row("sotu", "greedy", realised=False),
        "`fisher`, the default": _row("sotu", "fisher", realised=False),
        "`fisher-site`, for small models on a CPU": _row("sotu-fisher-site", "fisher-site", realised=False),
        '`fisher` without the output layer (`--limits "lm_head=0:0"`)': _row("sotu-blocks", "fisher", realised=False),
    }
    page.table("| perplexity over dense | 25 % | 40 % | 50 % | 65 % |", rows)
    whole = result(_STEM + "sotu")
    page.says("Dense perplexity is {} ± {}.", whole["dense"]["perplexity"], whole["dense"]["stderr"])
    under = [run["sparse"]["target_sparsity"] - run["sparse"]["realised_sparsity"] for run in whole["runs"]]
    under += [
        run["sparse"]["target_sparsity"] - run["sparse"]["realised_sparsity"]
        for run in result(_STEM + "sotu-fisher-site")["runs"]
    ]
    page.says("Realised sparsity is {} to {} under the target", min(under), max(under))
    kinds = [
        one(result("quantised-smollm2-135m")["runs"], quantize=kind, quantize_output=False, method=method)[
            "perplexity_ratio"
        ]
        for kind, method in (("int8", "nearest"), ("int4:128", "gptq"), ("int4:64", "gptq"))
    ]
    page.says("cost {} in int8, {} in int4 with groups of 128, and {} with groups of 64", *kinds)


def benchmarks_beside_llama_cpp(page: Page) -> None:
    """What quantised weights cost here and in llama.cpp, and their bytes."""
    names = {
        "Q8_0": "llama.cpp `Q8_0`",
        "Q4_K_M": "llama.cpp `Q4_K_M`",
        "Q4_0": "llama.cpp `Q4_0`",
        "int8": "`teal` int8",
        "int4:32": "`teal` int4, groups of 32",
        "int4:64": "`teal` int4, groups of 64",
        "int4:128": "`teal` int4, groups of 128",
    }
    runs = {run["weights"]: run for run in result("quality-4bit-llama")["runs"] if run["channels"] == "permuted"}
    rows = {
        label: (runs[name]["bytes_per_weight"], (runs[name]["perplexity_ratio"], runs[name]["stderr"]))
        for name, label in names.items()
        if name in runs
    }
    page.table("| weights | bytes a weight | perplexity over float32 |", rows)
    sparse = runs["int4:32"]["sparse"]
    page.says(
        "At 50 % ({} realised) int4 with groups of 32 costs {} over float32, {} ± {} of it",
        *(sparse[key] for key in ("realised_sparsity", "perplexity_ratio", "over_its_dense", "over_its_dense_stderr")),
    )
    packaged = {run["weights"]: run for run in result("quality-4bit-llama")["runs"] if run["channels"] == "packaged"}
    page.says(
        "finds the codes again, {} ± {}, and `Q4_0` does not, {} ± {}",
        *(packaged[name][key] for name in ("int4:32", "Q4_0") for key in ("perplexity_ratio", "stderr")),
    )


def method_output_layer(page: Page) -> None:
    """What the output layer is worth."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for text, stem in (
        ("State of the Union, 16 sequences", "sotu"),
        ("Moby Dick, 8", "moby-dick"),
        ("Debian handbook, 8", "debian-handbook"),
    ):
        rows[f"{text} | blocks only"] = _row(f"{stem}-blocks", "fisher", (0.4, 0.5, 0.65))
        rows[f"{text} | with the output layer"] = _row(stem, "fisher", (0.4, 0.5, 0.65))
    page.table("| text | | 40 % | 50 % | 65 % |", rows, labels=2)
    share = _run("sotu", "fisher", 0.5)["realised_by_projection"]["lm_head"]
    page.says("at 50 % fisher drops {} % of its inputs", 100 * share)


def method_bytes(page: Page) -> None:
    """Quality over bytes a token, training-free."""

    def cell(stem: str, allocation: str, sparsity: float) -> Cell:
        run = _run(f"{stem}-80" if sparsity == 0.8 else stem, allocation, sparsity)
        if run is None:
            return None
        share = run["sparse"]["bytes_per_token"] / run["dense"]["bytes_per_token"]
        return run["perplexity_ratio"], run["perplexity_ratio_stderr"], share

    each = [(name, sparsity) for name in ("uniform", "greedy") for sparsity in (0.4, 0.5, 0.65)]
    each += [("fisher", sparsity) for sparsity in (0.25, 0.4, 0.5, 0.65, 0.8)]
    rows = {
        f"`{name}`, {100 * sparsity:.0f} %": tuple(cell(stem, name, sparsity) for stem in TEXTS)
        for name, sparsity in each
    }
    page.table("| allocation | State of the Union | Moby Dick | Debian handbook |", rows)


def method_trained_bytes(page: Page) -> None:
    """The same of trained models, which ran in bfloat16."""
    dense = result("eval-smollm2-135m-sotu")["runs"][0]["dense"]["bytes_per_token"] / 2
    calls = [call["results"] for call in result("adapt-smollm2-135m")["calls"]]
    _, _, _, _, _, longer, longest, _, more_text, _, _, _, ends, seeds, rest = calls

    def of(texts: Any) -> tuple[Cell, ...]:
        each = [texts[text] for text in TEXTS]
        return tuple((text["perplexity_ratio"], text["stderr"], text["bytes_per_token"] / dense) for text in each)

    def row(results: Any, arm: str) -> tuple[Cell, ...]:
        return of(one(results, arm=arm, seed=0)["texts"])

    relu = one(one(seeds, arm="relu, text")["fatrelu"], live_dropped=0.4)
    rows = {
        "`recover`, 50 %": row(longest, "recover 50 %"),
        "`recover`, 65 %": row(longer, "recover 65 %"),
        "`recover`, 80 %": row(longest, "recover 80 %"),
        "`prosparse`, 84 % zeros": row(longest, "prosparse, grown to half"),
        "`recover`, 50 %, `--text-weight 1`": row(seeds, "recover 50 %, text"),
        "`recover`, 65 %, `--text-weight 1`": row(seeds, "recover 65 %, text"),
        "`recover`, 80 %, `--text-weight 1`": row(ends, "recover 80 %, text, rate 1e-3"),
        "`prosparse`, 89 % zeros, `--text-weight 1`": row(seeds, "prosparse, grown, text"),
        "`relu`, then FATReLU on 40 % of live gates, `--text-weight 1`": of(relu["texts"]),
        "`drelu`, 82 % zeros, `--text-weight 1`": row(more_text, "drelu, steered, text"),
        "`lte`, 50 %, `--text-weight 1`": row(seeds, "lte 50 %, text"),
        "`lte`, 70 %, `--text-weight 1`": row(rest, "lte 70 %, text"),
        "the dense model, `--text-weight 1`: the control": row(seeds, "dense, text"),
    }
    page.table("| recipe | State of the Union | Moby Dick | Debian handbook |", rows)


def method_likely_tokens(page: Page) -> None:
    """A predictor in front of the output layer."""
    trials = result("training-free-trials-smollm2-135m-cpu")["trials"]

    def cells(run: Any) -> tuple[Cell, ...]:
        keys = ("top1_agreement", "top1_agreement_stderr", "exact_argmax", "perplexity_ratio")
        each = [run["texts"][text] for text in TEXTS]
        return tuple(tuple(entry[key] for key in keys if key in entry) for entry in each)

    rows = {"`fisher`": cells(trials["baseline"]["results"][0])}
    rows |= {f"best {run['rows']} rows": cells(run) for run in trials["sketch"]["results"]}
    page.table("| at 50 % | State of the Union | Moby Dick | Debian handbook |", rows)
    page.says("so the blocks drop {} %", 100 * trials["sketch"]["results"][0]["sparsity_of_blocks"])


def method_calibration(page: Page) -> None:
    """What calibration takes."""
    greedy = result("calibrate-smollm2-135m")
    page.says(
        "that is {} runs of a block, whole or in part, where trying every projection at every step takes {}: "
        "{} seconds for {} tokens on two CPU cores, against {} for the sensitivities of the blocks on {}",
        greedy["greedy_forwards"],
        greedy["greedy_naive_forwards"],
        greedy["greedy_seconds"],
        greedy["greedy_tokens"],
        greedy["sensitivity_seconds"],
        greedy["sensitivity_tokens"],
    )


def benchmarks_calibration(page: Page) -> None:
    """What calibration takes by default, and of a large model."""
    fisher = result("calibrate-smollm2-135m-fisher")
    page.says("take {} seconds on two CPU cores, the histograms {} (", fisher["sensitivity_seconds"], fisher["seconds"])
    gpu = result("calibrate-gpu")["steps"]
    page.says(
        "histograms {} s, sensitivities {} s, allocation {} s, thresholds {} s, at most {} GB",
        *[gpu[step]["seconds"] for step in ("histograms", "sensitivities", "allocation fisher", "propagation")],
        max(step["peak_gb"] for step in gpu.values()),
    )


def method_recalibrated(page: Page) -> None:
    """Thresholds before and after the pass through the sparse network."""
    rows = {
        f"{allocation} | {sparsity:.0%}".replace("%", " %"): (
            _cell("sotu-no-propagate", allocation, sparsity),
            _cell("sotu", allocation, sparsity),
        )
        for allocation in ("uniform", "fisher")
        for sparsity in (0.5, 0.65)
    }
    page.table("| allocation | target | as the dense network's quantiles give | recalibrated |", rows, labels=2)


def benchmarks_allocations(page: Page) -> None:
    """Allocations on four texts, and text that the model itself wrote."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for text, stem in (
        ("State of the Union, 16 sequences", "sotu"),
        ("Moby Dick, 8", "moby-dick"),
        ("Debian handbook, 8", "debian-handbook"),
        ("State of the Union, 8, only 4 positions dense", "sotu-prefix-4"),
    ):
        for allocation in ("uniform", "greedy", "fisher"):
            rows[f"{text} | {allocation}"] = _row(stem, allocation)
        if stem == "sotu":
            rows[f"{text} | fisher-site"] = _row("sotu-fisher-site", "fisher-site")
    page.table("| text | allocation | 25 % | 40 % | 50 % | 65 % |", rows, labels=2)

    rows, missed = {}, {"uniform": [], "fisher": []}  # type: ignore[var-annotated]
    for text, stem in (("Moby Dick", "moby-dick"), ("Debian handbook", "debian-handbook")):
        for allocation in ("uniform", "fisher"):
            for source, name in (("sotu", stem), ("self", f"self-{stem}")):
                rows[f"{text} | {source} | {allocation}"] = _row(name, allocation, (0.4, 0.5, 0.65))
            own = [_run(f"self-{stem}", allocation, sparsity)["sparse"] for sparsity in (0.4, 0.5, 0.65)]
            missed[allocation] += [run["target_sparsity"] - run["realised_sparsity"] for run in own]
    page.table("| text | calibrated on | allocation | 40 % | 50 % | 65 % |", rows, labels=3)
    bounds = [bound(missed[allocation]) for allocation in ("uniform", "fisher") for bound in (min, max)]
    page.says("uniform {} to {} and fisher {} to {} under the target", *bounds)


def benchmarks_trials(page: Page) -> None:
    """What was tried and is not here."""
    whole = result("quality-trials-smollm2-135m")
    first, added = whole["results"], whole["added"][0]["results"]

    def ratio(runs: Any, variant: str, allocation: str) -> float:
        return float(one(runs, variant=variant, allocation=allocation)["perplexity_ratio"])

    def both(runs: Any, variant: str) -> tuple[Cell, ...]:
        return ratio(runs, variant, "uniform"), ratio(runs, variant, "fisher"), None

    output, principal = "output layer at 25 %", "rotated stream: principal axes"
    alone = tuple(ratio(added, "threshold", name) for name in ("fisher", "uniform"))
    rotated_output = both(added, f"{principal}, 3 % more, {output}")[:2]
    without = tuple(ratio(added, output, name) for name in ("uniform", "fisher"))
    again = [
        (ratio(first, "threshold", f"re-linearised {n} times"), ratio(first, "threshold", f"both, {n}")) for n in (1, 2)
    ]
    asked = _texts(added, principal, "realised_sparsity", *TEXTS)
    rows: dict[str, tuple[Cell, ...]] = {
        "one threshold a projection": both(first, "threshold"),
        "magnitude times the norm of the input's weights (WINA)": both(first, "WINA: times the norm of the weights"),
        "per-token top-k": both(first, "per-token top-k"),
        "mean of the dropped inputs put back": both(first, "mean of dropped inputs"),
        "outputs scaled and shifted to the dense ones' mean": both(first, "outputs scaled and shifted"),
        "dropped inputs through a low-rank matrix of 5 % of the bytes (R-Sparse)": both(
            first, "low rank for dropped inputs (R-Sparse)"
        ),
        "MLP input rotated to its principal axes, the rotation read as well (LaRoSA)": both(
            first, "rotated MLP input (LaRoSA)"
        ),
        "the residual stream rotated to its principal axes, absorbed into the weights (LaRoSA, QuaRot)": (
            *both(added, principal)[:2],
            asked,
        ),
        "the same, asked for 53 %: as many bytes as without": (*both(added, f"{principal}, 3 % more")[:2], alone),
        "the same, and the output layer at 25 %": (*rotated_output, without),
        "the residual stream rotated to random axes": both(added, "rotated stream: random axes"),
        "sensitivities measured again with the first allocation on, once": (None, *again[0]),
        "the same twice": (None, *again[1]),
        "the output layer too, at 25 %, and less elsewhere": both(first, output),
    }
    page.table("| variant | uniform | fisher | |", rows)
    others = _texts(added, principal, "realised_sparsity", "moby-dick", "debian-handbook")
    page.says("of other text {} is dropped where {} was asked for", others, whole["added"][0]["sparsity"])
    page.says("of held-out State of the Union messages {}.", _texts(added, principal, "realised_sparsity", "sotu"))
    page.says("logits differ by {}e-6 of their norm", whole["added"][0]["relative_logits_error"]["principal"] * 1e6)
    page.says(
        "at equal bytes {} for {}, and fisher not",
        ratio(added, f"{principal}, 3 % more", "uniform"),
        ratio(added, "threshold", "uniform"),
    )
    sotu = [
        one(added, variant=variant, allocation="fisher")["texts"]["sotu"]
        for variant in (principal, f"{principal}, 3 % more", "threshold")
    ]
    quoted = [run[key] for run in sotu for key in ("perplexity_ratio", "stderr", "realised_sparsity")]
    page.says("fisher comes to {} ± {} ({}) and, asked for 53 %, {} ± {} ({}); {} ± {} ({}) without", *quoted)


def _texts(runs: Any, variant: str, key: str, *texts: str) -> float:
    """Mean over these texts and both allocations."""
    found = [run["texts"][text][key] for run in runs if run["variant"] == variant for text in texts]
    return float(sum(found) / len(found))


def method_quantised(page: Page) -> None:
    """What each step of quantising costs."""
    runs = result("quantised-smollm2-135m")["runs"]
    rows: dict[str, tuple[Cell, ...]] = {}
    for label, kind, output, method in (
        ("as it is", None, False, ""),
        ("int8", "int8", False, "nearest"),
        ("int8 and output layer", "int8", True, "nearest"),
        ("int4 (128), nearest codes", "int4:128", False, "nearest"),
        ("int4 (128)", "int4:128", False, "gptq"),
        ("int4 (128), int8 output layer", "int4:128", True, "gptq"),
        ("int4:64", "int4:64", False, "gptq"),
        ("int4:32", "int4:32", False, "gptq"),
    ):
        run = one(runs, quantize=kind, quantize_output=output, method=method)
        plain = kind is None
        rows[label] = (
            run["perplexity_ratio"] if plain else (run["perplexity_ratio"], run["stderr"]),
            (run["and_sparse_ratio"], run["and_sparse_stderr"]),
            run["both_over_product"],
            None if plain else run["quantize_seconds"],
        )
    page.table("| | quantised | quantised and sparse | over the product of the two | seconds to quantise |", rows)
    realised = [run["realised_sparsity"] for run in runs]
    page.says("realised {} to {}; on an H100", min(realised), max(realised))
    groups = result("quantised-groups-smollm2-135m")["runs"]
    quoted = [
        one(groups, group=group, along=along)[key]
        for group in (128, 64)
        for along in ("inputs", "outputs")
        for key in ("perplexity_ratio", "stderr")
    ]
    page.says("cost {} ± {} along inputs and {} ± {} along outputs, of 64 {} ± {} and {} ± {}", *quoted)


def benchmarks_gate_first(page: Page) -> None:
    """Gated MLPs whose neurons are mostly zero."""
    cpu, gpu, two = (result(f"gate-first-{name}")["runs"] for name in ("cpu", "gpu", "cpu-2-threads"))
    dead = (0.5, 0.7, 0.8, 0.89, 0.95)
    rows = {
        dtype: tuple(one(cpu, dtype=dtype, sparsity=share)["speedup"] for share in dead)
        for dtype in ("float32", "bfloat16")
    }
    page.table("| dead neurons | 50 % | 70 % | 80 % | 89 % | 95 % |", rows)
    page.says("at 89 %: {} in float32 and {} in bfloat16", *[one(two, dtype=dtype)["speedup"] for dtype in rows])

    def spread(of: Any) -> Cell:
        return of["median"], of["min"], of["max"]

    runs = [one(gpu, sparsity=share) for share in dead]
    header = "| dead neurons | " + " | ".join(f"{100 * run['realised_sparsity']:.3g} %" for run in runs) + " |"
    page.table(
        header,
        {
            "dense: cuBLAS": [spread(run["dense_microseconds"]["cublas"]) for run in runs],
            "dense: our kernels": [spread(run["dense_microseconds"]["own"]) for run in runs],
            "gate product, then up": [spread(run["parts_microseconds"]["separate"]) for run in runs],
            "gate and up in one launch": [spread(run["microseconds"]) for run in runs],
            "our dense over it": [run["speedup"] for run in runs],
        },
    )


def models_encoder(page: Page) -> None:
    """Encoders."""
    runs = result("minilm-l6-v2")["runs"]
    rows: dict[str, tuple[Cell, ...]] = {}
    for allocation in ("uniform", "fisher"):
        for target in (0.25, 0.38, 0.4, 0.5):
            run = one(runs, allocation=allocation, target_sparsity=target)
            cells = (run["realised_sparsity"], (run["cosine"], run["cosine_stderr"]), run["least_cosine"])
            rows[f"{allocation} | {target:g}"] = cells
    page.table("| allocation | target | realised | cosine, mean | least |", rows, labels=2)
    best = one(runs, allocation="fisher", target_sparsity=0.38)
    page.says(
        "At 38 % fisher gives {} ± {}; at 40 % no allocation reaches {}.", best["cosine"], best["cosine_stderr"], "0.97"
    )
    assert max(run["cosine"] for run in runs if run["target_sparsity"] == 0.4) < 0.97
