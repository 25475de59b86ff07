"""What docs/benchmarks.md says of speed on a CPU."""

from typing import Any

from tests.figures.page import Cell, Page, at, median, one, result


def benchmarks_cpu(page: Page) -> None:
    """A small model on a CPU."""
    runs = result("decode-smollm2-135m-cpu")["runs"]

    def row(entry: Any) -> tuple[Cell, ...]:
        spread = entry["tokens_per_second"]
        realised = entry["realised_sparsity"] if entry["sparsity"] else None
        return realised, (spread["median"], spread["min"], spread["max"]), entry["speedup"]

    rows = {
        "transformers generate, dense": row(one(runs, backend="transformers generate")),
        "transformers, torch.compile, dense": row(one(runs, backend="transformers, torch.compile")),
        "`teal`, dense": row(one(runs, backend="dense")),
    }
    for allocation in ("fisher", "fisher-site"):
        for sparsity in (0.4, 0.5, 0.65):
            entry = at(runs, sparsity, allocation=allocation)
            rows[f"`teal`, `{allocation}`, {100 * sparsity:.0f} %"] = row(entry)
    page.table("| tokens/s | sparsity realised | median of 5 (min to max) | over our dense |", rows)


def benchmarks_llama_cpp(page: Page) -> None:
    """A CPU, beside llama.cpp."""
    widths = (("float32", "F32"), ("bfloat16", "BF16"), ("int8", "Q8_0"), ("int4:32", "Q4_0"))
    rows: dict[str, tuple[Cell, ...]] = {}
    for machine, file, of_half in (
        ("", "decode-cpu-llama", "of 50 %"),
        ("Xeon ", "decode-cpu-llama-xeon", "where 50 % was asked for"),
        ("AVX2 alone ", "decode-cpu-llama-avx2", "at 50 %"),
    ):
        cells = result(file)["cells"]
        rows, realised = {}, []
        for width, theirs in widths:
            cell = cells.get(f"smollm2-135m/{width}/t2/c64")
            if cell is None:
                continue  # not measured there
            over = [(median(run), run["over_llama_cpp"]["median"]) for run in cell["runs"]]
            rows[f"{width}, `{theirs}`"] = (median(cell["llama_cpp"]), *over)
            realised.append(at(cell["runs"], 0.5)["realised_sparsity"])
        page.table(f"| {machine}| llama.cpp | `teal`, dense | 40 % | 50 % | 65 % |", rows)
        page.says(f"realised {{}} to {{}} {of_half}", min(realised), max(realised))
    busy = result("decode-cpu-llama-xeon")["cells"]["smollm2-135m/int4:32/t2/c64"]["runs"]
    over = at(busy, 0.5)["over_llama_cpp"]
    page.says("rounds of int4 lay between {} and {} times llama.cpp", over["min"], over["max"])
    page.is_no_result("its memory gave 40 to 65 GB/s", "looked at by hand, between the runs")
    for cell, after in (("smollm2-135m/int8/t2/c2048", "The shape"), ("llama-3.2-1b/bfloat16/t2/c64", "Small models")):
        over_both = _dense_and_half(cell, "decode-cpu-llama-avx2")
        page.says(f"is {{}} times llama.cpp dense and {{}} times at 50 %. {after}", *over_both)

    rows = {}
    for label, name in (
        ("SmolLM2-135M, one thread", "smollm2-135m/{}/t1/c64"),
        ("four threads on the two cores", "smollm2-135m/{}/t4/c64"),
        ("after 2,048 tokens", "smollm2-135m/{}/t2/c2048"),
        ("after 8,000 tokens", "smollm2-135m/{}/t2/c8000"),
        ("Qwen2.5-0.5B shape", "qwen2.5-0.5b/{}/t2/c64"),
        ("Llama-3.2-1B shape", "llama-3.2-1b/{}/t2/c64"),
    ):
        rows[label] = tuple(_dense_and_half(name.format(width)) for width, _ in widths)
    page.table("| dense, 50 % over llama.cpp | float32 | bfloat16 | int8 | int4 |", rows)


def benchmarks_families_cpu(page: Page) -> None:
    """Small shapes of other families on a CPU, beside llama.cpp."""
    cells = result("decode-cpu-families")["cells"]
    for width, theirs in (("int8", "Q8_0"), ("bfloat16", "BF16")):
        rows: dict[str, tuple[Cell, ...]] = {}
        for name in cells:
            if name.endswith(f"/{width}"):
                over = [(median(run), run["over_llama_cpp"]["median"]) for run in cells[name]["runs"]]
                rows[f"`{name.partition('/')[0]}`"] = (median(cells[name]["llama_cpp"]), *over)
        page.table(f"| family, {width} | llama.cpp `{theirs}` | `teal`, dense | 50 % |", rows)
    runs = [run for cell in cells.values() for run in cell["runs"]]
    for sparsity, said in ((0, "dense {} to {} times"), (0.5, "at 50 % {} to {} times")):
        over = [run["over_llama_cpp"]["median"] for run in runs if run["sparsity"] == sparsity]
        page.says(f"{said} llama.cpp", min(over), max(over))


def _dense_and_half(name: str, file: str = "decode-cpu-llama") -> tuple[Any, ...]:
    cells = result(file)["cells"]
    if name not in cells:
        return ()  # not measured
    return tuple(at(cells[name]["runs"], sparsity)["over_llama_cpp"]["median"] for sparsity in (0, 0.5))
