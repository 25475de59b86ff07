"""The page: everything on it, nothing from elsewhere, and the figures of the JSON results."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.config import ReportConfig
from teal_cli.console import QUIET
from teal_cli.steps.report import report

SECTIONS = ["quality", "speed", "sparsity", "distributions", "tokens", "made"]
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser would find: sections with their texts, ids, links, elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.choices: list[str] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "data", "action")]
        if tag == "svg":
            self.labels.append(values["aria-label"])
        if tag in ("section", "dl"):
            self._section = values.get("id") or self._section
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "rt":
            self.choices.append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data
        if self._open and self._open[-1] == "rt":
            self.choices[-1] += data


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _page(run: Path, out: Path, **options: object) -> tuple[Page, str]:
    result = report(run, ReportConfig(out=out / "page.html", **options), QUIET)
    text = Path(result.page).read_text()
    return Page(text), text


@pytest.fixture(scope="module")
def written(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return _page(finished_run, tmp_path_factory.mktemp("page"))


def test_every_section_is_there_and_has_something(written: tuple[Page, str]) -> None:
    page, text = written
    assert [name for name in page.sections if name in SECTIONS] == SECTIONS
    assert "To do so" not in text
    assert "To make one" not in text


def test_nothing_comes_from_elsewhere(written: tuple[Page, str]) -> None:
    page, text = written
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"(src|href|url\(|@import)[=\s\"'(]*https?:", text)
    assert page.tags[0] == "html"
    assert text.lstrip().startswith("<!DOCTYPE html>")


def test_figures_are_those_of_the_results(finished_run: Path, written: tuple[Page, str]) -> None:
    page, _ = written
    quality, speed = _json(finished_run / "eval.json"), _json(finished_run / "bench.json")
    run = next(
        r for r in quality["runs"] if (r["sparse"]["allocation"], r["sparse"]["target_sparsity"]) == ("fisher", 0.5)
    )
    summary = " ".join(page.sections["summary"].split())
    assert f"perplexity {run['sparse']['perplexity']:.2f} in place of {run['dense']['perplexity']:.2f}" in summary
    assert f"{run['perplexity_ratio']:.3f} ± {run['perplexity_ratio_stderr']:.3f} times dense" in summary
    assert f"sparsity {run['sparse']['realised_sparsity']:.1%} (target 50%)" in summary
    dense, sparse = speed["runs"][0], speed["runs"][2]
    before, after = (each["tokens_per_second"] for each in (dense, sparse))
    assert f"{after['median']:.1f} ({after['min']:.1f} to {after['max']:.1f}) tokens/s" in summary
    assert f"in place of {before['median']:.1f} ({before['min']:.1f} to {before['max']:.1f})" in summary
    assert f"{sparse['speedup']:.2f} times dense, on {speed['device']} in {speed['dtype']}" in summary
    for run in quality["runs"]:
        assert f"{run['sparse']['perplexity']:.2f} ± {run['sparse']['stderr']:.2f}" in page.cells
    for run in speed["runs"]:
        assert f"{run['speedup']:.2f}x" in page.cells
    for allocation in ("fisher", "uniform"):
        ratios = [
            f"{r['perplexity_ratio']:.3f} at {r['sparse']['realised_sparsity']:.0%}"
            for r in quality["runs"]
            if r["sparse"]["allocation"] == allocation
        ]
        assert f"{allocation}: 1.000 at 0%, {', '.join(ratios)}" in page.labels[0]


def test_how_it_was_made(finished_run: Path, written: tuple[Page, str]) -> None:
    page, _ = written
    made = page.sections["made"]
    calibration, quality = _json(finished_run / "calibration.json"), _json(finished_run / "eval.json")
    assert f"{calibration['tokens']:,} tokens of {calibration['dataset']}" in made
    assert calibration["weights"][:16] in made
    assert f"torch {quality['versions']['torch']}" in made
    assert quality["finished"][:16].replace("T", " ") in made
    assert "dense_prefix: null" in made
    assert "prompts: 2" in made


def test_sparsity_and_thresholds_of_every_projection(finished_run: Path, written: tuple[Page, str]) -> None:
    page, _ = written
    assert {path.name for path in finished_run.iterdir() if path.is_dir()} == {
        f"{allocation}-{sparsity}" for allocation in ("fisher", "uniform") for sparsity in ("0.30", "0.50")
    }
    realised = {
        (r["sparse"]["allocation"], r["sparse"]["target_sparsity"]): r["realised_by_projection"]
        for r in _json(finished_run / "eval.json")["runs"]
    }
    for export in finished_run.glob("*-0.*"):
        summary = _json(export / "teal.json")
        counted = realised[summary["allocation"], summary["target_sparsity"]]
        for entry in summary["projections"]:
            assert f"{100 * entry['sparsity']:.0f} / {100 * counted[entry['name']]:.0f}" in page.cells
            assert f"{entry['threshold']:.3g}" in page.cells


def test_tokens_side_by_side(finished_run: Path, written: tuple[Page, str]) -> None:
    page, text = written
    shown = page.sections["tokens"]
    differing = 0
    for run in _json(finished_run / "eval.json")["runs"]:
        for sample in run["generation"]["samples"]:
            assert sample["prompt"] in shown
            assert f"Sparse: {sum(sample['agrees'])} of 12 tokens as dense would" in shown
            differing += sample["agrees"].count(False)
            assert all(
                (a == b) == agrees
                for a, b, agrees in zip(sample["sparse"], sample["dense_choices"], sample["agrees"], strict=True)
                if "\ufffd" not in a + b
            )
    assert 0 < differing == len(page.choices) == text.count("<ruby>")
    assert _json(finished_run / "generate.json")["prompt"] in shown


def test_what_is_absent_is_said(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    for name in ("calibration.json", "calibration.safetensors"):
        shutil.copy(finished_run / name, run)
    page, text = _page(run, tmp_path)
    assert [name for name in page.sections if name in SECTIONS] == SECTIONS
    for section, command in (("quality", "eval"), ("speed", "bench"), ("sparsity", "export"), ("tokens", "eval")):
        assert f"teal {command} --model tiny" in page.sections[section]
    assert text.count("<svg") == 5
    assert "nothing exported yet" in page.sections["summary"]
    assert "not measured: teal bench --model tiny" in page.sections["summary"]


def test_one_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    page, _ = _page(finished_run / "uniform-0.30", tmp_path)
    assert "reads 30% less of the weights" in page.sections["summary"]
    assert "allocation uniform" in page.sections["summary"]
    assert "fisher, 0.50" not in page.sections["sparsity"]


def test_a_checkpoint_that_lies_in_no_run(finished_run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(finished_run / "fisher-0.30", tmp_path / "elsewhere" / "mine")
    page, text = _page(alone, tmp_path)
    assert "reads 30% less of the weights" in page.sections["summary"]
    assert "There is no calibration here" in page.sections["distributions"]
    assert text.count("<svg") == 1
    further = [finished_run / "eval.json", finished_run / "bench.json"]
    page, text = _page(alone, tmp_path, results=further)
    assert "perplexity" in page.sections["summary"]
    assert text.count("<svg") == 4


def test_what_models_write_is_text(finished_run: Path, tmp_path: Path) -> None:
    quality = _json(finished_run / "eval.json")
    evil = "</p><script>alert(1)</script>\n&amp;\x1b[31m"
    quality["model"] = evil
    for entry in quality["runs"]:
        sample = entry["generation"]["samples"][0]
        sample |= {"prompt": evil, "sparse": [evil] * 12, "dense_choices": [evil + "x"] * 12}
    run = shutil.copytree(finished_run, tmp_path / "tiny")
    (run / "eval.json").write_text(json.dumps(quality))
    page, text = _page(run, tmp_path)
    assert "<script" not in text
    assert evil.replace("\x1b", "\\x1b") in page.sections["tokens"]
    assert "\x1b" not in text


def test_names_of_sites_are_text(finished_run: Path, tmp_path: Path) -> None:
    """Of a calibration from elsewhere, or an architecture file: they become names of files and ids of drawings."""
    evil = '/../mlp_input"></svg><img src=x onerror=alert(1)><b x="'
    found = calibration_file.load(finished_run)
    names = {site: site.replace("mlp_input", evil) for site in found.histograms}
    found.projections = [replace(each, site=names[each.site]) for each in found.projections]
    found.histograms = {names[site]: counts for site, counts in found.histograms.items()}
    run = tmp_path / "run"
    run.mkdir()
    calibration_file.save(found, run)
    page, text = _page(run, tmp_path)
    assert "img" not in page.tags
    assert text.count("<svg") == 5
    assert len(list((tmp_path / "page").glob("distribution-*.svg"))) == 5


def test_colours_follow_the_reader(written: tuple[Page, str]) -> None:
    _, text = written
    light, dark = (
        set(re.findall(r"(--[\w-]+): #", block)) for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    )
    used = set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--sans", "--mono"}
    assert light == dark
    assert used <= light
    drawn = " ".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert {"--ink", "--muted", "--grid", "--series-1", "--series-2"} <= set(re.findall(r"var\((--[\w-]+)\)", drawn))
    # Only the cells of heat maps, and the figures on them, keep colours of their own.
    maps = re.findall(r'<svg[^>]*aria-label="Heat map.*?</svg>', text, flags=re.DOTALL)
    assert len(maps) == 4
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) == set(re.findall(r"#[0-9a-f]{6}", " ".join(maps)))


def test_plots_are_files_too(finished_run: Path, tmp_path: Path) -> None:
    result = report(finished_run, ReportConfig(out=tmp_path / "r.html", plots=tmp_path / "plots"), QUIET)
    files = sorted((tmp_path / "plots").iterdir())
    assert sorted(result.plots) == [str(file) for file in files]
    names = {file.stem for file in files}
    assert {"quality-1", "speed-1", "distribution-mlp-input", "sparsity-fisher-0.50-realised"} <= names
    for name in names:
        drawing = ElementTree.parse(tmp_path / "plots" / f"{name}.svg").getroot()  # noqa: S314  (our own)
        assert drawing.tag.endswith("svg")
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_limit_of_the_memory_is_drawn(finished_run: Path, tmp_path: Path) -> None:
    speed = _json(finished_run / "bench.json")
    speed |= {"device": "a GPU", "reading_gb_s": 2000.0}
    for index, run in enumerate(speed["runs"]):
        run["limit_tokens_per_second"] = 200.0 + index
    (tmp_path / "gpu.json").write_text(json.dumps(speed))
    page, text = _page(finished_run, tmp_path, results=[tmp_path / "gpu.json"])
    label = next(label for label in page.labels if "a GPU" in label)
    assert "Limit of the memory: 200.0 at 0%" in label
    assert ">memory limit<" in text
