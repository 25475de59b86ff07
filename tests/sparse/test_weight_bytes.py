"""Bytes that a token reads: only what decodes it, and of that only what it is sent to."""

import pytest
from conftest import FAMILIES, build_family
from tiny_configs import ALL_MIXTURES
from torch import nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.models.architectures import architecture_of, find_projections
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import sparsify_
from teal_cli.sparse.weight_bytes import weight_bytes_per_token

_DECODERS = sorted(name for name, config in FAMILIES.items() if architecture_of(config["model_type"]).kind != "encoder")


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _expected(family: str, model: nn.Module) -> float:
    """Everything, less what a token of this family does not read."""
    total = float(_bytes(model))
    tied = model.get_output_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not tied:
            total -= module.weight.nbytes - module.weight[0].nbytes
    if family in ALL_MIXTURES:
        chosen = model.config.num_experts_per_tok
        stacks = [parameter for parameter in model.parameters() if parameter.dim() == 3]
        assert len(stacks) == (2 if family == "qwen3_moe" else 4)  # which has a block without experts
        biases = [parameter for name, parameter in model.named_parameters() if name.endswith("experts.down_proj_bias")]
        biases += [parameter for name, parameter in model.named_parameters() if name.endswith("gate_up_proj_bias")]
        assert len(biases) == (4 if family == "gpt_oss" else 0)
        total -= sum(stack[chosen:].nbytes for stack in (*stacks, *biases))
    elif family == "gemma3":
        total -= _bytes(model.model.vision_tower) + _bytes(model.model.multi_modal_projector)
        total += sum(
            module.weight.nbytes - module.weight[0].nbytes  # left out twice
            for module in model.model.vision_tower.modules()
            if isinstance(module, nn.Embedding)
        )
    elif family.startswith("t5"):
        total -= _bytes(model.encoder.block) + _bytes(model.encoder.final_layer_norm)
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        total += bias.nbytes - bias[0].nbytes  # left out twice
        cross = [block.layer[1].EncDecAttention for block in model.decoder.block]
        total -= sum(_bytes(attention.k) + _bytes(attention.v) for attention in cross)
    return total


@pytest.mark.parametrize("family", _DECODERS)
def test_what_a_token_reads(family: str) -> None:
    model = build_family(family)
    projections = find_projections(model)
    dense = weight_bytes_per_token(model, {})
    untied_shared = family == "t5-gated"  # an embedding of the encoder's, of which no row is read
    slack = model.get_input_embeddings().weight[0].nbytes if untied_shared else 0
    assert dense == pytest.approx(_expected(family, model), abs=slack + 1)
    sparsify_(model, SparsityPlan("half", 0.5, {p.name: Threshold(0.1, 0.5) for p in projections}))
    assert weight_bytes_per_token(model, {}) == dense  # laying weights out changes nothing
    # Dropping half of one projection saves half of what a token reads of it.
    last = projections[-1]
    saved = dense - weight_bytes_per_token(model, {last.name: 0.5})
    assert saved == pytest.approx(0.5 * last.weights_read * 4, abs=1)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "t5", "t5-gated"])
def test_what_a_token_reads_of_quantised_weights(family: str) -> None:
    """Dense weights that stand for codes, and the codes: of each what is read shrinks by just what its layer does."""
    model = build_family(family)
    projections = find_projections(model)
    dense = weight_bytes_per_token(model, {})
    packs = quantise_(model, Scheme.parse("int4:32"))
    read = [p for p in projections if _is_read(p.name)]
    shrunk = sum(model.get_submodule(p.name).weight.nbytes - packs[p.name].nbytes for p in read)
    assert weight_bytes_per_token(model, {}, packs) == dense - shrunk
    sparsify_(model, SparsityPlan("half", 0.5, {p.name: Threshold(0.1, 0.5) for p in projections}))
    assert weight_bytes_per_token(model, {}, packs) == dense - shrunk
    half = {p.name: 0.5 for p in projections}
    saved = sum(packs[p.name].words.nbytes for p in read) / 2
    assert weight_bytes_per_token(model, half, packs) == dense - shrunk - saved
    pack_(model, packs)
    assert weight_bytes_per_token(model, {}) == dense - shrunk
    assert weight_bytes_per_token(model, half) == dense - shrunk - saved


def _is_read(name: str) -> bool:
    """Whether a token that T5 decodes reads this projection; all are read of other models."""
    once = "EncDecAttention.k", "EncDecAttention.v"
    return not name.startswith("encoder.") and not name.endswith(once)
