"""Quantised models: in place, packed, in a checkpoint, and through the command line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_model, save_tiny
from quantised_pair import check_packed, packed_pair, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

import teal_cli.hf
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.cli import run
from teal_cli.config import CalibrateConfig
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_dense, load_model
from teal_cli.models.architectures import find_projections
from teal_cli.quantise.model import quantise_
from teal_cli.quantise.rounding import gptq, quantise
from teal_cli.schemes import Scheme
from teal_cli.sparse.quantised import QuantisedLinear
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_kernels.packing import dequantised

assert teal_cli.hf
CASES = [("int8", True), ("int4:32", False), ("int4:32", True), ("int4", True)]


@pytest.mark.parametrize(("text", "parsed"), [("int8", (8, 0)), ("int4", (4, 128)), ("int4:64", (4, 64))])
def test_schemes(text: str, parsed: tuple[int, int]) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.bits, scheme.group) == parsed
    assert Scheme.parse(scheme.text) == scheme


@pytest.mark.parametrize("text", ["int3", "int4:", "int4:48", "int4:16", "int8:64", ""])
def test_what_is_no_scheme(text: str) -> None:
    with pytest.raises(ValueError, match=r"int|group"):
        Scheme.parse(text)


@pytest.mark.parametrize("name", ["int8", "int4", "int4:32"])
def test_error_is_no_more_than_of_plain_rounding(name: str) -> None:
    scheme = Scheme.parse(name)
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0  # an output of zeros stays one
    packed = quantise(weight, scheme)
    values = dequantised(packed, torch.float32).t()
    group = scheme.group_of(200)
    rounded = torch.zeros_like(weight)
    for start in range(0, 200, group):
        part = weight[:, start : start + group]
        if scheme.bits == 8:
            step = part.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
            rounded[:, start : start + group] = (part / step).round() * step
        else:
            low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
            step = ((high - low) / 15).clamp(min=1e-9)
            zero = (-low / step).round()
            rounded[:, start : start + group] = ((part / step + zero).round().clamp(0, 15) - zero) * step
    assert torch.equal(values[3], torch.zeros(200))
    assert float((values - weight).norm()) <= 1.001 * float((rounded - weight).norm())
    assert float((values - weight).norm()) < (0.01 if scheme.bits == 8 else 0.12) * float(weight.norm())


def test_weights_on_sixteen_steps_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 64), generator=generator).float()
    codes[:, 0], codes[:, 1], codes[:, 32], codes[:, 33] = 0.0, 15.0, 0.0, 15.0  # every group has both ends
    steps = (torch.rand(24, 2, generator=generator) + 0.5).half().float().repeat_interleave(32, 1)
    weight = (codes - 6.25) * steps
    torch.testing.assert_close(dequantised(quantise(weight, Scheme(4, 32)), torch.float32).t(), weight)


@pytest.mark.parametrize("group", [32, 128])
def test_gptq_changes_outputs_less_than_the_nearest_codes(group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 200, generator=generator) @ (torch.randn(200, 200, generator=generator) / 14)
    x[:, 7] *= 20.0
    x[:, 9] = 0.0  # an input that never came
    weights = [torch.randn(out, 200, generator=generator) for out in (24, 16)]
    scheme = Scheme(4, group)
    for weight, packed in zip(weights, gptq(weights, x.t() @ x, scheme), strict=True):
        assert packed.parts == (len(weight),)
        assert packed.scales.shape == (-(-200 // group), len(weight))
        errors = [
            float((x @ (dequantised(found, torch.float32) - weight.t())).norm())
            for found in (packed, quantise(weight, scheme))
        ]
        assert errors[0] < 0.6 * errors[1]


def test_gptq_of_inputs_that_never_came_takes_the_nearest_codes() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    (packed,) = gptq([weight], torch.zeros(64, 64), Scheme(4, 32))
    error = dequantised(packed, torch.float32).t() - weight
    assert float(error.norm()) < 0.12 * float(weight.norm())


def test_a_group_of_nearly_equal_weights_stays_finite() -> None:
    weight = 1.0 + 1e-4 * torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    values = dequantised(quantise(weight, Scheme(4, 32)), torch.float32).t()
    torch.testing.assert_close(values, weight, rtol=1e-3, atol=0.0)


def test_gptq_says_that_hidden_states_are_not_finite() -> None:
    model = build_model("llama").requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ArtefactError, match="not finite: run with --dtype float32"):
        quantise_(model, Scheme(4, 32), batches=(tokens(16),))


@pytest.mark.parametrize(
    ("family", "scheme", "output"),
    [
        *(("llama-bias", *case) for case in CASES),
        ("llama", "int4:32", False),
        ("qwen3", "int4:32", True),
    ],
)
def test_packed_is_the_quantised_network(family: str, scheme: str, output: bool) -> None:
    check_packed(family, scheme, output)


@torch.no_grad()
def test_shared_product_notices_other_inputs_and_modes() -> None:
    """Layers of a site called alone, with changed inputs, or dense after sparse, compute for themselves."""
    _, packed, (_, control) = packed_pair("llama-bias", "int8", False)
    control.backend = "cpu"
    attention = packed.model.layers[0].self_attn
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))

    def alone(layer: QuantisedLinear, threshold: float) -> Tensor:
        return torch.nn.functional.linear(x * (x.abs() > threshold), layer.weight, layer.bias)

    def close(layer: QuantisedLinear, threshold: float) -> None:
        torch.testing.assert_close(layer(x), alone(layer, threshold), rtol=1e-5, atol=1e-5)

    close(attention.q_proj, 0.3)
    with control.dense():
        close(attention.k_proj, -1.0)
        close(attention.q_proj, -1.0)
    close(attention.v_proj, 0.3)
    close(attention.q_proj, 0.3)
    x.mul_(3)
    close(attention.k_proj, 0.3)


@torch.no_grad()
@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("scheme", "output"), CASES)
def test_fused_path(scheme: str, output: bool) -> None:
    plain, packed, (_, control) = packed_pair("llama-bias", scheme, output)
    assert FusedPath.unsupported(packed, control) is None
    engine, reference = Engine(packed, path="fused"), Engine(plain)
    ids = tokens(8)
    caches = engine.new_cache(12), reference.new_cache(12)
    logits = engine.prefill(ids, caches[0])
    torch.testing.assert_close(logits, reference.prefill(ids, caches[1]), rtol=1e-4, atol=1e-4)
    for _ in range(2):
        token = logits.argmax(-1, keepdim=True)
        with control.counting() as counter:
            logits = engine.step(token, caches[0])
        torch.testing.assert_close(logits, reference.step(token, caches[1]), rtol=1e-4, atol=1e-4)
        assert set(counter.by_projection()) == {projection.name for projection in find_projections(plain)}
        session = engine.open(caches[0])
        assert isinstance(session, FusedSession)
        session.pick()
        assert session.token.tolist() == logits.argmax(-1).tolist()


def test_bytes_of_a_token() -> None:
    plain, packed, _ = packed_pair("llama", "int8", True)
    whole, quantised = weight_bytes_per_token(plain, {}), weight_bytes_per_token(packed, {})
    assert 0.24 * whole < quantised < 0.30 * whole
    name = "model.layers.0.mlp.down_proj"
    layer = packed.get_submodule(name)
    assert quantised - weight_bytes_per_token(packed, {name: 0.5}) == layer.qweight.nbytes // 2


@pytest.mark.parametrize("family", ["llama", "llama-bias"], ids=["untied", "tied"])
@pytest.mark.parametrize("output", [False, True])
def test_the_chain(family: str, output: bool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny(tmp_path / "tiny", family)
    shared = ["--model", str(dense), "--quantise", "int4:32", *(["--quantise-output"] if output else [])]
    calibrate = ["--dataset", str(corpus), "--tokens", "512", "--seq-len", "64"]
    assert run(["calibrate", *shared, *calibrate]) == 0
    assert run(["export", *shared, "--sparsity", "0.4", "--json", "e.json"]) == 0
    folder = Path(json.loads(Path("e.json").read_text())["folder"])
    assert folder == Path(f"runs/tiny-int4-32{'-output' if output else ''}/fisher-0.40")
    size = (folder / "model.safetensors").stat().st_size
    assert size < (0.75 if not output else 0.62) * (dense / "model.safetensors").stat().st_size
    model = load_model(folder, device="cpu", dtype="float32")
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantisedLinear)
    assert isinstance(model.lm_head, QuantisedLinear) == output
    # What transformers loads is the network that was calibrated: the quantised one.
    config = CalibrateConfig(model=str(dense), quantise="int4:32", quantise_output=output, device="cpu")
    calibration = calibration_file.load(folder.parent)
    assert calibration.info.quantize_tokens == 512
    plain, _ = load_dense(dense, config, calibration)
    ids = tokens(20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", device="cpu", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    capsys.readouterr()
    text = ["--text", str(corpus), "--tokens", "256", "--seq-len", "64"]
    assert run(["eval", *shared, "--sparsity", "0.4", *text, "--json", "v.json"]) == 0
    assert run(["eval", "--model", str(folder), *text, "--json", "w.json"]) == 0
    in_place, packed = (json.loads(Path(name).read_text()) for name in ("v.json", "w.json"))
    assert in_place["quantization"] == packed["quantization"] == f"int4-32{'-output' if output else ''}"
    assert in_place["sparse"]["perplexity"] == pytest.approx(packed["sparse"]["perplexity"], rel=1e-3)
    assert in_place["dense_bytes_per_token"] == packed["dense_bytes_per_token"]
    assert in_place["sparse"]["bytes_per_token"] == pytest.approx(packed["sparse"]["bytes_per_token"], rel=1e-3)
    assert run(["generate", *shared, "--prompt", "the quick", "--max-new-tokens", "4", "--no-chat"]) == 0
    assert run(["generate", *shared, "--sparsity", "0", "--prompt", "the", "--max-new-tokens", "4", "--no-chat"]) == 0
    bench = ["--sparsity", "0.4", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--json", "b.json"]
    assert run(["bench", *shared, *bench]) == 0
    in_place = json.loads(Path("b.json").read_text())
    assert run(["bench", "--model", str(folder), *bench]) == 0
    by_folder = json.loads(Path("b.json").read_text())
    for result in (in_place, by_folder):
        assert result["quantization"] == f"int4-32{'-output' if output else ''}"
        assert {entry["quantization"] for entry in result["runs"]} == {result["quantization"]}


def test_what_cannot_be(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny(tmp_path / "tiny")
    assert run(["calibrate", "--model", str(dense), "--quantise", "int5"]) == 2
    assert "int5" in capsys.readouterr().err
    assert run(["bench", "--model", str(dense), "--quantise-output"]) == 2
    assert "--quantise" in capsys.readouterr().err
    calibrate = ["--dataset", str(corpus), "--tokens", "512", "--seq-len", "64"]
    assert run(["calibrate", "--model", str(dense), *calibrate]) == 0
    assert run(["export", "--model", str(dense), "--quantise", "int8", "--calibration", "runs/tiny"]) == 3
    assert "calibrate" in capsys.readouterr().err
    assert run(["export", "--model", str(dense)]) == 0
    assert run(["bench", "--model", "runs/tiny/fisher-0.50", "--quantise", "int8"]) == 2
    assert "dense model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("gemma3", [], "the weight files have no .*their names are not those of the model"),
        ("renamed bert", [], "no encoder.layer.0.*they have other.encoder.*with or without the prefix 'bert'"),
        ("gpt2", [], "only linear layers of their own can be quantised"),
        ("t5", ["--quantise-output"], "leave --quantise-output out"),
        ("bert", ["--quantise-output"], "leave --quantise-output out"),
    ],
)
def test_what_cannot_be_is_known_before_the_model_is_loaded(
    family: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("teal_cli.steps.calibrate.load_model", load)
    dense = save_tiny(tmp_path / "tiny", family.removeprefix("renamed "))
    if family == "renamed bert":
        _rename(dense, lambda name: f"other.{name}")
    assert run(["calibrate", "--model", str(dense), "--quantise", "int4:32", "--seq-len", "32", *flags]) == 3
    assert re.search(message, capsys.readouterr().err)


def test_weights_of_another_calibration_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an interrupted second `calibrate` leaves: its weights beside the first one's histograms."""
    dense = save_tiny(tmp_path / "tiny")
    shared = ["--model", str(dense), "--quantise", "int4:32"]
    assert run(["calibrate", *shared, "--dataset", str(corpus), "--tokens", "512", "--seq-len", "64"]) == 0
    file = Path("runs/tiny-int4-32/quantised.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.qweight"] += 1
    save_file(tensors, file)
    capsys.readouterr()
    assert run(["export", *shared, "--sparsity", "0.4"]) == 3
    assert "are not their calibration's" in capsys.readouterr().err
    file.unlink()
    assert run(["export", *shared, "--sparsity", "0.4"]) == 3
    assert "are missing" in capsys.readouterr().err
    # A report needs no weights, a recipe does.
    assert run(["inspect", "runs/tiny-int4-32", "--json", "i.json"]) == 0
    assert "are missing" in " ".join(capsys.readouterr().out.split())
    assert "are missing" in json.loads(Path("i.json").read_text())["calibration"]["problem"]
    assert run(["report", "runs/tiny-int4-32", "--quiet"]) == 0
    assert "are missing" in Path("runs/tiny-int4-32/report.html").read_text()


def test_a_recipe_makes_quantised_weights_again(corpus: Path, tmp_path: Path) -> None:
    dense, file = save_tiny(tmp_path / "tiny"), Path("runs/tiny-int8/quantised.safetensors")
    Path("r.yaml").write_text(
        f"model: {dense}\nquantise: int8\nstages: [calibrate]\ndataset: {corpus}\ntokens: 256\nseq_len: 64\n"
    )
    assert run(["run", "r.yaml", "--quiet"]) == 0
    file.unlink()
    assert run(["run", "r.yaml", "--quiet"]) == 0
    assert file.is_file()


def test_weights_without_a_fingerprint(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--model", str(save_tiny(tmp_path / "tiny")), "--quantise", "int8"]
    assert run(["calibrate", *shared, "--dataset", str(corpus), "--tokens", "256", "--seq-len", "64"]) == 0
    meta = Path("runs/tiny-int8/calibration.json")
    absent = ("quantised_weights", "content_sha256")
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k not in absent}))
    assert run(["export", *shared]) == 3
    assert "made by an older teal: run `teal calibrate` again" in capsys.readouterr().err


def _rename(folder: Path, name: Callable[[str], str]) -> None:
    """Give the tensors of a model's file other names."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name(key): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama-bias", lambda key: key.removeprefix("model.")),  # as the base model saves them
        ("bert", lambda key: f"bert.{key}"),  # as a model with a head saves them
    ],
    ids=["without", "with"],
)
def test_names_with_or_without_the_prefix_of_the_base_model(
    family: str, name: Callable[[str], str], tmp_path: Path, corpus: Path
) -> None:
    """The export is that of the same weights under the model's own names, and loads."""
    exported = []
    for home, rename in (("plain", lambda key: key), ("renamed", name)):
        dense = save_tiny(tmp_path / home / "m", family)
        _rename(dense, rename)
        shared = ["--model", str(dense), "--quantise", "int8", "--runs", str(tmp_path / home), "--dtype", "float32"]
        text = ["--dataset", str(corpus), "--tokens", "128", "--seq-len", "32", "--sensitivity-tokens", "0"]
        assert run(["calibrate", *shared, *text]) == 0
        out = tmp_path / home / "out"
        assert run(["export", *shared, "--sparsity", "0.4", "--allocation", "uniform", "--out", str(out)]) == 0
        exported.append(out)
    plain, renamed = (load_file(out / "model.safetensors") for out in exported)
    assert plain.keys() == renamed.keys()
    assert all(torch.equal(plain[key], renamed[key]) for key in plain)
    models = [load_model(out, device="cpu", dtype="auto") for out in exported]
    ids = torch.arange(5, 25)[None]
    first, second = (model(input_ids=ids)[0] for model in models)
    assert torch.equal(first, second)
