"""Every figure of the README and docs is that of its result file, at its very place; none stands there without."""

from collections.abc import Callable

import pytest

from tests.figures import adapted, cpu, page, quality, speculation, speed
from tests.figures.page import Page

_CHECKS: dict[str, list[Callable[[Page], None]]] = {
    "README.md": [speed.readme_speed, quality.readme_quality],
    "docs/benchmarks.md": [
        speed.benchmarks_gpu,
        speed.benchmarks_quantised,
        speed.benchmarks_peers,
        speed.benchmarks_vllm,
        speed.benchmarks_families,
        speed.benchmarks_batches,
        speed.benchmarks_streams,
        speed.benchmarks_ranks,
        speed.benchmarks_gate_first,
        speed.benchmarks_routed,
        cpu.benchmarks_cpu,
        cpu.benchmarks_llama_cpp,
        cpu.benchmarks_families_cpu,
        quality.benchmarks_quality,
        quality.benchmarks_beside_llama_cpp,
        quality.benchmarks_gate_first,
        quality.benchmarks_calibration,
        quality.benchmarks_allocations,
        adapted.benchmarks_adapted,
        quality.benchmarks_trials,
    ],
    "docs/method.md": [
        quality.method_output_layer,
        quality.method_bytes,
        quality.method_trained_bytes,
        quality.method_likely_tokens,
        quality.method_calibration,
        quality.method_recalibrated,
        quality.method_quantised,
    ],
    "docs/models.md": [quality.models_encoder],
    "docs/speculation.md": [speculation.drafts_on_a_cpu, speculation.drafts_on_a_gpu],
    "docs/tutorial.md": [speed.tutorial_speed],
    "docs/report.md": [],
    "docs/coming-from-teal.md": [],
    "docs/python-api.md": [],
    "docs/architecture.md": [],
    "docs/add-a-model-family.md": [],
}
_NOT_CHECKED = {"docs/formats.md", "docs/adapt.md", "docs/serving.md", "docs/tensor-parallel.md"}
"""Their numbers are sizes, bounds and versions of formats, and defaults of options."""
_NO_RESULTS = {
    "docs/method.md": {
        "at the quantile 0.5": "a definition",
        "taken above 0.99": "a bound of the code",
        "185 us at 50 %, which is 2.84 TB/s": "of the tuning table",
        "and brought 1.19": "of a trial whose result was not kept",
        "max(gate, 0)": "a formula",
        "max(fc1, 0)": "a formula",
        "max(up, 0)": "a formula",
        "else 0 |": "a formula",
        "max(gate, 0)^2": "a formula",
    },
    "docs/benchmarks.md": {
        "differences below 0.02 are noise": "a rule for reading the table",
        "launch costs 2 to 4 µs": "of searches for tile configs and profiles that were not kept",
        "its bytes take, attention 5": "of the same",
        "4096 x 11008": "a shape",
        "--sparsity 0.89 --repeats 11": "a command",
        "4 GB of weights in turn": "how the benchmark is set up",
    },
    "docs/models.md": {
        "4-bit GPTQ": "a format",
        "1 to 8 sequences": "a bound of the code",
        "capability 9.0": "a name",
    },
    "docs/add-a-model-family.md": {
        "Phi 3.5 MoE": "a name",
        "normalised`: whether the weights of the chosen ones sum to 1": "a definition",
    },
    "docs/speculation.md": {"acceptance of 0.85": "what the table of random weights assumes"},
    "docs/tutorial.md": {
        "329 MB read in place of 538 would be 1.64x": "of the output shown above it",
        "a GPU of 24 GB": "what cards have",
    },
    "docs/report.md": {"nearest to 0.5": "a default"},
    "docs/coming-from-teal.md": {"up to 9.2 in": "of the reference's files", "are read as 0.99": "a bound of the code"},
}
"""Phrases with figures that come from no file of benchmarks/results, and where they do come from."""


def _checked(name: str, text: str | None = None) -> Page:
    checked = Page(name, text)
    for check in _CHECKS[name]:
        check(checked)
    for phrase, reason in _NO_RESULTS.get(name, {}).items():
        checked.is_no_result(phrase, reason)
    return checked


@pytest.mark.parametrize("name", _CHECKS)
def test_figures_are_those_of_the_results(name: str) -> None:
    assert _checked(name).faults() == []


@pytest.mark.parametrize("name", _CHECKS)
def test_no_figure_stands_without_a_place(name: str) -> None:
    assert _checked(name).unclaimed() == []


def test_no_page_is_left_out() -> None:
    pages = {f"docs/{path.name}" for path in (page.ROOT / "docs").glob("*.md")} | {"README.md"}
    assert pages == set(_CHECKS) | _NOT_CHECKED


def _faults(name: str, before: str, after: str) -> list[str]:
    text = Page(name).text
    assert text.count(before) == 1
    return _checked(name, text.replace(before, after)).faults()


def test_a_changed_figure_is_found() -> None:
    assert _faults("README.md", "| 192 | 316 |", "| 192 | 317 |")
    assert _faults("docs/models.md", "fisher gives 0.9699", "fisher gives 0.9690"), "the table still has the right one"


def test_swapped_cells_are_found() -> None:
    assert len(_faults("README.md", "| 192 | 316 |", "| 316 | 192 |")) == 2


def test_a_changed_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = page.result("decode-gpu")["runs"][0]["runs"][3]["tokens_per_second"]
    monkeypatch.setitem(entry, "median", entry["median"] + 5)
    assert len(_checked("docs/benchmarks.md").faults()) == 2, "the speed and its share of the limit"


def test_a_new_figure_or_row_is_found() -> None:
    text = Page("README.md").text
    assert _checked("README.md", text.replace("## Quality", "It reaches 999 tokens/s.\n\n## Quality")).unclaimed()
    row = "| the same in int4 |"
    with pytest.raises(AssertionError):
        _checked("README.md", text.replace(row, f"| more | 1 | 2 | 3 |\n{row}"))
