"""What docs/benchmarks.md says of `teal adapt`."""

from typing import Any

from tests.figures.page import Cell, Page, one, result


def benchmarks_adapted(page: Page) -> None:
    """What searches for recipes of `teal adapt` came to."""
    calls = result("adapt-smollm2-135m")["calls"]
    still, followed, later, last, hidden, longer, longest, weighed_text, more_text, fitted, *latest = calls
    highest, higher, ends = latest
    names = ("sotu", "moby-dick", "debian-handbook")

    def ratios(entry: Any) -> tuple[Cell, ...]:
        return tuple(entry["texts"][name]["perplexity_ratio"] for name in names)

    def unread(entry: Any) -> float:
        return float(sum(entry["texts"][name]["realised_sparsity"] for name in names) / len(names))

    relu = one(followed["results"], arm="relu 5e-4")
    (tenth, third) = relu["fatrelu"]
    page.table(
        "| SmolLM2-135M, perplexity over dense | sotu | Moby Dick | Debian handbook |",
        {
            "65 %, training-free": ratios(one(followed["before"], sparsity=0.65)),
            "`recover`, all weights, rate 3e-4, thresholds follow": ratios(one(followed["results"], arm="masked 3e-4")),
            "the same, thresholds stand still": ratios(one(still["results"], arm="weights 3e-4")),
            "the same, rate 1e-4": ratios(one(still["results"], arm="weights 1e-4")),
            "straight-through, thresholds stand still": ratios(one(still["results"], arm="weights ste 3e-4")),
            "straight-through, thresholds follow, stopped early": ratios(one(followed["results"], arm="ste 3e-4")),
            "`relu`, FATReLU on 10 % of live gates": ratios(tenth),
            "`relu`, FATReLU on 30 % of live gates": ratios(third),
        },
    )
    page.says("FATReLU on 30 % leaves {} % of the hidden state", 100 * third["texts"]["sotu"]["hidden_zeros"])
    steered = one(followed["results"], arm="prosparse 5e-4")["fatrelu"][0]
    page.says("85 % zeros in so few steps ({} times dense", steered["texts"]["sotu"]["perplexity_ratio"])
    page.says("{} % of the groups were left out", 100 * one(followed["results"], arm="lte 2e-4")["groups_left_out"])
    before, results = later["before"], [*later["results"], *last["results"]]

    def found(entry: Any, share: float | None = None) -> tuple[Cell, ...]:
        return (share, *ratios(entry))

    relu, lte, drelu = (one(results, arm=arm) for arm in ("relu", "lte 50 %", "drelu"))
    dropped = {entry["live_dropped"]: found(entry, entry["texts"]["sotu"]["hidden_zeros"]) for entry in relu["fatrelu"]}
    page.table(
        "| SmolLM2-135M, perplexity over dense, later | hidden zeros or groups left out | sotu | Moby Dick | "
        "Debian handbook |",
        {
            "50 %, training-free": found(one(before, sparsity=0.5)),
            "`recover` at 50 %, rate 1e-4": found(one(results, arm="recover 50 %")),
            "65 %, training-free": found(one(before, sparsity=0.65)),
            "`recover` at 65 %, rate 3e-4": found(one(results, arm="recover 65 %")),
            "80 %, training-free": found(one(before, sparsity=0.8)),
            "`relu`": found(relu, relu["hidden_zeros"]),
            "the same, FATReLU on 30 % of live gates": dropped[0.3],
            "the same, on 50 %": dropped[0.5],
            "the same, on 70 %": dropped[0.7],
            "`drelu`": found(drelu, drelu["hidden_zeros"]),
            "`lte`": found(lte, lte["groups_left_out"]),
        },
    )
    rows: dict[str, tuple[Cell, ...]] = {}
    for label, call, arm in (
        ("`recover` at 50 %, rate 1.5e-4, sequences of 1,024", longest, "recover 50 %"),
        ("`recover` at 65 %, rate 4e-4, without literature", longer, "recover 65 %"),
        ("the same with it", longest, "recover 65 %"),
        ("`recover` at 80 %, rate 6e-4", longest, "recover 80 %"),
        ("`prosparse`, FATReLU that grows to half of the live gates", longest, "prosparse, grown to half"),
        ("`drelu`, without literature", longer, "drelu"),
        ("`lte`, without literature", longer, "lte soft 0.5"),
        ("the same, a quarter of the steps soft", longer, "lte soft 0.25"),
        ("`lte`, `shares=even`", longest, "lte even"),
        ("the same, `--hidden-weight 1`", longest, "lte even, hidden 1"),
    ):
        entry = one(call["results"], arm=arm)
        share = entry.get("hidden_zeros", entry.get("groups_left_out"))
        rows[label] = (entry["tokens"], unread(entry), share, *ratios(entry))
    page.table(
        "| SmolLM2-135M, perplexity over dense, longer | tokens | not read | zeros or groups left out | sotu | "
        "Moby Dick | Debian handbook |",
        rows,
    )
    control = one(weighed_text["results"], arm="dense, text")

    def of_text(entry: Any) -> tuple[Cell, ...]:
        if entry is control:
            return (entry["tokens"], None, None, *ratios(entry), None, None, None)
        over = (entry["texts"][name]["perplexity_ratio"] / control["texts"][name]["perplexity_ratio"] for name in names)
        share = entry.get("hidden_zeros", entry.get("groups_left_out"))
        return (entry["tokens"], unread(entry), share, *ratios(entry), *over)

    columns = "sotu | Moby Dick | Debian handbook | over the control: sotu | Moby Dick | Debian handbook |"
    page.table(
        f"| SmolLM2-135M, perplexity over dense, `--text-weight 1` | tokens | not read | groups left out | {columns}",
        {
            label: of_text(one(weighed_text["results"], arm=arm))
            for label, arm in (
                ("the dense model, trained the same way", "dense, text"),
                ("`recover` at 50 %, rate 2e-4", "recover 50 %, text"),
                ("`recover` at 65 %, rate 4e-4", "recover 65 %, text"),
                ("`recover` at 80 %, rate 6e-4", "recover 80 %, text"),
                ("`lte`, `routers=fitted`, groups of 8, `--hidden-weight 1`", "lte, fitted, groups of 8, text"),
            )
        },
    )
    page.table(
        "| SmolLM2-135M, perplexity over dense, `--text-weight 1`, more literature | tokens | not read | "
        f"zeros or groups left out | {columns}",
        {
            label: of_text(one(call["results"], arm=arm))
            for label, call, arm in (
                ("`recover` at 80 %, rate 7e-4", more_text, "recover 80 %, text"),
                ("the same, rate 1e-3", highest, "recover 80 %, text, rate 1e-3"),
                (
                    "the same, sparsity grows in the first 40 % of the steps",
                    highest,
                    "recover 80 %, text, grown, rate 1e-3",
                ),
                ("`drelu`, `zeros=0.83`, rate 6e-4", more_text, "drelu, steered, text"),
                (
                    "`lte`, routers fitted once, then straight-through, groups of 8",
                    more_text,
                    "lte, fitted, groups of 8, text",
                ),
                ("the same, groups of 4", more_text, "lte, fitted, groups of 4, text"),
                (
                    "`lte`, fitted again, groups of 8, rate 6e-4",
                    fitted,
                    "lte, fitted again, groups of 8, text, rate 6e-4",
                ),
                ("the same, groups of 4, rate 8e-4", fitted, "lte, fitted again, groups of 4, text, rate 8e-4"),
                ("the same, groups of 4, rate 4e-4", fitted, "lte, fitted again, groups of 4, text, rate 4e-4"),
                ("the same, at 70 %", highest, "lte 70 %, fitted, groups of 4, text"),
            )
        },
    )
    control = one(ends["results"], arm="dense, text")
    lined = {rate: one(ends["results"], arm=f"recover 80 %, text, rate {rate}") for rate in ("6e-4", "1e-3")}
    rows = {"the dense model, trained the same way": (control["tokens"], None, *ratios(control), None, None, None)}
    for rate, entry in lined.items():
        tokens, dropped, _, *found_ratios = of_text(entry)
        rows[f"`recover` at 80 %, rate {rate}"] = (tokens, dropped, *found_ratios)
    page.table(
        f"| SmolLM2-135M, perplexity over dense, `--text-weight 1`, line ends kept | tokens | not read | {columns}",
        rows,
    )
    arms = ("rate 2e-3", "rate 1.5e-3, batches of 8", "rate 1.5e-3, uniform")
    without = [ratios(one(higher["results"], arm=f"recover 80 %, text, {arm}")) for arm in arms]
    page.says("rate 2e-3 gave {}, {} and {}, a somewhat", *without[0])
    page.says("half the size {}, {} and {}, and every", *without[1])
    page.says("projection at the same sparsity {}, {} and {}.", *without[2])
    passes = result("training-pass-gpu")["runs"]
    speeds = [passes[form][0]["tokens_per_second"] for form in ("by PyTorch", "norms", "norms and loss")]
    page.says("{} tokens/s by PyTorch's own steps, {} with fused norms and {} with the loss", *speeds)
    page.says("in {}, {} and {} GB", *(passes[form][0]["most_bytes"] / 1e9 for form in passes))
    weighed = {arm: one(hidden["results"], arm=f"{arm} 1e-4") for arm in ("kl", "hidden 1", "hidden 10")}
    page.table(
        "| SmolLM2-135M, 50 %, 1,572,864 tokens | held-out loss | sotu | Moby Dick | Debian handbook |",
        {
            label: (entry["held_out"][-1]["held_out_loss"], *ratios(entry))
            for label, entry in zip(
                ("next tokens alone", "`--hidden-weight 1`", "`--hidden-weight 10`"), weighed.values(), strict=True
            )
        },
    )
    zeros = [one(longer["results"], arm="drelu"), one(more_text["results"], arm="drelu, steered, text")]
    page.says(
        "dReLU's zeros {} % cost less than {} % did",
        100 * zeros[1]["hidden_zeros"],
        100 * zeros[0]["hidden_zeros"],
    )
    losses = [look["held_out_loss"] for look in one(results, arm="recover 50 %, rate 2e-4")["held_out"]]
    page.says("on held-out text went from {} to {} while", losses[0], max(losses))
