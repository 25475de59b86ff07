"""Models of unknown types whose blocks are those of a row: what is taken for what, and which step is another one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES as ALL_FAMILIES
from conftest import build_tokenizer
from fused_pair import random_tokens
from native_models import FAMILIES, NO_LIBRARY, OTHERS, check_steps, sparse, tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from teal_cli.cli import run
from teal_cli.decode.engine import Engine
from teal_cli.decode.recognition import first_difference, recognise_
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Architecture, architecture_of, table
from teal_cli.models.likeness import adopt_likeness_, alike
from teal_cli.sparse import sparse_layers

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "helium": (HeliumConfig, HeliumForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
}


def _registered(kind: str) -> str:
    """A model type of another name, with the classes of this one."""
    name = f"renamed-{kind}"
    config, model = _KINDS[kind]
    own = type(f"Renamed{config.__name__}", (config,), {"model_type": name, "__module__": __name__})
    AutoConfig.register(name, own, exist_ok=True)
    renamed = type(f"Renamed{model.__name__}", (model,), {"config_class": own, "__module__": __name__})
    AutoModelForCausalLM.register(own, renamed, exist_ok=True)
    return name


def _renamed(kind: str, monkeypatch: pytest.MonkeyPatch, **more: object) -> Any:
    """As `tiny`, of such a type."""
    shape = {**ALL_FAMILIES[kind], "model_type": _registered(kind)}
    monkeypatch.setitem(ALL_FAMILIES, "renamed", shape)
    assert shape["model_type"] not in table()
    plain = tiny(kind, **more)  # whose random weights are those of its norms
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**shape, **more})).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_program_is_that_of_its_family(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    assert first_difference(model) is None
    assert str(model.config.model_type) in alike(model)


@pytest.mark.parametrize(
    ("family", "of", "step"),
    [
        ("helium", "llama", "attention of block 0"),
        ("nemotron", "arcee", "norm input_layernorm of block 0"),
        ("granite", "llama", "what goes into block 0"),
        ("olmo2", "exaone4", "attention of block 0"),
        ("gpt_bigcode", "gpt2", None),
        ("gpt_bigcode-heads", "gpt2", "attention of block 0"),
        ("hyperclovax-plain", "granite", "the logits"),
        ("stablelm", "olmo", None),
    ],
)
def test_the_step_of_another_family_is_named(family: str, of: str, step: str | None) -> None:
    model = tiny(family)
    model.teal_architecture = architecture_of(of)
    found = first_difference(model)
    assert found == step


def test_scales_that_show_at_the_last_positions_alone() -> None:
    """Ministral 3's queries grow with their positions."""
    rope = {**ALL_FAMILIES["ministral3"]["rope_parameters"], "original_max_position_embeddings": 100}  # type: ignore[dict-item]
    model = tiny("ministral3", rope_parameters=rope, sliding_window=None)
    assert first_difference(model) is None
    model.teal_architecture = architecture_of("llama")
    assert first_difference(model) == "attention of block 0"


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    ["llama", "helium", "gemma", "mistral", "ministral3"],
)
def test_a_renamed_type_is_decoded_by_its_structure(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _renamed(kind, monkeypatch)
    adopt_likeness_(model)
    model = sparse(model)
    check_steps(model, [20, 5])
    assert model.teal_architecture == architecture_of(kind)
    engine = Engine(model)
    assert (engine.path.name, engine.general_because) == ("native", None)
    engine.check(random_tokens(1, 12))
    assert engine.path.name == "native"


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", ["neurons", "stream", "module"])
def test_a_block_that_computes_something_else_is_named(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _renamed("llama", monkeypatch)
    block = model.model.layers[1]
    if change == "module":
        block.mlp.extra = torch.nn.Linear(3, 3)
        reason = "model type renamed-llama"
    elif change == "neurons":
        block.mlp.act_fn.register_forward_hook(lambda module, args, output: output * 1.2)
        reason = "model type renamed-llama, like llama but for product mlp_input of block 1"
    else:
        block.register_forward_hook(lambda module, args, output: output * 1.1)
        reason = "model type renamed-llama, like llama but for what is added to the stream of block 1"
    engine = Engine(model)
    assert (engine.path.name, engine.general_because) == ("general", reason)
    cache, ids = engine.new_cache(21), random_tokens(1, 21)
    engine.prefill(ids[:, :20], cache)
    torch.testing.assert_close(
        engine.step(ids[:, 20:], cache), model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4
    )


@needs_library
@torch.no_grad()
def test_a_program_that_a_user_got_wrong_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check before the first token, which names the step; asked for by name, a path raises."""
    model = tiny("helium")
    row = architecture_of("helium").model_dump(mode="json")
    row["program"]["pairs"] = "halves"
    model.teal_architecture = Architecture.model_validate(row)
    engine = Engine(model)
    assert engine.path.name == "native"
    engine.check(random_tokens(1, 12))
    assert engine.path.name == "general"
    assert engine.general_because == "the native path gives other logits: attention of block 0"
    with pytest.raises(ArtefactError, match="native path, dense"):
        Engine(model, path="native").check(random_tokens(1, 12))


def test_from_a_renamed_type_to_a_checkpoint(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No architecture file, and nothing to confirm."""
    model = _renamed("helium", monkeypatch)
    model.save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    runs = tmp_path / "runs"
    shared = ["--model", str(tmp_path / "dense"), "--runs", str(runs)]
    assert run(["calibrate", *shared, "--dataset", str(corpus), "--tokens", "256", "--seq-len", "32"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "renamed-helium is not in the table of architectures: it is tried as one like llama" in said
    assert not list(runs.glob("*/architecture.yaml"))
    assert run(["export", *shared, "--sparsity", "0.5", "--quiet"]) == 0
    folder = runs / "dense" / "fisher-0.50"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert len(sparse_layers(loaded)) == 2 * 7 + 1
    assert Engine(loaded).general_because == (NO_LIBRARY and f"several times slower: {NO_LIBRARY}")
    assert loaded.teal_architecture == architecture_of("helium")
    words = ["--prompt", "the stars", "--max-new-tokens", "4", "--quiet"]
    assert run(["generate", "--model", str(folder), *words]) == 0
    capsys.readouterr()
    assert run(["info", "--model", str(tmp_path / "dense"), "--json", str(tmp_path / "info.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "info.json").read_text())["model"]["supported"]


@torch.no_grad()
def test_a_model_without_weights_is_taken_for_the_first_row_that_it_is_like(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _renamed("helium", monkeypatch).to("meta")
    adopt_likeness_(model)
    recognise_(model)
    assert model.teal_architecture == architecture_of("llama")
    assert set(model.teal_alike) >= {"llama", "helium", "ernie4_5"}
