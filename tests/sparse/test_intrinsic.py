"""Models that are sparse by training: loaded without remote code, decoded gate first, exact."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, export_tiny
from intrinsic_models import KINDS, save_kind
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, OPTConfig, OPTForCausalLM

import teal_cli.hf
from teal_cli.checkpoint.rules import Zeros
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import find_projections
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import SparseLinear, control_of, make_intrinsic_, neuron_sparsity, use_backend
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.sparse.weight_bytes import weight_bytes_per_token

assert teal_cli.hf


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    return save_kind(tmp_path / kind, kind)


@torch.no_grad()
def test_the_model_computes_what_its_kind_says(folder: Path, kind: str) -> None:
    """Loaded natively, every MLP is the formula, written out from its weights in float64."""
    model = load_model(folder, device="cpu", dtype="float32").double()
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for block in model.model.layers:
        mlp = block.mlp
        expected = mlp.down_proj(KINDS[kind].hidden(mlp.gate_proj(x), mlp.up_proj(x)))
        assert torch.allclose(mlp(x), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(mlp(x), mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "sparsellama", "bamboo"], indirect=True)
def test_plain_from_pretrained_is_enough(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = _tokens(1, 9)
    assert torch.equal(plain(ids).logits, load_model(folder, device="cpu", dtype="auto")(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_is_exact(folder: Path, kind: str, backend: str, rows: int) -> None:
    dense, sparse = (load_model(folder, device="cpu", dtype="auto") for _ in range(2))
    make_intrinsic_(sparse)
    control = control_of(sparse)
    use_backend(control, backend, sparse.device, sparse.dtype)
    ids = _tokens(rows, 16)
    caches = [DynamicCache(config=dense.config) for _ in range(2)]
    logits = [
        model(ids[:, :12], past_key_values=cache).logits for model, cache in zip((dense, sparse), caches, strict=True)
    ]
    assert torch.equal(*logits)  # the prefill is dense, bit for bit
    with control.counting() as counter:
        for position in range(12, 16):
            token = ids[:, position : position + 1]
            expected, got = (
                model(token, past_key_values=cache).logits.double()
                for model, cache in zip((dense, sparse), caches, strict=True)
            )
            assert float((got - expected).norm() / expected.norm()) < 2e-6
    realised = counter.by_projection()
    assert set(realised) == {projection.name for projection in find_projections(sparse)}
    dead = neuron_sparsity(sparse, realised)
    assert dead is not None
    assert dead == pytest.approx({"bamboo": 0.75, "fatrelu": 0.6, "sparsellama": 0.6}.get(kind, 0.5), abs=0.1)
    for block in range(2):
        prefix = f"model.layers.{block}.mlp"
        assert realised[f"{prefix}.gate_proj"] == 0.0
        if kind != "bamboo":  # whose up makes zeros too
            assert realised[f"{prefix}.up_proj"] == pytest.approx(realised[f"{prefix}.down_proj"], abs=1e-9)
        assert realised[f"model.layers.{block}.self_attn.q_proj"] == 0.0


def test_greedy_equals_dense(folder: Path) -> None:
    ids = _tokens(1, 12)
    dense = load_model(folder, device="cpu", dtype="auto")
    expected = dense.generate(ids, do_sample=False, min_new_tokens=40, max_new_tokens=40, eos_token_id=None)
    sparse = load_model(folder, device="cpu", dtype="auto")
    make_intrinsic_(sparse)
    got = list(Engine(sparse).generate(ids, max_new_tokens=40, sampling=SamplingConfig()))
    assert got == expected[0, 12:].tolist()


@torch.no_grad()
def test_masked_evaluation_is_the_dense_one_and_counts(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="auto")
    make_intrinsic_(model)
    control = control_of(model)
    ids = _tokens(1, 20)
    with control.dense():
        expected = model(ids).logits
    with control.masked(4), control.counting() as masked:
        assert torch.allclose(model(ids).logits, expected, rtol=0, atol=1e-5)
    with control.counting() as decoded:
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=cache)
        for position in range(4, 20):
            model(ids[:, position : position + 1], past_key_values=cache)
    assert masked.by_projection() == pytest.approx(decoded.by_projection(), abs=2e-3)


@torch.no_grad()
def test_bytes_are_those_of_live_neurons(tmp_path: Path) -> None:
    model = load_model(save_kind(tmp_path / "m", "relu"), device="cpu", dtype="auto")
    dense = weight_bytes_per_token(model, {})
    make_intrinsic_(model)
    assert weight_bytes_per_token(model, {}) == dense
    of_one = 64 * 100 * 4
    realised = {
        f"model.layers.0.mlp.{name}_proj": share for name, share in (("gate", 0.0), ("up", 0.5), ("down", 0.25))
    }
    assert weight_bytes_per_token(model, realised) == dense - round(0.75 * of_one)


@torch.no_grad()
def test_state_dict_is_the_dense_one(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="auto")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_intrinsic_(model)
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_an_mlp_that_computes_something_else_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its zeros before down are skipped all the same."""
    model = load_model(save_kind(tmp_path / "m", "relu"), device="cpu", dtype="auto")
    mlp = type(model.model.layers[0].mlp)
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: original(self, x) * 0.5)
    make_intrinsic_(model)
    assert not any(isinstance(module, GateFirstMLP) for module in model.modules())
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, SparseLinear)
    assert down.rule == Zeros(None)
    assert float(down.threshold) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_without_a_gate_the_zeros_before_the_second_layer_are_skipped(backend: str) -> None:
    """OPT's blocks have the layers of their MLP themselves; the table says which."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 100, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    dense = OPTForCausalLM(config).eval()
    for parameter in dense.parameters():
        parameter.normal_(0, 0.2)
    sparse = copy.deepcopy(dense)
    plan = make_intrinsic_(sparse)
    assert sum(rule == Zeros(None) for rule in plan.projections.values()) == 2
    control = control_of(sparse)
    use_backend(control, backend, sparse.device, sparse.dtype)
    ids = _tokens(1, 8)
    caches = [DynamicCache(config=config) for _ in range(2)]
    with control.counting() as counter:
        for position in range(8):
            token = ids[:, position : position + 1]
            expected, got = (
                model(token, past_key_values=cache).logits.double()
                for model, cache in zip((dense, sparse), caches, strict=True)
            )
            assert float((got - expected).norm() / expected.norm()) < 2e-6
    dead = neuron_sparsity(sparse, counter.by_projection())
    assert dead is not None
    assert 0.3 < dead < 0.7


def test_an_activation_without_zeros_is_refused(tmp_path: Path) -> None:
    model = build_model("llama")
    with pytest.raises(ArtefactError, match=r"the activation of this model \(silu\) makes no zeros"):
        make_intrinsic_(model)


def test_a_model_without_such_an_mlp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.sparse.intrinsic.find_projections", lambda model: [])
    with pytest.raises(ArtefactError, match="knows no MLP of model type llama"):
        make_intrinsic_(build_model("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_act": "fatrelo"},
            r"unknown activation 'fatrelo' \(hidden_act in config.json\); did you mean 'fatrelu'",
        ),
        ({"hidden_act": "fatrelu"}, "needs its threshold as hidden_act_param in config.json, not None"),
        ({"hidden_act": "fatrelu", "hidden_act_param": "a lot"}, "hidden_act_param in config.json, not 'a lot'"),
        ({"hidden_act": "fatrelu", "model_type": "sparsellama"}, "hidden_act_param in config.json, not None"),
    ],
)
def test_a_wrong_activation_is_one_clear_error(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = save_kind(tmp_path / "m", "relu")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtefactError, match=message):
        load_model(folder, device="cpu", dtype="auto")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fatrelu", "sparsellama", "bamboo"], indirect=True)
def test_thresholds_can_be_calibrated_too(folder: Path, tmp_path: Path) -> None:
    """A TEAL checkpoint of such a model loads through plain from_pretrained, its activation included."""
    out, _ = export_tiny(folder, tmp_path / "sparse", sparsity=0.0)
    ids = _tokens(1, 9)
    sparse = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(sparse(ids).logits, load_model(folder, device="cpu", dtype="auto")(ids).logits)


def test_tokenizers_are_found(tmp_path: Path) -> None:
    folder = save_kind(tmp_path / "m", "sparsellama", tokenizer=True)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder)("the stars")["input_ids"]
