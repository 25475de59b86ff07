"""Block programs: rows that describe a block as steps, and what becomes of them in a model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, TINY_CONFIGS, build_family, build_model
from tiny_configs import ALL_MIXTURES, OTHERS

from teal_cli.decode.blocks import Attention, Norm, Product, block_steps
from teal_cli.decode.routes import Route
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import Architecture, architecture_of, find_projections, read_table, table
from teal_cli.sparse import lay_out_, replace_projections_

FUSED = sorted({str(shape["model_type"]) for shape in TINY_CONFIGS.values()})
NORM, QKV, OUT = "{norm: n}", "{product: qkv}", "{product: o, epilogue: residual}"
ATTENTION = "{attention: a}"
ROUTE = "{route: gate}"
GATED = "{product: o, epilogue: gated, activation: a, joined: true, experts: true}"
_PARALLEL = "{product: o, parallel: true}"


def test_who_has_a_program() -> None:
    others = {
        "bamboo",
        "gpt2",
        "opt",
        "sparsellama",
        *(str(FAMILIES[x]["model_type"]) for x in [*OTHERS, *ALL_MIXTURES]),
    }
    assert {name for name, row in table().items() if row.program is not None} == {*FUSED, *others}


@pytest.mark.parametrize("model_type", [*FUSED, "gpt2", "qwen2_moe", "phimoe"])
def test_a_row_survives_json(model_type: str) -> None:
    """TEAL checkpoints carry it so."""
    row = architecture_of(model_type)
    assert Architecture.model_validate(json.loads(json.dumps(row.row()))) == row


def test_what_follows_the_product_of_a_site() -> None:
    row = architecture_of("llama")
    assert [row.epilogue_of(site) for site in row.sites] == ["plain", "residual", "gated", "residual"]
    assert [architecture_of("gpt2").epilogue_of(site) for site in ("mlp_input", "mlp_intermediate")] == [
        "plain",
        "residual",
    ]
    row = architecture_of("mixtral")
    assert [row.epilogue_of(site) for site in row.sites] == ["plain", "residual", "gated", "residual"]
    assert row.epilogue_of("lm_head") == "plain"


def _row(*steps: str, more: str = "") -> str:
    program = f"{{rotary: r, norm: n, block: [{', '.join(steps)}]}}"
    return f"m:\n  blocks: model.layers\n  sites: {{qkv: [q, k, v], o: o, any: mlp.*}}\n  program: {program}\n{more}"


def test_a_block_without_an_mlp_is_a_program(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(_row(NORM, QKV, ATTENTION, OUT))
    program = read_table(tmp_path / "rows.yaml")["m"].program
    assert program is not None
    assert [step.product for step in program.products] == ["qkv", "o"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _row(NORM, QKV, ATTENTION, OUT, more="  compact: true"),
            "compact is not a key: leave it out; .* a program",
        ),
        (
            _row(NORM, QKV, ATTENTION, OUT, "{reduce: gate}"),
            "block.4: a step has one of the keys norm, .* this one has reduce",
        ),
        (_row(NORM, QKV, ATTENTION, OUT, ROUTE), "route gate must stand after a norm"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, ROUTE, OUT), "product o: behind a route, and nowhere else, stand"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, ROUTE, NORM, OUT), "norm n must stand first or after"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, ROUTE, GATED, GATED, OUT), "product o: behind a route, and nowhere"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, ROUTE, GATED), "the last step must be a product with epilogue residual"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, GATED, OUT), "product o: behind a route, and nowhere else, stand"),
        (_row(NORM, QKV, ATTENTION, "{product: o, epilogue: residual, experts: true}"), "product o: behind a route"),
        (_row(NORM, QKV, ATTENTION, "{product: o, epilogue: residual, experts: true, scaled_by: g}"), "no other key"),
        (_row(NORM, "{product: qkv, scaled_by: s}", ATTENTION, OUT), "product qkv: scaled_by belongs to"),
        (_row(NORM, QKV, ATTENTION, "{where: m, steps: []}"), "the last step must be a product"),
        (_row(NORM, QKV, ATTENTION, OUT, f"{{where: m, steps: [{ATTENTION}]}}"), "attention a must stand after"),
        (
            _row(NORM, QKV, ATTENTION, OUT, "{where: m, steps: [{where: n, steps: []}]}"),
            "block.4.steps.0: a step has one of the keys .* this one has where, steps",
        ),
        (_row(NORM, QKV, ATTENTION, OUT, "3"), "program.block.4: a step is a mapping"),
        (_row(NORM, QKV, "{attention: a, wide: 3}", OUT), "program.block.2.wide is not a key"),
        (_row(NORM, QKV, ATTENTION, "{product: o, epilogue: added}"), "program.block.3.epilogue: .* 'residual'"),
        (_row(NORM, QKV, ATTENTION, "{product: out, epilogue: residual}"), "product out is no site; the sites are qkv"),
        (_row(NORM, QKV, ATTENTION, "{product: any, epilogue: residual}"), "site any must be names, without"),
        (_row(NORM, "{product: qkv, activation: silu}", ATTENTION, OUT), "product qkv: activation belongs to"),
        (_row(NORM, "{product: qkv, epilogue: gated}", OUT), "product qkv: activation belongs to"),
        (_row(NORM, "{product: qkv, joined: true}", ATTENTION, OUT), "product qkv: joined belongs to epilogue gated"),
        (_row(NORM, QKV, ATTENTION, OUT, NORM, "{product: o, epilogue: gated, activation: a}", OUT), "site o is gated"),
        (_row(NORM, "{product: qkv, epilogue: activated}", OUT), "product qkv: activation belongs to"),
        (_row(QKV, ATTENTION, OUT), "product qkv must stand after a norm"),
        (_row(NORM, "{product: qkv, parallel: true}", ATTENTION, OUT), "product qkv: parallel belongs to"),
        (
            _row(NORM, "{product: qkv, aside: true}", ATTENTION, OUT),
            "product qkv reads the norm aside, and there is none",
        ),
        (_row("{norm: n, aside: true}", QKV, ATTENTION, OUT), "norm n must stand first or after"),
        (_row(NORM, "{product: qkv, added_norm: n}", ATTENTION, OUT), "product qkv: added_norm belongs to"),
        (
            _row(NORM, QKV, ATTENTION, "{product: o, epilogue: residual, added_norm: n}", _PARALLEL),
            "product o must stand after a norm",
        ),
        (
            "m: {blocks: b, sites: {s: x}, program: {positions: p, residual_scale: r, block: [{norm: n}], norm: n}}",
            "residual_scale belongs to programs with rotary and without embedding_norm",
        ),
        (_row(NORM, QKV, NORM, OUT), "norm n must stand first or after a residual product"),
        (_row(NORM, ATTENTION, OUT), "attention a must stand after the plain product of queries, keys, values"),
        (_row(NORM, QKV, ATTENTION), "the last step must be a product with epilogue residual"),
        (_row(NORM, OUT), "there must be one attention step"),
        (
            "m: {blocks: b, sites: {s: x}, program: {block: [{norm: n}], norm: n}}",
            "names rotary, positions or alibi, one",
        ),
        (
            "m: {blocks: b, sites: {s: x}, program: {rotary: r, positions: p, block: [{norm: n}], norm: n}}",
            "one of them",
        ),
    ],
)
def test_programs_that_cannot_be_are_refused(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(row)
    with pytest.raises(UsageError, match=message):
        read_table(path)


def test_keys_that_a_configuration_does_not_have() -> None:
    """They are false; no other key is."""
    program = architecture_of("phi").program
    assert program is not None
    assert program.unmet(SimpleNamespace()) is None
    assert program.unmet(SimpleNamespace(qk_layernorm=False)) is None
    assert program.unmet(SimpleNamespace(qk_layernorm=True)) == "qk_layernorm true"
    other = program.model_copy(update={"requires": {"qk_layernorm": True}})
    assert other.unmet(SimpleNamespace()) == "qk_layernorm none"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_steps_of_a_model(family: str) -> None:
    model = build_model(family)
    replace_projections_(model, [projection.name for projection in find_projections(model)])
    lay_out_(model)
    blocks = block_steps(model)
    assert len(blocks) == 2
    kinds = [Norm, Product, Attention, Product, Norm, Product, Product]
    assert [type(step) for step in blocks[1]] == kinds
    norm, qkv, attention, o, _, gate_up, down = blocks[1]
    layer = model.model.layers[1]  # type: ignore[union-attr, index]
    assert isinstance(norm, Norm)
    assert norm.weight is layer.input_layernorm.weight  # type: ignore[union-attr]
    assert isinstance(attention, Attention)
    assert attention.window == (16 if family == "mistral" else 0)
    assert (attention.q_norm is not None) == (attention.k_norm is not None) == (family == "qwen3")
    products = [step for step in (qkv, o, gate_up, down) if isinstance(step, Product)]
    assert [step.parts for step in products] == [(64, 32, 32), (64,), (100, 100), (64,)]
    assert [step.outputs for step in products] == [128, 64, 100, 64]
    assert torch.equal(products[3].table, layer.mlp.down_proj.weight.t())  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_steps_of_a_mixture_of_experts(family: str) -> None:
    model = build_family(family)
    replace_projections_(model, [projection.name for projection in find_projections(model)])
    lay_out_(model)
    norm, route, gate_up, down = block_steps(model)[1][4:8]
    config = model.config
    experts = int(getattr(config, "num_local_experts", 0) or config.num_experts)  # type: ignore[arg-type, union-attr]
    assert isinstance(norm, Norm)
    assert isinstance(route, Route)
    assert (route.weight.shape, route.top_k) == ((experts, 64), config.num_experts_per_tok)  # type: ignore[union-attr]
    assert route.normalised == (family not in ("olmoe", "qwen2_moe", "phimoe"))
    assert (route.scores, route.jitter) == (("sparsemixer", 0.2) if family == "phimoe" else ("softmax", 0.0))
    assert isinstance(gate_up, Product)
    assert isinstance(down, Product)
    assert gate_up.experts
    assert down.experts
    neurons = gate_up.outputs
    assert gate_up.sparse_layers[0].weight.shape == (experts, 2 * neurons, 64)
    assert down.sparse_layers[0].weight.shape == (experts, 64, neurons)


def test_blocks_of_a_model_that_differ() -> None:
    """Some have experts, the others an MLP; one more expert may be every token's, scaled or not there."""
    kinds = {}
    for family in ("qwen3_moe", "qwen2_moe", "granitemoe", "granitemoeshared"):
        model = build_family(family)
        replace_projections_(model, [projection.name for projection in find_projections(model)])
        blocks = block_steps(model)
        kinds[family] = [[step.name for step in block[4:] if isinstance(step, Product)] for block in blocks]
        if family == "qwen2_moe":
            last = blocks[0][-1]
            assert isinstance(last, Product)
            assert last.scaled_by is model.model.layers[0].mlp.shared_expert_gate  # type: ignore[union-attr, index]
    experts = ["experts_input", "experts_intermediate"]
    assert kinds["qwen3_moe"] == [["mlp_input", "mlp_intermediate"], experts]
    assert kinds["granitemoe"] == [experts] * 2
    assert kinds["qwen2_moe"] == kinds["granitemoeshared"] == [[*experts, "shared_input", "shared_intermediate"]] * 2


def test_a_program_of_another_model() -> None:
    model = build_model("llama")
    row = architecture_of("qwen3")
    model.teal_architecture = row  # llama has no norms on queries and keys
    replace_projections_(model, [projection.name for projection in find_projections(model)])
    lay_out_(model)
    with pytest.raises(ArtefactError, match="the program of this architecture names q_norm, which the model does not"):
        block_steps(model)


def test_rows_that_were_stored_before_are_read() -> None:
    """A checkpoint carries its row: of a model whose type the table does not have."""
    row = {"blocks": ["model.layers"], "sites": {"attention_input": ["q"]}, "flattened": True, "compact": True}
    assert Architecture.model_validate(row).row() == {"blocks": ["model.layers"], "sites": {"attention_input": ["q"]}}
