"""Training on a GPU: bfloat16 products, float32 parameters, and what comes out is a model like any other."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_model, save_tiny, write_corpus
from safetensors import safe_open

from teal_cli.adapt import distil, fitted, followed, graphs
from teal_cli.adapt.graphs import GraphedPasses
from teal_cli.adapt.logits import LogitMaker
from teal_cli.adapt.norms import fused_norms
from teal_cli.adapt.trainer import AdaptTrainer
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capped", [False, True])
def test_loss_by_the_kernel_is_pytorchs(dtype: torch.dtype, capped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, of which the last is shorter; logits that are capped after the output layer, as Gemma 2 has them."""
    vocabulary, tokens = 5000, 70
    monkeypatch.setitem(distil._LOGITS_AT_ONCE, "cuda", 32 * vocabulary)
    torch.manual_seed(0)
    weights = [torch.randn(vocabulary, 64, device="cuda", dtype=dtype) for _ in range(2)]
    student, teacher = (torch.randn(tokens, 64, device="cuda", requires_grad=True) for _ in range(2))
    targets = torch.arange(tokens, device="cuda").masked_fill(torch.arange(tokens, device="cuda") % 9 == 0, -1)

    def logits(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden.to(dtype) @ weight.t()
        return torch.tanh(found / 30) * 30 if capped else found

    ours, its = (partial(logits, weight) for weight in weights)
    found = []
    for uses in (distil.distils, lambda logits: False):
        monkeypatch.setattr(distil, "distils", uses)
        loss = distil.distillation_loss(student, teacher.detach(), ours, its, vocabulary, targets, 0.7)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    (loss, gradient), (wanted, its_gradient) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    rounding = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(gradient, its_gradient, rtol=rounding, atol=rounding * float(its_gradient.abs().max()))


def test_norms_are_one_kernel_each_way() -> None:
    model = build_model("llama").cuda()
    norm = next(module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm")
    x = torch.randn(3, norm.weight.shape[0], device="cuda", requires_grad=True)
    wanted = norm(x)
    with fused_norms([model]) as count:
        assert count == sum(type(module).__name__ == "LlamaRMSNorm" for module in model.modules())
        found = norm(x)
    assert "FusedRmsNorm" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), [x, norm.weight]) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


RECIPES = {
    "recover": ("--recipe", "recover", "--text-weight", "5"),
    "recover, recomputed": ("--recipe", "recover", "--recompute"),
    "recover, adapters": ("--recipe", "recover", "--lora", "4"),
    "vectors": ("--recipe", "recover", "--options", "vectors=true"),
    "relu": ("--recipe", "relu"),
    "fatrelu that grows": ("--recipe", "prosparse", "--options", "l1=0,fatrelu=grown,live_dropped=0.5"),
    "drelu": ("--recipe", "drelu", "--accumulate", "2"),
    "lte": ("--recipe", "lte"),
    "lte, learned": ("--recipe", "lte", "--options", "group=4,routers=learned"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_passes_train_as_kernels_launched_one_by_one_do(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of passes, with and without a look at hidden states; evaluation between them. Fits of routers are not
    replayed."""
    monkeypatch.setattr(followed, "_EVERY", 2)
    monkeypatch.setattr(fitted, "_EVERY", 3)
    dense, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--device", "cuda", "--quiet", "--dtype", "float32"]
    assert run(["calibrate", *text, "--tokens", "512", "--seq-len", "64"]) == 0
    size = ["--tokens", "2048", "--seq-len", "32", "--batch-size", "4", "--held-out-tokens", "64"]
    captured: list[object] = []
    capture = GraphedPasses._capture
    monkeypatch.setattr(GraphedPasses, "_capture", lambda passes: captured.append(capture(passes)) or captured[-1])
    curves = {}
    for how in ("replayed", "one by one"):
        if how == "one by one":
            monkeypatch.setattr(AdaptTrainer, "_can_graph", False)
        assert run(["adapt", *text, *size, "--learning-rate", "1e-3", *RECIPES[recipe], "--out", how]) == 0
        curves[how] = read_record(Path(how)).curve
    assert len(captured) == (1 if recipe in ("relu", "drelu", "lte") else 2)
    assert None not in captured
    assert len(curves["replayed"]) == len(curves["one by one"]) > 4
    for ours, theirs in zip(*curves.values(), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)
    before, after = (_tensors(Path(how)) for how in curves)
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-2, atol=1e-3)


def test_the_dense_model_is_compared_with_from_main_memory_where_the_gpu_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--device", "cuda"]
    assert run(["calibrate", *text, "--tokens", "512", "--seq-len", "64"]) == 0
    size = ["--tokens", "256", "--seq-len", "32", "--batch-size", "4", "--held-out-tokens", "64", "--lora", "4"]
    found = []
    for room in (1.25, 1e12):
        monkeypatch.setattr("teal_cli.steps.adapt._ROOM_BESIDE", room)
        assert run(["adapt", *text, *size, "--out", f"out-{room}"]) == 0
        assert ("comparing from main memory" in capsys.readouterr().err) == (room > 2)
        found.append(read_record(Path(f"out-{room}")).after)
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].kl == pytest.approx(found[0].kl, rel=1e-2)
    assert found[1].perplexity_ratio == pytest.approx(found[0].perplexity_ratio, rel=1e-3)


@pytest.mark.parametrize("why", ["waits", "memory"])
def test_what_cannot_be_captured_trains_all_the_same(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    text = ["--model", str(dense), "--dataset", str(corpus), "--device", "cuda", "--dtype", "float32"]
    size = ["--tokens", "1024", "--seq-len", "32", "--batch-size", "4", "--held-out-tokens", "64", "--recipe", "relu"]
    if why == "memory":
        monkeypatch.setattr(graphs, "_HELD", 1e9)
    else:
        hidden_states = LogitMaker.hidden_states

        def read(maker: LogitMaker, ids: torch.Tensor) -> torch.Tensor:
            found = hidden_states(maker, ids)
            assert float(found.detach().sum()) < 1e9  # no graph can wait for the host
            return found

        monkeypatch.setattr(LogitMaker, "hidden_states", read)
    assert run(["adapt", *text, *size, "--learning-rate", "1e-3", "--out", "out"]) == 0
    assert "training launches kernels one by one, which is slower" in capsys.readouterr().err
    losses = [point["held_out_loss"] for point in read_record(Path("out")).curve if "held_out_loss" in point]
    assert min(losses[1:]) < losses[0]
    torch.rand(1, device="cuda")  # a capture that failed has left nothing behind
