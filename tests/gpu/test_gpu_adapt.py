"""Training on a GPU: bfloat16 products, float32 parameters, and what comes out is a model like any other."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny, write_corpus
from safetensors import safe_open

from teal_cli.checkpoint.adapted import read_record
from teal_cli.cli import run


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)


@pytest.mark.parametrize(
    "flags",
    [
        ("--text-weight", "5"),
        ("--text-weight", "5", "--recompute", "--dtype", "float32"),
        ("--lora", "4", "--recompute", "--text-weight", "5"),
        ("--options", "vectors=true", "--text-weight", "5"),
    ],
    ids=["weights", "recomputed", "adapters", "vectors"],
)
def test_recover_on_a_gpu(tmp_path: Path, flags: tuple[str, ...]) -> None:
    dense, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--device", "cuda", "--quiet"]
    assert run(["calibrate", *text, "--tokens", "512", "--seq-len", "64"]) == 0
    size = ["--tokens", "1024", "--seq-len", "32", "--batch-size", "4", "--held-out-tokens", "64", "--patience", "0"]
    assert run(["adapt", *text, *size, "--learning-rate", "5e-3", *flags, "--out", "out"]) == 0
    record = read_record(Path("out"))
    losses = [point["held_out_loss"] for point in record.curve if "held_out_loss" in point]
    assert min(losses) < losses[0]
    assert record.after.realised_sparsity == pytest.approx(0.5, abs=0.1)
    before, after = _tensors(dense), _tensors(Path("out"))
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    if "vectors=true" in flags:  # the weights keep every bit
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    else:
        assert before.keys() == after.keys()
    assert run(["generate", "--model", "out", "--device", "cuda", "--prompt", "the", "--max-new-tokens", "4"]) == 0
