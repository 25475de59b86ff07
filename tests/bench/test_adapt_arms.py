"""The benchmark of `teal adapt`, on a tiny model: arms, controls, FATReLU afterwards, and a call that goes on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import save_tiny

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARMS = {
    "weights": {"recipe": "recover", "sparsity": 0.5},
    "relu": {"recipe": "relu", "live_dropped": [0.3]},
    "grown": {"recipe": "prosparse", "options": {"l1": 0.0, "live_dropped": 0.5, "fatrelu": "grown"}},
    "routers": {"recipe": "lte", "sparsity": 0.5, "options": {"group": 4}},
    "random": {"recipe": "lte", "options": {"group": 4, "routers": "random"}, "share_of": "routers"},
}


def test_arms_and_their_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; a second call has nothing left to do."""
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    module = __import__("adapt_arms")
    save_tiny(tmp_path / "dense")
    (tmp_path / "moby.txt").write_text("Call me Ishmael. " * 400)
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(ARMS, sort_keys=False))
    size = {"tokens": 256, "seq_len": 16, "batch_size": 4, "held_out_tokens": 32}
    monkeypatch.setattr(module, "SMALL", size)
    monkeypatch.setattr(module, "CALIBRATED_SMALL", {"tokens": 64, "seq_len": 16, "sensitivity_tokens": 16})
    done = []

    def here(table: object) -> None:
        while jobs := table.jobs():  # type: ignore[attr-defined]
            done.append(jobs[0]["key"])
            table.keep(json.loads(json.dumps(module.work(jobs[0]), default=str)))  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "side_by_side", here)
    out, text = tmp_path / "out.json", tmp_path / "moby.txt"
    shared = ("--model", tmp_path / "dense", "--runs", tmp_path / "runs", "--device", "cpu", "--seeds", 0)
    sizes = ("--quick", "--eval-tokens", 64, "--text", text, "--json", out)
    monkeypatch.setattr(sys, "argv", ["adapt_arms", *map(str, (tmp_path / "arms.yaml", *shared, *sizes))])
    module.main()
    assert done == [{"sparsity": 0.5}, *({"arm": arm, "seed": 0} for arm in ARMS)]
    module.main()
    assert len(done) == 6
    results = {each["arm"]: each for each in json.loads(out.read_text())["results"]}
    assert results.keys() == ARMS.keys()
    assert results["random"]["settings"]["sparsity"] == max(results["routers"]["notes"]["groups_left_out"], 0.01)
    (after,) = results["relu"]["fatrelu"]
    before = results["relu"]["notes"]["zeros"]["hidden"]
    assert after["texts"]["moby"]["hidden_zeros"] > sum(before) / len(before)
    assert after["texts"]["moby"]["realised_sparsity"] > results["relu"]["texts"]["moby"]["realised_sparsity"] > 0
    for each in (*results.values(), after):
        assert set(each["texts"]) == {"sotu", "moby"}
        assert each["texts"]["moby"]["perplexity_ratio"] > 0


def test_a_job_is_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is said, and does not stop the others."""
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    module = __import__("adapt_arms")
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"one": {"recipe": "relu"}}))
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["adapt_arms", str(tmp_path / "arms.yaml"), "--model", str(tmp_path), "--json", str(out)]
    )
    module.main()
    assert not out.exists()


def test_of_a_run_that_does_not_end_the_curve_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as its checkpoint; once it has ended it is unfinished no more."""
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    module = __import__("adapt_arms")
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"one": {"recipe": "relu"}}))
    checkpoint = tmp_path / "runs/adapt-arms/one-0.run/checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"curve": [{"step": 4.0, "held_out_loss": 3.5}]}))
    (checkpoint / "trainer_state.json").write_text("{}")
    out = tmp_path / "out.json"
    words = (tmp_path / "arms.yaml", "--model", tmp_path, "--runs", tmp_path / "runs", "--seeds", 0, "--json", out)
    monkeypatch.setattr(sys, "argv", ["adapt_arms", *map(str, words)])
    module.main()
    (unfinished,) = json.loads(out.read_text())["unfinished"]
    assert unfinished == {
        "arm": "one",
        "seed": 0,
        "settings": {"recipe": "relu"},
        "curve": [{"step": 4.0, "held_out_loss": 3.5}],
    }
    figures = {"perplexity_ratio": 1.0, "realised_sparsity": 0.5}
    ended = {"arm": "one", "seed": 0, "notes": {}, "texts": {"sotu": figures}}
    monkeypatch.setattr(module, "side_by_side", lambda table: table.keep(ended))
    module.main()
    assert json.loads(out.read_text())["unfinished"] == []


def test_of_arms_that_do_not_fit_shorter_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens of those that ended: a minute for each thousand here, of ten."""
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    module = __import__("adapt_arms")
    lengths = {"first": 4000, "long": 8000, "short": 2000, "shortest": 1000}
    arms = {name: {"recipe": "relu", "tokens": tokens} for name, tokens in lengths.items()}
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(arms, sort_keys=False))
    now, ran = [0.0], []

    class Done:
        returncode = 0

        def __init__(self, command: list[str], env: object) -> None:
            job = json.loads(Path(command[-2]).read_text())
            ran.append(job["arm"])
            figures = {"perplexity_ratio": 1.0, "realised_sparsity": 0.5}
            Path(command[-1]).write_text(json.dumps({**job["key"], "notes": {}, "texts": {"sotu": figures}}))

        def poll(self) -> int:
            now[0] += 60 * lengths[ran[-1]] / 1000
            return 0

        def kill(self) -> None:
            """It has ended."""

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=Done))
    monkeypatch.setattr(
        module,
        "time",
        SimpleNamespace(monotonic=lambda: now[0], monotonic_ns=lambda: len(ran), sleep=lambda seconds: None),
    )
    words = (tmp_path / "arms.yaml", "--model", tmp_path, "--runs", tmp_path / "runs", "--seeds", 0, "--minutes", 10)
    monkeypatch.setattr(sys, "argv", ["adapt_arms", *map(str, (*words, "--json", tmp_path / "out.json"))])
    module.main()
    assert ran == ["first", "short", "shortest"]
