"""What the README and docs/benchmarks.md say of speed."""

import re
from typing import Any

from tests.figures.page import Cell, Page, at, median, one, result


def _gpu(model: str = "llama-3-8b", prompt: int = 128) -> Any:
    return one(result("decode-gpu")["runs"], model=f"{model} (random weights)", prompt_tokens=prompt)["runs"]


def _share(entry: Any) -> float:
    """Per cent of what the memory allows."""
    return 100 * median(entry) / float(entry["limit_tokens_per_second"])


def _peers(session: int) -> Any:
    return result("decode-gpu-peers")["sessions"][session]


def readme_speed(page: Page) -> None:
    """The table of the README."""
    own, peers, later = (
        result("decode-gpu-beside-gpt-fast"),
        _peers(0)["tokens_per_second"],
        _peers(1)["tokens_per_second"],
    )
    rows: dict[str, tuple[Cell, ...]] = {
        "H100, Llama-3-8B shape": (
            own["ours_dense"]["median"],
            own["ours_50"]["median"],
            (own["gpt_fast"]["median"], peers["transformers generate, static cache, compiled"]),
        ),
        "the same in int4": (later["teal, int4, dense"], later["teal, int4, 50 %"], later["gpt-fast, int4"]),
    }
    vllm = {run["run"]: run for run in result("vllm-llama-3-8b-gpu")["runs"]}
    for label, bits, served in (
        ("H200, Llama-3-8B shape", "", "vllm-dense"),
        ("H200, the same in int4", "-int4", "vllm-marlin"),
    ):
        both = (vllm[f"teal{bits}-{kind}"]["teal_loop_tokens_per_second"]["median"] for kind in ("dense", "sparse"))
        rows[label] = *both, vllm[served]["tokens_per_second_after_first"]
    others = _peers(2)["models"]
    compiled = others["phi-4-mini"]["transformers_compiled"]
    for label, model, instead in (
        ("H200, Phi-4-mini shape", "phi-4-mini", (compiled["min"], compiled["max"])),
        ("H200, Gemma-3-4B shape", "gemma-3-4b", others["gemma-3-4b"]["transformers_eager"]),
        ("H200, Mixtral-8x7B shape", "mixtral-8x7b", None),
        ("H200, Qwen3-30B-A3B shape", "qwen3-30b-a3b", None),
    ):
        run = one(result("families-gpu")["runs"], model=model)
        rows[label] = median(run["dense"]), median(run["sparse"]), instead
    rows["two CPU cores, SmolLM2-135M"] = _beside_llama_cpp("bfloat16")
    rows["two CPU cores, int8"] = _beside_llama_cpp("int8")
    rows["two CPU cores, int4"] = _beside_llama_cpp("int4:32")
    page.table("| | `teal`, dense | `teal`, 50 % | instead |", rows)


def _cell(name: str) -> Any:
    """One comparison with llama.cpp."""
    return result("decode-cpu-llama")["cells"][name]


def _beside_llama_cpp(width: str) -> tuple[Cell, ...]:
    cell = _cell(f"smollm2-135m/{width}/t2/c64")
    return median(at(cell["runs"], 0)), median(at(cell["runs"], 0.5)), median(cell["llama_cpp"])


def benchmarks_gpu(page: Page) -> None:
    """One sequence on a GPU."""
    runs = _gpu()
    rows: dict[str, tuple[Cell, ...]] = {
        "gpt-fast, dense": (None, result("decode-gpu-beside-gpt-fast")["gpt_fast"]["median"], None),
        "`teal`, dense": (None, median(at(runs, 0)), _share(at(runs, 0))),
    }
    for sparsity in (0.25, 0.4, 0.5, 0.65, 0.8):
        entry = at(runs, sparsity)
        rows[f"`teal`, {sparsity:.0%}".replace("%", " %")] = (entry["realised_sparsity"], median(entry), _share(entry))
    page.table("| Llama-3-8B | sparsity realised | tokens/s | of what the memory allows |", rows)

    rows = {}
    for label, model, prompt in (
        ("Llama-3-8B after 2,048 tokens", "llama-3-8b", 2048),
        ("Llama-3-8B after 8,000 tokens", "llama-3-8b", 8000),
        ("Llama-2-7B", "llama-2-7b", 128),
        ("Mistral-7B", "mistral-7b", 128),
        ("Llama-3.2-1B", "llama-3.2-1b", 128),
        ("Llama-3.2-3B", "llama-3.2-3b", 128),
    ):
        dense, half = at(_gpu(model, prompt), 0), at(_gpu(model, prompt), 0.5)
        rows[label] = (median(dense), median(half), half["speedup"], half["realised_sparsity"])
    page.table("| shape | dense | 50 % | over dense | realised |", rows)

    whole = result("decode-gpu")
    page.says("read at up to {} TB/s. A prompt", whole["runs"][0]["reading_gb_s"] / 1000)
    prefill = whole["prefill"]
    page.says("A prompt of {} tokens takes {} of transformers'", prefill["tokens"], prefill["ratio"])
    memory = whole["peak_memory_bytes"]
    page.says("the cache and {} %", 100 * (memory["peak"] / (memory["weights"] + memory["cache"]) - 1))
    spread = max(
        1 - entry["tokens_per_second"]["min"] / entry["tokens_per_second"]["max"]
        for run in whole["runs"]
        for entry in run["runs"]
    )
    assert spread < 0.008
    page.says("differ by less than {} %", "0.8")
    fisher = [median(at(result("decode-gpu-fisher")["runs"], sparsity)) for sparsity in (0.4, 0.5, 0.65)]
    page.says("{} tokens/s at 40 %, {} at 50 %, {} at 65 %", *fisher)


def benchmarks_quantised(page: Page) -> None:
    """Quantised weights on a GPU."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for name, stem in (("int8", "decode-gpu-int8"), ("int4, groups of 128", "decode-gpu-int4")):
        for entry in result(stem)["runs"]:
            sparsity = entry["sparsity"]
            label = f"{name}, dense" if not sparsity else f"{name}, {sparsity:.0%}".replace("%", " %")
            realised = entry["realised_sparsity"] if sparsity else None
            rows[label] = (realised, median(entry), entry["bytes_per_token"] / 1e9, _share(entry))
    page.table(
        "| Llama-3-8B, quantised | sparsity realised | tokens/s | GB a token | of what the memory allows |", rows
    )
    page.says("read at up to {} TB/s (", result("decode-gpu-int8")["reading_gb_s"] / 1000)


def benchmarks_peers(page: Page) -> None:
    """What others reach."""
    peers, later = _peers(0)["tokens_per_second"], _peers(1)["tokens_per_second"]
    names = {
        "transformers `generate`, eager": "transformers generate, eager",
        "transformers `generate`, static cache, compiled": "transformers generate, static cache, compiled",
        "gpt-fast, float16, compiled": "gpt-fast, float16, compiled",
        "the method's reference code on gpt-fast, 40 %": "reference TEAL code on gpt-fast, 40 %",
        "the same, 50 %": "reference TEAL code on gpt-fast, 50 %",
        "gpt-fast, int8": "gpt-fast, int8",
        "gpt-fast, int4, groups of 128": "gpt-fast, int4, groups of 128",
    }
    page.table("| one H100, Llama-3-8B shape | tokens/s |", {label: (peers[name],) for label, name in names.items()})
    ours = [later[f"teal, {name}"] for name in ("dense", "40 %", "50 %", "65 %", "int4, dense", "int4, 50 %")]
    page.says("ours {} dense, {}, {} and {} at 40, 50 and 65 %, in int4 {} dense and {} at 50 %;", *ours)
    theirs = [later[name] for name in ("gpt-fast, compiled", "gpt-fast, int4", "transformers generate, eager")]
    page.says("gpt-fast {}, in int4 {}; transformers eager {}.", *theirs)


_VLLM = {
    "`teal`, dense": "teal-dense",
    "`teal`, 50 %": "teal-sparse",
    "`teal`, int4, dense": "teal-int4-dense",
    "`teal`, int4, 50 %": "teal-int4-sparse",
    "vLLM, dense": "vllm-dense",
    "vLLM with our plugin, 50 %": "vllm-plugin",
    "vLLM, int4 by Marlin": "vllm-marlin",
    "vLLM, int4 by Machete, its own choice": "vllm-int4",
}


def benchmarks_vllm(page: Page) -> None:
    """vLLM."""
    own = result("vllm-llama-3-8b-gpu")
    rows: dict[str, tuple[Cell, ...]] = {}
    for label, name in _VLLM.items():
        run = one(own["runs"], run=name)
        loop, later = run["teal_loop_tokens_per_second"], run["tokens_per_second_after_first"]
        seconds = run["reply_seconds"]["median"], run["first_token_seconds"]["median"]
        rows[label] = None if loop is None else loop["median"], later, *seconds
    columns = "steps alone, tokens/s | after the first token, tokens/s | s of a reply | s to its first token"
    page.table(f"| one H200, Llama-3-8B shape | {columns} |", rows)
    sparse = one(own["runs"], run="teal-sparse")
    page.says("Ours skipped {} of the inputs; in vLLM nobody", sparse["realised_sparsity"])
    ends = [sparse[part][end] for part in ("reply_seconds", "first_token_seconds") for end in ("min", "max")]
    page.says("at 50 % replies took {} to {} s, first tokens {} to {} s.", *ends)
    noted = own["noted"]
    before, since = (1e3 * sorted(noted[f"first_tokens_{when}_seconds"])[2] for when in ("before", "since"))
    opening = 1e3 * noted["of_which_opening_a_session_seconds"]
    page.says("opening a session took {} ms of {} in another process", opening, before)
    page.says("first token of the dense model takes {} ms since", since)
    tuned = result("tile-configs-llama-3-8b-h200")
    dense, half, four = *tuned["int4"]["runs"], tuned["four_rows"]["runs"][0]
    speeds = [run["tokens_per_second"]["median"] for run in (dense, half, four)]
    page.says("decodes {} tokens/s dense and {} at 50 %", *speeds[:2])
    page.says("(realised {}: `o` is", half["realised_sparsity"])
    page.says("four bfloat16 sequences {} together", speeds[2])
    page.says("begins with the {} tokens of ours", one(own["runs"], run="vllm-dense")["first_tokens_as_ours"])


_FAMILIES = {
    "Llama-3-8B": "llama-3-8b",
    "Phi-4-mini": "phi-4-mini",
    "Phi-2": "phi-2",
    "Gemma-2-2B": "gemma-2-2b",
    "Gemma-3-4B": "gemma-3-4b",
    "OLMo-2-7B": "olmo-2-7b",
    "Command R7B": "command-r7b",
    "Granite-3.3-8B": "granite-3.3-8b",
    "GLM-4-9B": "glm-4-9b",
    "SmolLM3-3B": "smollm3-3b",
    "Minitron-4B": "minitron-4b",
    "StarCoder2-3B": "starcoder2-3b",
    "Pythia-6.9B": "pythia-6.9b",
    "OPT-6.7B": "opt-6.7b",
    "Mixtral-8x7B": "mixtral-8x7b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "gpt-oss-20b": "gpt-oss-20b",
}

_COMPILED = ("Gemma-3-4B", "Mixtral-8x7B", "Qwen3-30B-A3B")


def benchmarks_families(page: Page) -> None:
    """Families other than Llama's on a GPU, and a token that is sparse by training."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for label, model in _FAMILIES.items():
        run = one(result("families-gpu")["runs"], model=model)
        dense, half = run["dense"], run["sparse"]
        shares = [100 * entry["of_the_limit"] for entry in (dense, half)]
        rows[label] = (median(dense), shares[0], median(half), shares[1], half["speedup"], half["realised_sparsity"])
    share = "of what the memory allows"
    page.table(f"| one H200, shape | dense | {share} | 50 % | {share} | over dense | realised |", rows)
    beside = {label: one(result("families-gpu")["beside_transformers"], model=_FAMILIES[label]) for label in _COMPILED}
    page.table(
        "| one H200, 8 blocks of | transformers, compiled | `teal`, dense | 50 % |",
        {
            label: (own["transformers_compiled"]["max"], own["ours_dense"]["median"], own["ours_50"]["median"])
            for label, own in beside.items()
        },
    )
    others = _peers(2)["models"]
    compiled = others["phi-4-mini"]["transformers_compiled"]
    more = [others[name]["transformers_compiled"] for name in ("mixtral, 8 layers", "qwen3-30b-a3b, 16 layers")]
    eager = others["gemma-3-4b"]["transformers_eager"]
    page.says(
        "Phi-4-mini {} to {} tokens/s, Mixtral of 8 blocks {}, Qwen3-30B-A3B of 16 blocks {}; Gemma-3-4B {}, eager",
        *(compiled["min"], compiled["max"], *more, eager),
    )
    ways = {entry["way"]: entry for entry in result("gate-first-tokens-gpu")["tokens"]}
    labels = {
        "nothing, ordinary tables": "dense on tables",
        "nothing, gate first": "gate first, dense",
        "zeros": "zeros",
        "zeros, and 52 % of the inputs of attention": "zeros, attention 50%",
        "zeros, and 68 % of the inputs of attention": "zeros, attention 65%",
    }
    page.table(
        "| what is skipped | tokens/s | over dense |",
        {label: (median(ways[way]), ways[way]["speedup"]["median"]) for label, way in labels.items()},
    )


def benchmarks_batches(page: Page) -> None:
    """Several sequences on a GPU."""
    rows: dict[str, tuple[Cell, ...]] = {}
    for quantised in ("", "int8", "int4"):
        for name, batch in (("two", 2), ("four", 4), ("eight", 8)):
            runs = result(f"decode-gpu-{quantised}-batch-{batch}".replace("--", "-"))["runs"]
            measured = {entry["sparsity"]: median(entry) for entry in runs}
            label = f"{name}, {quantised}" if quantised else name
            rows[label] = tuple(measured.get(sparsity) for sparsity in (0, 0.4, 0.5, 0.65, 0.8))
    page.table("| Llama-3-8B, sequences at a time | dense | 40 % | 50 % | 65 % | 80 % |", rows)


def benchmarks_streams(page: Page) -> None:
    """Streams of the scheduler and of the server beside batches."""
    scheduled = {entry["rows"]: entry["tokens_per_second"] for entry in result("streams-llama-3-8b-gpu")["streams"]}
    runs = result("serve-llama-3-8b-gpu")["runs"]
    served = {(run["sparsity"], run["streams"]): run["tokens_per_second"]["median"] for run in runs}
    rows: dict[str, tuple[Cell, ...]] = {
        "one": (served[0.0, 0], None, served[0.0, 1], served[0.5, 0], None, served[0.5, 1])
    }
    for name, count in (("two", 2), ("four", 4)):
        own = {key: spread["median"] for key, spread in scheduled[count].items()}
        dense = (own["batch dense"], own["streams dense"], served[0.0, count])
        rows[name] = (*dense, own["batch"], own["streams"], served[0.5, count])
    page.table(
        "| Llama-3-8B, H200, streams | batch, dense | scheduler | server | batch, 50 % | scheduler | server |", rows
    )
    batches = {0.0: "batch dense", 0.5: "batch"}
    of_batches = [
        served[share, count] / own[kind]["median"]
        for share, kind in batches.items()
        for count, own in scheduled.items()
    ]
    page.says(
        "stream by HTTP has {} and {} of that loop, two and four have {} to {} of the",
        *(served[share, 1] / served[share, 0] for share in (0.0, 0.5)),
        min(of_batches),
        max(of_batches),
    )


def benchmarks_ranks(page: Page) -> None:
    """Several GPUs: what was measured, and what was computed from it."""
    small, large = result("tensor-parallel"), result("tensor-parallel-70b")

    def row(case: Any) -> tuple[Cell, ...]:
        speeds = {(run["gpus"], run["sparsity"]): run for run in case["runs"]}
        cells: list[Cell] = [median(speeds[1, share]) if (1, share) in speeds else None for share in (0.0, 0.5)]
        for share in (0.0, 0.5):
            over = speeds[2, share]["over_one_gpu"]
            cells += [median(speeds[2, share]), None if over is None else over["median"]]
        return (*cells, case["realised_sparsity"])

    eight = one(small["cases"], case="llama-3-8b")
    page.table(
        "| Llama-3, two H200 | one GPU, dense | one, 50 % | two, dense | over one | two, 50 % | over one | realised |",
        {
            "8B, bfloat16": row(eight),
            "70B, int4:128": row(one(large["cases"], case="llama-3-70b-int4")),
            "70B, bfloat16": row(one(large["cases"], case="llama-3-70b")),
        },
    )
    times = re.findall(r"(\w+) (\d+\.\d) us", eight["sums"][0])
    page.says(
        "ranks takes {} µs where it was timed alone (8B), {} by `one_shot_all_reduce` and {} by NCCL",
        *(float(dict(times)[way]) for way in ("inboxes", "one_shot_all_reduce", "NCCL")),
    )
    computed = result("tensor-parallel-computed")["entries"]
    rows: dict[str, tuple[Cell, ...]] = {}
    for entry in computed:
        label = f"{entry['model']}, {entry['weights'].replace('int4-', 'int4:')}"
        cell = (*entry["tokens_per_second"].values(), entry["limit"]) if entry["fits"] else None
        rows[label] = (*rows.get(label, ()), cell)
    page.table("| dense / 50 % (memory's limit, dense) | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |", rows)
    page.says("all weights at {} TB/s", result("speculation-llama-3-8b-gpu")["reading_gb_s"] / 1e3)
    spread = result("spread-gpus")
    steps = spread["steps"]
    page.says("bfloat16 ({} GB), its blocks spread", spread["gigabytes"])
    page.says(
        "tokens {} s, sensitivities {} s, allocation {} s, thresholds {} s; six",
        *[steps[step]["seconds"] for step in ("histograms", "sensitivities", "allocation fisher", "propagation")],
    )
    page.says(
        "before and after, {} s. At most {} GB", steps["recover"]["seconds"], max(s["peak_gb"] for s in steps.values())
    )


def benchmarks_gate_first(page: Page) -> None:
    """MLPs whose neurons are mostly zero."""
    gpu, cpu = result("gate-first-gpu")["runs"], result("gate-first-cpu")["runs"]
    dead = (0.5, 0.7, 0.8, 0.89, 0.95)
    rows = {
        "H100, bfloat16, one token": tuple(at(gpu, share)["speedup"] for share in dead),
        "one CPU thread, float32": tuple(at(cpu, share, dtype="float32")["speedup"] for share in dead),
    }
    page.table("| an MLP of Llama-2-7B's shape over its dense self | 50 % dead | 70 % | 80 % | 89 % | 95 % |", rows)
    page.says("(dense {} µs)", at(gpu, 0.7)["dense_microseconds"]["own"]["median"])


def tutorial_speed(page: Page) -> None:
    """What the tutorial quotes of the GPU, and what it shows of `teal bench` on a CPU."""
    runs = [run for run in result("decode-smollm2-135m-cpu")["runs"] if run["allocation"] in (None, "fisher-site")]
    for shown, backend, sparsity in (
        ("dense │ 0", "dense", 0.0),
        ("cpu │ 0.40 ({})", "cpu", 0.4),
        ("cpu │ 0.50 ({})", "cpu", 0.5),
    ):
        run = one(runs, backend=backend, sparsity=sparsity)
        speed, read = run["tokens_per_second"], run["bytes_per_token"] / 1e6
        figures = (speed["median"], speed["min"], speed["max"], read, read * speed["median"] / 1e3, run["speedup"])
        realised = (run["realised_sparsity"],) if sparsity else ()
        page.says(f"{shown} │ {{}} ({{}}-{{}}) │ {{}} │ {{}} │ {{}}x", *realised, *figures)
    plain, int4 = _gpu(), result("decode-gpu-int4")["runs"]
    rows = {
        "bfloat16, tokens/s": tuple(median(at(plain, sparsity)) for sparsity in (0, 0.4, 0.5)),
        "int4, groups of 128, tokens/s": tuple(median(at(int4, sparsity)) for sparsity in (0, 0.4, 0.5)),
    }
    page.table("| | dense | 40 % | 50 % |", rows)
    page.says("It has {} GiB in bfloat16", result("decode-gpu")["peak_memory_bytes"]["weights"] / 2**30)


def benchmarks_routed(page: Page) -> None:
    """Whole models with routers, beside dense ones and beside gate first."""
    runs, small = (result(f"routed-tokens-gpu{groups}")["runs"] for groups in ("", "-groups-of-4"))
    places = "dense | routed, 50 % of groups | 70 % | gate first, 50 % of neurons | 70 % |"

    def row(runs: Any, model: str) -> tuple[Cell, ...]:
        of_model = [
            one(runs, model=model, share=share, way=way) for way in ("routed", "gate first") for share in (0.5, 0.7)
        ]
        dense = median(one(runs, model=model, share=0.5, way="dense"))
        return (dense, *((median(run), run["speedup"]["median"]) for run in of_model))

    models = {"Llama-2-7B": "llama-2-7b", "Mistral-7B": "mistral-7b"}
    page.table(
        f"| one H200, bfloat16 | {places}",
        {
            f"{label}, groups of {group}": row(of_group, model)
            for group, of_group in ((32, runs), (4, small))
            for label, model in models.items()
        },
    )
    idle = [one(runs, model=model, share=0.5, way="routed, all computed") for model in models.values()]
    page.says("without them: {} and {} times as fast", *(run["speedup"]["median"] for run in idle))
    page.table(
        f"| two CPU cores (AVX2), SmolLM2-135M, float32 | {places}",
        {
            f"groups of {group}": row(result(f"routed-tokens-cpu-groups-of-{group}")["runs"], "smollm2-135m")
            for group in (4, 32)
        },
    )
