"""Adapting and calibrating a model whose blocks lie on two GPUs."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny, write_corpus

from teal_cli.adapt.trainer import AdaptTrainer
from teal_cli.checkpoint.adapted import read_record
from teal_cli.cli import run

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
SIZE = ["--tokens", "1024", "--seq-len", "32", "--batch-size", "4", "--held-out-tokens", "64"]


@pytest.mark.parametrize("family", ["llama", "llama-bias"])  # the second has tied embeddings
@pytest.mark.parametrize(
    "flags",
    [("--hidden-weight", "1"), ("--lora", "4", "--recompute", "--text-weight", "5"), ("--options", "vectors=true")],
    ids=["weights", "adapters", "vectors"],
)
def test_two_gpus_learn_what_one_does(
    tmp_path: Path, family: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptTrainer, "_can_graph", False)
    dense, corpus = save_tiny(tmp_path / "tiny", family), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--device", "cuda", "--dtype", "float32", "--quiet"]
    curves = {}
    for where in ("one", "auto"):
        place = ["--device-map", where, "--runs", where, "--out", f"out-{where}"]  # calibrated there too
        before = torch.cuda.memory_stats(1).get("allocation.all.allocated", 0)
        assert run(["adapt", *text, *SIZE, "--learning-rate", "1e-3", *flags, *place]) == 0
        used = torch.cuda.memory_stats(1).get("allocation.all.allocated", 0) > before
        assert used == (where == "auto")
        curves[where] = read_record(Path(f"out-{where}")).curve
    for ours, theirs in zip(curves["auto"], curves["one"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)
    assert run(["generate", "--model", "out-auto", "--device", "cuda", "--prompt", "the", "--max-new-tokens", "4"]) == 0
