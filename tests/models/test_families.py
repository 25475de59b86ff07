"""Every family through the whole chain: one matrix, in which none is skipped.

A new family is a row of teal_cli/models/architectures.yaml and a line of FAMILIES in tests/tiny_configs.py.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, VOCABULARY, MaskedReference, build_family, build_model, build_tokenizer
from transformers import DynamicCache, EncoderDecoderCache

import teal_cli.hf
from teal_cli.calibration import histogram, sensitivity
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.rules import Dense
from teal_cli.config import CalibrateConfig, EvalConfig, ExportConfig, GenerateConfig
from teal_cli.console import QUIET
from teal_cli.data import token_blocks
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_loading import load_dense, load_model
from teal_cli.models.architectures import architecture_of, block_weights, find_projections, table
from teal_cli.models.forward import check_positions, halves, run_text
from teal_cli.models.loading import auto_class, outline
from teal_cli.report.tables import eval_tables
from teal_cli.sparse import control_of, recalibrate_, sparse_layers, sparsify_
from teal_cli.steps.calibrate import calibrate
from teal_cli.steps.evaluate import evaluate
from teal_cli.steps.export import export
from teal_cli.steps.generate import Generator

assert teal_cli.hf
SPARSITY = 0.5
_OF_NO_PROJECTION = ("gate.weight", "router.weight", "attention_bias", "_norm.weight", "_proj_bias")


@dataclass(frozen=True)
class Made:
    """A family's tiny model after `teal calibrate` and `teal export`."""

    family: str
    kind: str
    folder: Path
    run: Path
    checkpoint: Path
    text: Path
    loaded: dict[Path, Any] = field(default_factory=dict)
    """Models of transformers, of which each test has a copy: copying takes a quarter of the time of loading."""

    @property
    def calibration(self) -> Calibration:
        return calibration_file.load(self.run)

    def dense(self) -> Any:
        """Plain transformers."""
        return self._copy(self.folder)

    def sparse(self) -> Any:
        """Plain transformers, after `import teal_cli.hf`."""
        return self._copy(self.checkpoint)

    def _copy(self, folder: Path) -> Any:
        if folder not in self.loaded:
            self.loaded[folder] = auto_class(self.kind).from_pretrained(folder).eval()
        return copy.deepcopy(self.loaded[folder])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family = request.param
    work = tmp_path_factory.mktemp(family)
    text = work / "text.txt"
    text.write_text("".join(f"the keeper {i} of the lighthouse writes {i * 7} words down\n" for i in range(200)))
    build_model(family).save_pretrained(work / "dense")
    build_tokenizer().save_pretrained(work / "dense")
    options = {"model": str(work / "dense"), "runs": work / "runs"}
    run = work / "runs" / "dense"
    calibrate(
        CalibrateConfig(**options, dataset=str(text), tokens=256, seq_len=64, sensitivity_tokens=64, batch_size=2),
        QUIET,
    )
    export(ExportConfig(**options, sparsity=SPARSITY, allocation="fisher", out=work / "sparse"), QUIET)
    kind = architecture_of(FAMILIES[family]["model_type"]).kind
    return Made(family, kind, work / "dense", run, work / "sparse", text)


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all positions, or an encoder's hidden states."""
    output = run_text(model, ids, logits_to_keep=0)
    return output.logits if "logits" in output else output.last_hidden_state


def test_every_row_is_in_the_matrix() -> None:
    assert {config["model_type"] for config in FAMILIES.values()} == set(table())


def test_the_chain_covers_all_projections(made: Made) -> None:
    """Nothing is left out: what was calibrated, exported and loaded are the linear layers of the blocks."""
    calibration, sparse = made.calibration, made.sparse()
    names = [projection.name for projection in find_projections(build_family(made.family), output_layer=None)]
    assert [projection.name for projection in calibration.projections] == names
    assert set(sparse_layers(sparse)) == set(calibration.sensitivities) == set(names)
    weight = {projection.name: projection.weights_read for projection in calibration.projections}
    blocks = architecture_of(FAMILIES[made.family]["model_type"]).blocks
    chosen = getattr(made.dense().config, "num_experts_per_tok", None)
    inside = sum(
        parameter.numel() if parameter.dim() < 3 else parameter[:chosen].numel()
        for path in blocks
        for name, parameter in made.dense().get_submodule(path).named_parameters()
        if parameter.dim() > 1 and not any(other in name for other in _OF_NO_PROJECTION)
    )
    assert block_weights(calibration.projections) == inside
    planned = sum(layer.rule.expected_sparsity * weight[name] for name, layer in sparse_layers(sparse).items())
    assert planned / inside == pytest.approx(SPARSITY, abs=0.01)


@torch.no_grad()
def test_histograms_count_what_the_projections_see(made: Made) -> None:
    model = build_family(made.family)
    projections, ids = find_projections(model, output_layer=None), _tokens(4, 32)
    sinks = 4 if made.kind == "causal" else 0
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in projections}

    def hook_for(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            where = args[1].rows if len(args) > 1 else torch.arange(len(rows))
            tokens = len(rows) // 2 if len(args) == 1 else 32
            seen[name].append(rows[where % tokens >= sinks])

        return hook

    handles = [model.get_submodule(p.name).register_forward_pre_hook(hook_for(p.name)) for p in projections]
    histograms = collect(model, projections, ids.split(2), sink_tokens=sinks)
    for handle in handles:
        handle.remove()
    for p in projections:
        assert torch.equal(histograms[p.site], histogram.count(torch.cat(seen[p.name]))), p.name


@torch.no_grad()
def test_a_prefill_is_dense(made: Made) -> None:
    dense, sparse, ids = made.dense(), made.sparse(), _tokens(2, 24)
    with control_of(sparse).dense():
        got, expected = _output(sparse, ids), _output(dense, ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(_output(sparse, ids), got) == (made.kind != "encoder")  # an encoder has no prefill


class _Decoding:
    """A model that has read a prompt, and takes token after token."""

    def __init__(self, model: Any, kind: str, prompt: torch.Tensor) -> None:
        self._model = model
        self._more: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config)}
        self._ids = "input_ids"
        if kind == "seq2seq":
            own, cross = (DynamicCache(config=model.config) for _ in range(2))
            self._more = {"past_key_values": EncoderDecoderCache(own, cross)}
            self._more["encoder_outputs"] = model.get_encoder()(input_ids=prompt)
            self._ids, prompt = "decoder_input_ids", prompt[:, :2]
        self.step(prompt)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last position."""
        return self._model(**{self._ids: ids}, **self._more).logits[:, -1].double()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_is_the_eager_masked_maths(made: Made, rows: int) -> None:
    dense, sparse = build_family(made.family), made.sparse()
    thresholds = {name: layer.threshold for name, layer in sparse_layers(sparse).items() if layer.rule != Dense()}
    prompt, tokens = _tokens(rows, 20), _tokens(rows, 8, seed=1)
    control = control_of(sparse)
    if made.kind == "encoder":  # which reads all at once, as it is
        reference = MaskedReference(dense, thresholds)
        with control.counting() as counter:
            got = _output(sparse, prompt)
        assert reference.decided
        torch.testing.assert_close(got, _output(dense, prompt), rtol=1e-4, atol=1e-4)
        assert counter.model_wide() == pytest.approx(SPARSITY, abs=0.05)
        return
    readers = [_Decoding(model, made.kind, prompt) for model in (dense, sparse)]
    reference = MaskedReference(dense, thresholds)
    compared = 0
    with control.counting() as counter:
        for token in tokens.split(1, dim=1):
            expected, got = (reader.step(token) for reader in readers)
            if not reference.decided:
                break
            assert float((got - expected).norm() / expected.norm()) < 1e-4
            compared += 1
    assert compared >= 2
    assert 0.3 < (counter.model_wide() or 0.0) < 0.7


@torch.no_grad()
def test_masked_evaluation_is_the_same_network(made: Made) -> None:
    """In one pass with masks: what decoding gives token by token, and what an encoder gives."""
    dense, sparse, ids = build_family(made.family), made.sparse(), _tokens(2, 24)
    control = control_of(sparse)
    if made.kind == "causal":
        sparse.double()  # in float32 a rounding may decide at a threshold
        with control.masked(16):
            got = _output(sparse, ids)[:, 15:]
        reader = _Decoding(sparse, made.kind, ids[:, :16])
        expected = torch.stack([reader.step(token) for token in ids[:, 16:].split(1, dim=1)], dim=1)
        got = got[:, 1:]
        assert float((got[:, :3] - expected[:, :3]).norm() / expected[:, :3].norm()) < 1e-6
        return
    thresholds = {name: layer.threshold for name, layer in sparse_layers(sparse).items() if layer.rule != Dense()}
    reference = MaskedReference(dense, thresholds)
    with control.masked(0):
        got = _output(sparse, ids)
    expected = _output(dense, ids)
    assert reference.decided
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _loss(model: Any, kind: str, ids: torch.Tensor) -> torch.Tensor:
    output = run_text(model, ids, logits_to_keep=0)
    if kind == "encoder":
        direction = F.normalize(output.last_hidden_state.mean(1), dim=-1)
        signs = torch.randint(0, 2, direction.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return (direction * signs).sum()
    logits, targets = output.logits[:, :-1], ids[:, 1:]
    if kind == "seq2seq":
        logits, targets = output.logits, halves(model, ids).target
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_sensitivities_are_the_gradients_of_the_whole_model(made: Made) -> None:
    """A factor of 1 on what would be dropped of each row: its derivative is the first-order change."""
    model, ids, sinks, bin_ = build_family(made.family), _tokens(1, 24), 4, 316
    projections = find_projections(model, output_layer=None)
    found = sensitivity.measure(model, projections, [ids], sink_tokens=sinks)
    together = made.kind == "encoder"  # which drops at all positions at once
    limit = histogram.upper_edge(sensitivity.edges()[bin_])
    factors: dict[str, torch.Tensor] = {}
    counted: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            factors[name] = torch.ones(*x.shape[:-1], 1, requires_grad=True)
            rows = x[..., 0].numel()
            counted[name] = (rest[0].rows if rest else torch.arange(rows)) >= (0 if together else sinks)
            return (torch.where(x.abs() <= limit, x * factors[name], x), *rest)

        return hook

    handles = [model.get_submodule(p.name).register_forward_pre_hook(hook_for(p.name)) for p in projections]
    loss = _loss(model, made.kind, ids)
    for handle in handles:
        handle.remove()
    changes = torch.autograd.grad(loss, list(factors.values()))
    for name, change in zip(factors, changes, strict=True):
        changes_of_rows = change.flatten()[counted[name]].double()
        expected = float(changes_of_rows.sum().square() if together else changes_of_rows.square().sum())
        assert float(found[name][bin_]) == pytest.approx(expected, rel=2e-3, abs=1e-9), name


@torch.no_grad()
def test_thresholds_hold_in_the_sparse_network(made: Made) -> None:
    """On the text that set them, every projection drops what its plan says."""
    model, text = build_family(made.family), _tokens(3, 48)
    prefix = 16 if made.kind == "causal" else 0
    plan = made.sparse().config.quantization_config.plan
    sparsify_(model, plan)
    recalibrate_(model, plan, text, dense_prefix=prefix)
    control = control_of(model)
    with control.masked(prefix), control.counting() as counter:
        _output(model, text)
    assert set(counter.by_projection()) == set(plan.projections)
    for name, realised in counter.by_projection().items():
        assert realised == pytest.approx(plan.projections[name].expected_sparsity, abs=0.01), name


@torch.no_grad()
def test_saved_again_it_is_the_same_model(made: Made, tmp_path: Path) -> None:
    sparse, ids = made.sparse(), _tokens(1, 12)
    sparse.save_pretrained(tmp_path / "again")
    again = auto_class(made.kind).from_pretrained(tmp_path / "again").eval()
    with control_of(sparse).masked(0), control_of(again).masked(0):
        assert torch.equal(_output(sparse, ids), _output(again, ids))
    copied = copy.deepcopy(sparse)
    copied.load_state_dict(sparse.state_dict())
    with control_of(copied).masked(0), control_of(again).masked(0):
        assert torch.equal(_output(copied, ids), _output(again, ids))


def test_weights_are_held_once(made: Made) -> None:
    folders = made.folder, made.checkpoint
    dense, sparse = (auto_class(made.kind).from_pretrained(folder) for folder in folders)  # a copy may hold less
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in sparse.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in dense.parameters())


def test_evaluation(made: Made) -> None:
    result = evaluate(
        EvalConfig(model=str(made.checkpoint), text=made.text, tokens=128, seq_len=32, dense_prefix=[8]), QUIET
    ).to_json()
    assert eval_tables(result)
    (run,) = result["runs"]
    if made.kind == "encoder":
        assert 0.0 < run["least_cosine"] <= run["cosine"] < 1.0
        assert 0.0 < run["relative_error"] < 2.0
        assert run["realised_sparsity"] == pytest.approx(SPARSITY, abs=0.1)
        return
    assert run["dense_prefix"] == (8 if made.kind == "causal" else 0)
    assert run["tokens"] == 4 * (23 if made.kind == "causal" else 16)
    assert run["sparse"]["realised_sparsity"] == pytest.approx(SPARSITY, abs=0.1)
    assert run["sparse"]["kl"] > 0.0
    with torch.no_grad():
        dense = made.dense()
        blocks = token_blocks(str(made.text), build_tokenizer(), tokens=128, seq_len=32, seed=0, half="evaluation")
        losses = []
        for ids in blocks.split(1):
            if made.kind == "seq2seq":
                losses.append(float(dense(input_ids=ids[:, :16], labels=ids[:, 16:]).loss))
            else:
                logits = dense(input_ids=ids).logits[0]
                losses.append(float(F.cross_entropy(logits[8:-1].float(), ids[0, 9:])))
    assert run["dense"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert run["sparse"]["bytes_per_token"] < result["dense_bytes_per_token"]
    assert result["dense_bytes_per_token"] <= sum(p.nbytes for p in dense.parameters())


def test_greedy_at_sparsity_zero_equals_generate(made: Made) -> None:
    dense, prompt = made.dense(), _tokens(1, 12)
    if made.kind == "encoder":
        with pytest.raises(UsageError, match="is an encoder and writes no text"):
            Generator(GenerateConfig(model=str(made.checkpoint)), QUIET)
        return
    dense.generation_config.eos_token_id = None
    written = dense.generate(prompt, do_sample=False, max_new_tokens=20)[0].tolist()
    engine = Engine(load_model(made.checkpoint, device="cpu", dtype="auto"))
    assert engine.control is not None
    with engine.control.switched_off():
        got = list(engine.generate(prompt, max_new_tokens=20, sampling=SamplingConfig()))
    assert got == written[1 if made.kind == "seq2seq" else 12 :]
    with engine.control.counting() as counter:
        list(engine.generate(prompt, max_new_tokens=20, sampling=SamplingConfig()))
    assert 0.3 < (counter.model_wide() or 0.0) < 0.7


_NO_LINEAR = "only linear layers of their own can be quantised"
_CANNOT_BE_QUANTISED = {
    "gpt2": _NO_LINEAR,
    "gemma3": "the weight files have no .*their names are not those of the model",  # other names
}


def test_quantised(made: Made, tmp_path: Path) -> None:
    """A checkpoint of quantised weights is the quantised network, or the reason why there is none is told."""
    options = {"model": str(made.folder), "runs": tmp_path / "runs", "quantise": "int8"}
    text = {"dataset": str(made.text), "tokens": 128, "seq_len": 32, "sensitivity_tokens": 0}
    reason = _CANNOT_BE_QUANTISED.get(made.family)
    if reason is not None:
        with pytest.raises(ArtefactError, match=reason):
            calibrate(CalibrateConfig(**options, **text), QUIET)
        return
    calibration = calibrate(CalibrateConfig(**options, **text), QUIET)
    export(ExportConfig(**options, sparsity=SPARSITY, allocation="uniform", out=tmp_path / "packed"), QUIET)
    packed = load_model(tmp_path / "packed", device="cpu", dtype="auto")
    plain, packs = load_dense(made.folder, CalibrateConfig(**options), calibration)
    assert set(packs) == {projection.name for projection in calibration.projections if not projection.is_output}
    sparsify_(plain, packed.config.quantization_config.plan)
    ids = _tokens(1, 12)
    with torch.no_grad(), control_of(plain).masked(4), control_of(packed).masked(4):
        torch.testing.assert_close(_output(packed, ids), _output(plain, ids), rtol=1e-3, atol=1e-3)


TABLES_OF_POSITIONS = {"gpt2", "opt", "bert", "biogpt", "gpt_bigcode", "gpt_neo", "gptj", "mpt"}


def test_sequences_longer_than_the_positions(made: Made) -> None:
    empty = outline(made.folder)
    check_positions(empty, 256)
    if FAMILIES[made.family]["model_type"] in TABLES_OF_POSITIONS:
        with pytest.raises(UsageError, match="seq_len .257, flag --seq-len. exceeds the 256 positions"):
            check_positions(empty, 257)
        return
    check_positions(empty, 257)
    with torch.no_grad():
        assert _output(made.dense(), _tokens(1, 300)).isfinite().all()
