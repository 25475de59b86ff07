"""Sparse models behind plain transformers: loading, exactness, decoding, saving."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, MaskedReference, calibrate_tiny, export_tiny, save_tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache

import teal_cli.hf
from teal_cli.allocation import make_plan
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Threshold, threshold_rule
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.sparse import apply_plan_, control_of, lay_out_, sparse_layers, sparsify_
from teal_kernels import masked_input

assert teal_cli.hf


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length))


@pytest.fixture
def pair(tmp_path: Path, family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(dense, sparse) of a tiny model, both through plain from_pretrained."""
    folder = save_tiny(tmp_path / "dense", family)
    out, _ = export_tiny(folder, tmp_path / "sparse")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoModelForCausalLM.from_pretrained(out).eval()


def _thresholds(sparse: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.threshold for name, layer in sparse_layers(sparse).items()}


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 5, 17, 120])
def test_prefill_is_exactly_dense(pair, length: int) -> None:
    dense, sparse = pair
    ids = _tokens(1, length)
    assert torch.equal(sparse(input_ids=ids).logits, dense(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_equals_eager_masked_maths(pair, rows: int) -> None:
    dense, sparse = pair
    ids = _tokens(rows, 40)
    caches = DynamicCache(config=dense.config), DynamicCache(config=sparse.config)
    dense(input_ids=ids[:, :20], past_key_values=caches[0])
    sparse(input_ids=ids[:, :20], past_key_values=caches[1])
    reference = MaskedReference(dense, _thresholds(sparse))
    compared = 0
    for position in range(20, 40):
        token = ids[:, position : position + 1]
        expected = dense(input_ids=token, past_key_values=caches[0]).logits.double()
        got = sparse(input_ids=token, past_key_values=caches[1]).logits.double()
        if not reference.decided:
            break
        assert float((got - expected).norm() / expected.norm()) < 1e-4
        compared += 1
    assert compared >= 5


@torch.no_grad()
def test_sparsity_is_really_applied(pair) -> None:
    """Guards the tests above: a model that stayed dense would not pass."""
    dense, sparse = pair
    ids = _tokens(1, 20)
    caches = DynamicCache(config=dense.config), DynamicCache(config=sparse.config)
    for model, cache in zip((dense, sparse), caches, strict=True):
        model(input_ids=ids[:, :19], past_key_values=cache)
    control = control_of(sparse)
    with control.counting() as counter:
        got = sparse(input_ids=ids[:, 19:], past_key_values=caches[1]).logits
    expected = dense(input_ids=ids[:, 19:], past_key_values=caches[0]).logits
    assert not torch.allclose(got, expected, atol=1e-3)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.1)
    assert set(counter.by_projection()) == set(sparse_layers(sparse))


def test_greedy_at_sparsity_zero_equals_generate(tmp_path: Path, family: str) -> None:
    from teal_cli.decode.engine import Engine
    from teal_cli.decode.sampling import SamplingConfig

    folder = save_tiny(tmp_path / "dense", family)
    out, _ = export_tiny(folder, tmp_path / "sparse", sparsity=0.0)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = _tokens(1, 12)
    expected = dense.generate(ids, do_sample=False, min_new_tokens=64, max_new_tokens=64)[0, 12:].tolist()
    engine = Engine(load_model(out, device="cpu", dtype="auto"), path="general")
    # transformers suppresses the end token while min_new_tokens are not reached; teach ours the same.
    forbidden = torch.zeros(VOCABULARY)
    forbidden[1] = -torch.inf
    original = engine.path._forward
    engine.path._forward = lambda *inputs: original(*inputs) + forbidden
    got = list(engine.generate(ids, max_new_tokens=64, sampling=SamplingConfig()))
    assert got == expected


def test_checkpoint_holds_exactly_the_dense_keys(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "qwen2")
    out, _ = export_tiny(folder, tmp_path / "sparse")
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    names = []
    for path in (folder, out, tmp_path / "again"):
        with safe_open(path / "model.safetensors", "pt") as file:
            names.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    dense, exported, again = names
    assert set(dense) == set(exported) == set(again)
    for name, tensor in dense.items():
        assert torch.equal(tensor, exported[name])
        assert torch.equal(tensor, again[name])


@torch.no_grad()
def test_saved_again_it_is_the_same_model(pair, tmp_path: Path) -> None:
    _, sparse = pair
    sparse.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    for (name, layer), other in zip(sparse_layers(sparse).items(), sparse_layers(again).values(), strict=True):
        assert (layer.rule, float(layer.threshold)) == (other.rule, float(other.threshold)), name
    token = _tokens(1, 1)
    assert torch.equal(sparse(input_ids=token).logits, again(input_ids=token).logits)


def test_weights_are_held_once(pair) -> None:
    dense, sparse = pair
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in sparse.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in dense.parameters())


@torch.no_grad()
def test_thresholds_that_differ_within_a_site(tmp_path: Path) -> None:
    """q, k and v with three thresholds and up without any: no layer may borrow another's mask."""
    folder = save_tiny(tmp_path / "dense", "qwen2")
    calibration = calibrate_tiny(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    sparse = copy.deepcopy(dense)
    shares = {"q_proj": 0.2, "k_proj": 0.5, "v_proj": 0.8, "up_proj": 0.0}
    entries = {}
    for projection in calibration.projections:
        share = shares.get(projection.name.rpartition(".")[2], 0.6)
        entries[projection.name] = threshold_rule(calibration.threshold(projection, share), share)
    sparsify_(sparse, SparsityPlan("by hand", 0.5, entries))
    thresholds = {name: torch.tensor(entry.threshold) for name, entry in entries.items() if entry != Dense()}
    token = _tokens(1, 1, seed=9)
    reference = MaskedReference(dense, thresholds)
    expected = dense(input_ids=token).logits
    assert reference.decided
    torch.testing.assert_close(sparse(input_ids=token).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_shared_product_notices_other_inputs(tmp_path: Path) -> None:
    """Layers of a site called alone, out of order, with changed inputs, compute for themselves."""
    folder = save_tiny(tmp_path / "dense", "qwen2")
    out, _ = export_tiny(folder, tmp_path / "sparse")
    attention = AutoModelForCausalLM.from_pretrained(out).eval().model.layers[0].self_attn
    a, b = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def alone(layer, x):
        return torch.nn.functional.linear(masked_input(x, layer.threshold), layer.weight, layer.bias)

    for layer, x in ((attention.q_proj, a), (attention.k_proj, b), (attention.v_proj, a), (attention.k_proj, a)):
        torch.testing.assert_close(layer(x), alone(layer, x), rtol=1e-5, atol=1e-5)
    attention.q_proj(a)
    a.mul_(3)
    torch.testing.assert_close(attention.k_proj(a), alone(attention.k_proj, a), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_agree(pair, backend: str) -> None:
    _, sparse = pair
    token = _tokens(2, 1)
    expected = sparse(input_ids=token).logits
    control_of(sparse).backend = backend
    torch.testing.assert_close(sparse(input_ids=token).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_casting_keeps_results_right(pair) -> None:
    """A cast takes the weights out of their layout: slower until laid out again, never wrong."""
    _, sparse = pair
    token = _tokens(1, 1)
    expected = sparse(input_ids=token).logits
    sparse.to(torch.float64)
    assert {layer.threshold.dtype for layer in sparse_layers(sparse).values()} == {torch.float32}
    sparse.to(torch.float32)
    torch.testing.assert_close(sparse(input_ids=token).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["assign", "copy", "load", "move", "inference"])
def test_changed_weights_are_used(pair, change: str) -> None:
    """However the weights change, no layer may go on with the table of the old ones."""
    _, sparse = pair
    token = _tokens(1, 1)
    sparse(input_ids=token)
    doubled = {name: tensor * (2 if "k_proj" in name else 1) for name, tensor in sparse.state_dict().items()}
    changed = copy.deepcopy(sparse) if change == "copy" else sparse
    changed.load_state_dict(doubled, assign=change == "assign")
    if change == "move":
        lay_out_(changed.to(torch.float64).to(torch.float32))
    elif change == "inference":
        with torch.inference_mode():
            changed(input_ids=token)
    control = control_of(changed)
    got = changed(input_ids=token).logits
    control.backend = "reference"
    for merged in {layer.merged for layer in sparse_layers(changed).values()}:
        merged.forget_layout()
    torch.testing.assert_close(got, changed(input_ids=token).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("replaced", ["data", "assign"])
def test_replaced_weights_under_inference_mode(pair, replaced: str) -> None:
    _, sparse = pair
    token, layer = _tokens(1, 1), sparse.model.layers[0].self_attn.v_proj
    with torch.inference_mode():
        before = sparse(input_ids=token).logits
    if replaced == "data":
        layer.weight.data = layer.weight.data * 2
    else:
        doubled = {
            name: t * (2 if "0.self_attn.v_proj.weight" in name else 1) for name, t in sparse.state_dict().items()
        }
        sparse.load_state_dict(doubled, assign=True)
    expected = sparse(input_ids=token).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(input_ids=token).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_move_that_moves_nothing_keeps_the_layout(pair) -> None:
    _, sparse = pair
    merged = sparse.model.layers[0].mlp.gate_proj.merged
    table = merged._table
    assert table is not None
    sparse.to("cpu")
    assert merged._table is table


@torch.no_grad()
def test_in_float64_decoding_is_the_masked_maths_to_the_last_digits(tmp_path: Path) -> None:
    """In float32 an input beside its threshold may fall on the other side; in float64 none does here."""
    folder = save_tiny(tmp_path / "dense", "qwen3")
    out, _ = export_tiny(folder, tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sparse = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    ids = _tokens(1, 100)
    caches = DynamicCache(config=dense.config), DynamicCache(config=sparse.config)
    dense(input_ids=ids[:, :20], past_key_values=caches[0])
    sparse(input_ids=ids[:, :20], past_key_values=caches[1])
    MaskedReference(dense, _thresholds(sparse))
    for position in range(20, 100):
        token = ids[:, position : position + 1]
        expected = dense(input_ids=token, past_key_values=caches[0]).logits
        got = sparse(input_ids=token, past_key_values=caches[1]).logits
        assert float((got - expected).norm() / expected.norm()) < 1e-12


@torch.no_grad()
def test_masked_evaluation_equals_decoding(pair) -> None:
    """The forward pass of `teal eval` gives what decoding token by token gives."""
    _, sparse = pair
    ids, prefix = _tokens(2, 30), 10
    control = control_of(sparse)
    with control.masked(prefix):
        at_once = sparse(input_ids=ids).logits
    cache = DynamicCache(config=sparse.config)
    steps = [sparse(input_ids=ids[:, :prefix], past_key_values=cache).logits]
    steps += [sparse(input_ids=ids[:, p : p + 1], past_key_values=cache).logits for p in range(prefix, 30)]
    torch.testing.assert_close(at_once, torch.cat(steps, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_plain_generate_decodes_sparsely(pair) -> None:
    _, sparse = pair
    with control_of(sparse).counting() as counter:
        sparse.generate(_tokens(1, 8), do_sample=False, min_new_tokens=8, max_new_tokens=8)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def test_control_switches(pair) -> None:
    dense, sparse = pair
    token = _tokens(1, 1)
    expected = dense(input_ids=token).logits
    control = control_of(sparse)
    with control.switched_off():
        torch.testing.assert_close(sparse(input_ids=token).logits, expected)
    with control.dense():
        torch.testing.assert_close(sparse(input_ids=token).logits, expected)
    assert not torch.allclose(sparse(input_ids=token).logits, expected, atol=1e-3)


def test_wrong_thresholds_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense")
    out, calibration = export_tiny(folder, tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(out)
    plan = make_plan(calibration, 0.4, "uniform")
    del plan.projections["model.layers.0.mlp.up_proj"]
    with pytest.raises(ArtefactError, match="differ, at model.layers.0.mlp.up_proj"):
        apply_plan_(model, plan)
    config = json.loads((out / "config.json").read_text())
    plan.projections["model.layers.7.mlp.up_proj"] = Threshold(0.1, 0.5)
    config["quantization_config"] = plan.to_dict()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="no linear layer model.layers.7"):
        AutoModelForCausalLM.from_pretrained(out)


@torch.no_grad()
def test_compiles_without_graph_breaks(tmp_path: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    token = _tokens(1, 1)
    expected = model(input_ids=token, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=token, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
