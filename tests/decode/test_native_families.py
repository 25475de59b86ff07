"""What families other than Llama bring to the native path, and what of them it refuses."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES
from fused_pair import error_of, random_tokens
from native_models import LIMIT, NO_LIBRARY, OTHERS, check_steps, sparse, tiny
from transformers import DynamicCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.native import NativePath
from teal_cli.decode.positions import alibi_bias
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import architecture_of
from teal_kernels.native.structures import Weight, halves_of, weight_of

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def _long(positions: int) -> Any:
    rope = {**FAMILIES["phi3-long"]["rope_parameters"], "original_max_position_embeddings": positions}  # type: ignore[dict-item]
    return tiny("phi3-long", rope_parameters=rope, original_max_position_embeddings=positions)


def _check_rows(engine: Engine, plain: Any, lengths: list[int]) -> None:
    """Steps of rows of different lengths, against transformers' masked forward of the same rows."""
    most, known = max(lengths), DynamicCache()
    prompt, tokens = random_tokens(len(lengths), most), random_tokens(len(lengths), 5, seed=1)
    cache = engine.new_cache(most + 5)
    engine.prefill(prompt, cache, torch.tensor(lengths))
    mask = torch.zeros(len(lengths), most + 5, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    plain(input_ids=prompt, past_key_values=known)
    for step, token in enumerate(tokens.split(1, dim=1)):
        at = torch.tensor(lengths)[:, None] + step
        mask[:, most + step] = 1
        expected = plain(
            input_ids=token, past_key_values=known, position_ids=at, attention_mask=mask[:, : most + step + 1]
        ).logits[:, -1]
        assert error_of(engine.step(token, cache), expected) < LIMIT[torch.float32], step


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [30], [20, 18], [5, 20]], ids=str)
def test_long_rope_changes_with_the_longest_row(lengths: list[int]) -> None:
    """As transformers' forward does of the same rows: all have the other angles once one of them is beyond 22."""
    _check_rows(Engine(_long(22), path="native"), _long(22).double(), lengths)


def test_scales_that_are_not_computed() -> None:
    reason = "residuals that are scaled by nothing, or turned round"
    assert NativePath.unsupported(tiny("granite", residual_multiplier=0.0), None) == reason
    model = tiny("granite")
    row = architecture_of("granite")
    assert row.program is not None
    model.teal_architecture = row.model_copy(
        update={"program": row.program.model_copy(update={"logits_scale": "no_key"})}
    )
    with pytest.raises(ArtefactError, match="names no_key, which the model does not have"):
        NativePath.unsupported(model, None)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [30], [20, 18], [5, 20]], ids=str)
@pytest.mark.parametrize("earlier", [0, 50])
def test_dynamic_rope_depends_on_the_longest_row(lengths: list[int], earlier: int) -> None:
    """As transformers' forward of the same rows, after the same text of so many tokens before."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    models = [tiny("llama", max_position_embeddings=22, rope_parameters=rope) for _ in range(2)]
    plain, engine = models[1].double(), Engine(models[0], path="native")
    if earlier:
        for model in models:
            model(input_ids=random_tokens(1, earlier))
    _check_rows(engine, plain, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_alibi_is_that_of_transformers(heads: int, dtype: torch.dtype) -> None:
    """Beyond 256 positions too, which bfloat16 does not tell apart, and of heads that are no power of two."""
    for family, build in (("bloom", bloom_alibi), ("falcon-bias", falcon_alibi), ("mpt", None)):
        model = tiny(family).to(dtype)
        found = alibi_bias(model, 700, heads, 0.25)
        assert found is not None
        if build is None:
            expected = build_mpt_alibi_tensor(heads, 700)[:, 0]
            found = found - found[:, -1:]
        else:
            expected = build(torch.ones(1, 700, dtype=torch.int64), heads, dtype)[:, 0].float()
        expected = expected * 0.25 if family == "falcon-bias" else expected
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("persimmon", {"qk_layernorm": False}, "qk_layernorm false"),
        ("falcon", {"alibi": True}, "alibi true"),
        ("falcon-new", {"alibi": True}, "new_decoder_architecture true"),
    ],
)
def test_a_configuration_that_no_program_computes(family: str, more: dict[str, bool], reason: str) -> None:
    """Of several programs the first one says why."""
    assert NativePath.unsupported(tiny(family, **more), None) == reason


def test_scaled_embeddings_that_a_program_does_not_scale() -> None:
    model = tiny("gemma")
    row = architecture_of("gemma")
    assert row.program is not None
    model.teal_architecture = row.model_copy(
        update={"program": row.program.model_copy(update={"embedding_scale": None})}
    )
    assert NativePath.unsupported(model, None) == "embeddings that are more than a table"


@pytest.mark.parametrize("change", ["weights", "norm", "neurons", "causal"])
def test_a_block_that_is_another_is_refused(change: str) -> None:
    model = tiny("phi3", intermediate_size=101) if change == "neurons" else tiny("phi3")
    block = model.model.layers[1]
    if change == "weights":
        block.mlp.extra_norm = torch.nn.LayerNorm(4)
        reason = "blocks with mlp.extra_norm"
    elif change == "causal":
        block.self_attn.is_causal = False
        reason = "attention that is not causal"
    elif change == "norm":
        block.post_attention_layernorm = None
        reason = "blocks without post_attention_layernorm"
    else:
        reason = "an odd number of neurons in mlp_input"
    assert NativePath.unsupported(model, None) == reason


def test_halves_of_a_projection() -> None:
    table_, bias = torch.randn(12, 5), torch.randn(12)
    for laid_out in (table_, table_.t().contiguous().t()):
        whole = weight_of(laid_out, bias=bias, counter=3)
        first, second = halves_of(whole)
        assert [half.outputs for half in (first, second)] == [6, 6]
        assert first.data == whole.data
        assert second.data == laid_out[6:].data_ptr()
        assert second.bias == bias[6:].data_ptr()
        assert [half.counter for half in (first, second)] == [3, -1]
        assert whole.outputs == 12
    with pytest.raises(ValueError, match="11 outputs cannot be divided"):
        halves_of(weight_of(table_[:11]))
    with pytest.raises(ValueError, match="10 outputs cannot be divided"):
        halves_of(Weight(outputs=10, dtype=4))


@needs_library
@torch.no_grad()
def test_halves_of_codes_of_one_row() -> None:
    check_steps(sparse(tiny("phi3"), "alike", "int4:32"), [20])


@needs_library
@pytest.mark.parametrize("family", OTHERS)
def test_the_engine_takes_it(family: str) -> None:
    engine = Engine(sparse(tiny(family)))
    assert (engine.path.name, engine.general_because) == ("native", None)
