"""Mixtral with dReLU experts, as published: without remote code, and without its predictors."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_family, build_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import teal_cli.hf
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.models.activations import zeroing_activation
from teal_cli.models.layers import Experts
from teal_cli.sparse import control_of, make_intrinsic_, neuron_sparsity

assert teal_cli.hf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as on the hub: an expert's tensors by themselves, predictors beside them, and code that is not run."""
    build_model("turbosparsemixtral").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    for block in range(2):
        for expert in range(4):
            prefix = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
            assert {f"{prefix}.{name}.weight" for name in ("w1", "w2", "w3")} <= tensors.keys()
            tensors[f"{prefix}.predictor.fc1.weight"] = torch.ones(8, 64)
            tensors[f"{prefix}.predictor.fc2.weight"] = torch.ones(100, 8)
    save_file(tensors, path, {"format": "pt"})
    config = tmp_path / "m" / "config.json"
    auto_map = {"AutoConfig": "configuration.No", "AutoModelForCausalLM": "modeling.No"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    return tmp_path / "m"


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_expert_computes_what_the_paper_says(folder: Path) -> None:
    """From the tensors of the file: w2(relu(w1 x) * relu(w3 x)), weighted and summed."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    model = load_model(folder, device="cpu", dtype="float32").double()
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixture = model.model.layers[1].mlp
    assert isinstance(mixture.experts, Experts)
    activation = zeroing_activation(mixture.experts)
    assert activation is not None
    assert activation.kind == "drelu"
    _, weights, chosen = mixture.gate(x)
    prefix = "model.layers.1.block_sparse_moe.experts"
    expected = torch.zeros_like(x)
    for row in range(5):
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            w1, w2, w3 = (tensors[f"{prefix}.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
            expected[row] += weight * (w2 @ (torch.relu(w1 @ x[row]) * torch.relu(w3 @ x[row])))
    # transformers makes the weights in float32.
    torch.testing.assert_close(mixture(x[None])[0], expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_plain_from_pretrained_is_enough(folder: Path) -> None:
    plain, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]  # nobody is warned of the predictors
    assert not report["missing_keys"]
    ids = _tokens(1, 9)
    plain.eval()
    assert torch.equal(plain(ids).logits, load_model(folder, device="cpu", dtype="auto")(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("path", ["native", "general"])
@pytest.mark.parametrize("rows", [1, 3])
def test_zeros_before_down_are_skipped(folder: Path, path: str, rows: int) -> None:
    dense, sparse = (load_model(folder, device="cpu", dtype="auto") for _ in range(2))
    plan = make_intrinsic_(sparse)
    engine, cache = Engine(sparse, path=path), DynamicCache(config=dense.config)
    own, ids = engine.new_cache(16), _tokens(rows, 16)
    engine.prefill(ids[:, :12], own)
    dense(ids[:, :12], past_key_values=cache)
    with control_of(sparse).counting() as counter:
        for position in range(12, 16):
            token = ids[:, position : position + 1]
            expected, got = dense(token, past_key_values=cache).logits[:, -1], engine.step(token, own)
            assert float((got - expected).norm() / expected.norm()) < 2e-6
    realised = counter.by_projection()
    downs = {name for name, share in realised.items() if share > 0}
    assert downs == {f"model.layers.{block}.mlp.experts.down_proj" for block in range(2)} <= plan.projections.keys()
    assert neuron_sparsity(sparse, realised) == pytest.approx(0.75, abs=0.05)


def test_greedy_equals_dense(folder: Path) -> None:
    ids = _tokens(1, 12)
    dense = load_model(folder, device="cpu", dtype="auto")
    expected = dense.generate(ids, do_sample=False, min_new_tokens=20, max_new_tokens=20, eos_token_id=None)
    sparse = load_model(folder, device="cpu", dtype="auto")
    make_intrinsic_(sparse)
    got = list(Engine(sparse).generate(ids, max_new_tokens=20, sampling=SamplingConfig()))
    assert got == expected[0, 12:].tolist()


def test_experts_without_zeros() -> None:
    with pytest.raises(ArtefactError, match=r"activation of this model \(silu\) makes no zeros"):
        make_intrinsic_(build_family("mixtral"))
