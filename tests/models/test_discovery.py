"""Models of unknown types: what is found by structure, and that nothing runs before it is confirmed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FAMILIES, VOCABULARY, build_family, build_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import teal_cli.hf
from teal_cli.cli import run
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import (
    Architecture,
    architecture_of,
    find_projections,
    program_for,
    read_table,
    table,
)
from teal_cli.models.discovery import block_lists, discover
from teal_cli.models.layers import unstack_experts_
from teal_cli.models.likeness import alike
from teal_cli.models.programs import NormStep
from teal_cli.sparse import sparse_layers

assert teal_cli.hf
_HALF = {"layers": 2, "attention_heads": 2, "ffn_dim": 40}
_CODEGEN = {"n_embd": 64, "n_inner": 100, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 8}


def _groups(model: nn.Module) -> set[frozenset[str]]:
    """The projections that share a site, by name."""
    sites: dict[str, set[str]] = {}
    for projection in find_projections(model):
        sites.setdefault(projection.site, set()).add(projection.name)
    return {frozenset(names) for names in sites.values()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_finds_what_the_table_says(family: str) -> None:
    """The table as it would be if it were not there: the same layers, at the same sites."""
    model = build_family(family)
    row = architecture_of(FAMILIES[family]["model_type"])
    program = program_for(model)
    wanted, names = _groups(model), [p.name for p in find_projections(model)]
    model.teal_architecture = Architecture(kind=row.kind, blocks=("",), sites={"none": ("",)})
    found = discover(model)
    model.teal_architecture = found
    assert set(found.blocks) == set(row.blocks)
    assert found.dense == row.dense
    assert {found.sites[site] for site in found.once} == {row.sites[site] for site in row.once}
    assert sorted(p.name for p in find_projections(model)) == sorted(names)
    norms = [step for step in program.block if isinstance(step, NormStep)] if program is not None else []
    if program is not None and len(norms) == 1:  # attention and MLP read one state
        sites = ("attention_input", "mlp_input")
        both = [{f"{row.blocks[0]}.{i}.{layer}" for site in sites for layer in row.sites[site]} for i in range(2)]
        wanted = {group for group in wanted if not any(group <= pair for pair in both)} | set(map(frozenset, both))
    if family == "gemma4_text":  # one block has values and one has not: each layer by itself
        wanted = {frozenset({name}) for name in names}
    assert _groups(model) == wanted


def test_routers_stay_dense() -> None:
    """Linear layers that choose among experts; those of a shared expert are projections."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    unstack_experts_(model)
    model.teal_architecture = Architecture(blocks=("",), sites={"none": ("",)})
    found = model.teal_architecture = discover(model)
    assert found.dense == ("mlp.shared_expert_gate",)
    assert len(find_projections(model)) == 2 * (4 + 3 + 2)


def test_an_encoder_of_other_blocks() -> None:
    size = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _HALF.items()}
    config = AutoConfig.for_model("bart", vocab_size=VOCABULARY, d_model=32, **size)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.teal_architecture = Architecture(kind="seq2seq", blocks=("",), sites={"none": ("",)})
    found = model.teal_architecture = discover(model)
    assert found.blocks == ("model.encoder.layers", "model.decoder.layers")
    assert [found.sites[site] for site in found.once] == [("encoder_attn.k_proj", "encoder_attn.v_proj")]
    assert len(find_projections(model)) == 2 * 6 + 2 * 10


def test_a_decoder_whose_configuration_knows_no_rotary_embedding() -> None:
    """Its modules have names that rows of the table have, whose programs ask for one."""
    size = {"d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xglm", vocab_size=VOCABULARY, **size))
    assert not hasattr(model.config, "rope_parameters")
    assert alike(model) == {}


def test_lists_of_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])

    model = nn.Module()
    model.short = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.layers = nn.ModuleList([Block() for _ in range(4)])
    model.norms = nn.ModuleList([nn.LayerNorm(2) for _ in range(12)])
    assert block_lists(model) == ["layers"]
    with pytest.raises(ArtefactError, match="no repeated blocks"):
        block_lists(nn.Linear(2, 2))


@pytest.fixture
def codegen(tmp_path: Path) -> Path:
    """A model of a type that the table does not have: attention and MLP read one hidden state."""
    assert "codegen" not in table()
    config = AutoConfig.for_model("codegen", vocab_size=VOCABULARY, **_CODEGEN)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "codegen")
    build_tokenizer().save_pretrained(tmp_path / "codegen")
    return tmp_path / "codegen"


def test_from_an_unknown_type_to_a_checkpoint(
    codegen: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shared = ["--model", str(codegen), "--runs", str(runs), "--quiet"]
    chain = [*shared, "--dataset", str(corpus), "--tokens", "256", "--seq-len", "32"]
    written = runs / "codegen" / "architecture.yaml"
    assert run(["calibrate", *chain]) == 3
    message = capsys.readouterr().err
    assert "model type 'codegen' is not in the table" in message
    assert f"confirm with --architecture {written}" in message
    assert not (runs / "codegen" / "calibration.json").exists()  # nothing was measured, nothing runs dense in silence
    row = yaml.safe_load(written.read_text())["codegen"]
    assert row["blocks"] == ["transformer.h"]
    assert row["sites"]["attn_qkv_proj_input"] == ["attn.qkv_proj", "mlp.fc_in"]
    edited = written.read_text() + "# checked\n"
    written.write_text(edited)
    assert run(["calibrate", *chain]) == 3  # unconfirmed as before, and not written over
    assert f"{written} is there already: check it, and confirm with --architecture {written}" in capsys.readouterr().err
    assert written.read_text() == edited
    confirmed = ["--architecture", str(written)]
    assert run(["calibrate", *chain, *confirmed]) == 0
    assert run(["export", *shared, *confirmed, "--sparsity", "0.5"]) == 0
    folder = runs / "codegen" / "fisher-0.50"
    sparse = AutoModelForCausalLM.from_pretrained(folder)  # the checkpoint carries its row
    assert len(sparse_layers(sparse)) == 3 * 4 + 1  # the output layer
    sparse.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"]["architecture"] == row
    result = tmp_path / "eval.json"
    flags = ["--tokens", "128", "--seq-len", "32", "--text", str(corpus), "--json", str(result), "--quiet"]
    assert run(["eval", "--model", str(folder), *flags]) == 0
    assert json.loads(result.read_text())["sparse"]["realised_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert run(["generate", "--model", str(folder), "--prompt", "the stars", "--max-new-tokens", "4", "--quiet"]) == 0
    assert run(["eval", *shared, *flags[:6]]) == 3
    assert "--architecture FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("codegen: {blocks: model.layers}", "codegen: sites: Field required"),
        ("codegen: {blocks: model.layers, sites: {a.b: [x]}}", "codegen: sites.a.b"),
        (
            "codegen: {blocks: model.layers, sites: {a: [x]}, speed: 3}",
            "codegen: speed is not a key: the keys are kind, blocks",
        ),
        ("codegen: {like: fhi}", "there is no row 'fhi' to be like"),
        ("codegen: 3", "a row is a mapping"),
    ],
)
def test_bad_rows_are_refused(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(row)
    with pytest.raises(UsageError, match=message):
        read_table(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ("model.blocks",)}, "no blocks at model.blocks"),
        ({"sites": {"a": ("self_attn.*",)}}, "layers.0.mlp.down_proj is in no site"),
        ({"sites": {"a": ("self_attn.qkv",)}}, "layers.0.self_attn.qkv is not a linear layer"),
    ],
)
def test_rows_that_do_not_fit_the_model(change: dict[str, object], message: str) -> None:
    """A layer that a row forgets is told, not left dense in silence."""
    model = build_family("llama")
    model.teal_architecture = architecture_of("llama").model_copy(update=change)
    with pytest.raises(ArtefactError, match=message):
        find_projections(model)
    if "blocks" not in change:
        model.teal_architecture = Architecture(
            blocks=("model.layers",), sites={"a": ("self_attn.*",)}, dense=("mlp.*",)
        )
        assert len(find_projections(model)) == 2 * 4
