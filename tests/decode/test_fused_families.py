"""What families other than Llama bring to the fused path, in Triton's interpreter against float64 masked maths."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, TINY_CONFIGS
from fused_pair import error_of, random_tokens, use_small_tiles
from native_models import check_steps, sparse, tiny

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.models.architectures import Architecture, architecture_of
from teal_cli.sparse import control_of


def _with_programs() -> list[str]:
    rows = {name: architecture_of(str(FAMILIES[name]["model_type"])) for name in FAMILIES}
    known = {name for name, row in rows.items() if row.program is not None and row.program.fused}
    return sorted((known | {"qwen2-window"}) - set(TINY_CONFIGS))


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize("family", _with_programs())
def test_rows_of_different_lengths(family: str) -> None:
    """Sparse, counted; prompts reach beyond the windows."""
    check_steps(sparse(tiny(family)), [20, 5], 2, path="fused")


# Each kind of norm, of embedding, of output and of attention once; the norms of two rows are taken tile by tile.
@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("gpt2", [12, 7]),
        ("gemma2", [12]),
        ("phi", [12, 7]),
        ("gpt_neox", [12]),
        ("olmo2", [12, 7]),
        ("hunyuan_v1_dense", [12]),
        ("granite", [12]),
        ("glm", [12]),
        ("nemotron", [12, 7]),
        ("gpt_oss", [12, 7]),
        ("bloom", [12]),
        ("mpt-clip", [12, 7]),
        ("persimmon", [12]),
        ("apertus", [12]),
        ("bitnet", [12, 7]),
        ("gemma4_text", [12]),
    ],
)
def test_dense_in_16_bits(family: str, lengths: list[int]) -> None:
    model = sparse(tiny(family).bfloat16())
    control_of(model).enabled = False
    check_steps(model, lengths, 2, path="fused")


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "glm4", "exaone4"])
def test_what_is_added_is_normalised(family: str) -> None:
    """By the product that reads the stream, where there is one row: sparse."""
    check_steps(sparse(tiny(family)), [20], 2, path="fused")


@pytest.mark.parametrize(("family", "scheme"), [("phi3", "int8"), ("glm4", "int4:32"), ("gemma2", "int8")])
def test_codes(family: str, scheme: str) -> None:
    """Of gate and up in one layer too, and of an output layer whose logits are capped."""
    model = sparse(tiny(family, intermediate_size=96), scheme=scheme, output=True)
    check_steps(model, [12], 2, path="fused")


@pytest.mark.parametrize("family", ["gpt_oss", "falcon-bias", "stablelm-2-12b", "granite_swa"])
def test_four_rows(family: str) -> None:
    """Sinks, ALiBi and norms of each head with several rows, beyond the windows and within."""
    check_steps(sparse(tiny(family)), [20, 3, 17, 9], 2, path="fused")


def test_joined_codes_that_end_inside_a_word() -> None:
    model = sparse(tiny("phi3", intermediate_size=100), scheme="int4:32")
    assert FusedPath.unsupported(model, control_of(model)) == (
        "codes of 100 outputs of mlp_input that end inside a word"
    )


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [5, 20]], ids=str)
def test_long_rope_changes_with_the_longest_row(lengths: list[int]) -> None:
    """All rows have the other angles once one of them is beyond 22, as on the native path."""
    rope = {**FAMILIES["phi3-long"]["rope_parameters"], "original_max_position_embeddings": 22}

    def steps(path: str) -> list[torch.Tensor]:
        model: Any = tiny("phi3-long", rope_parameters=rope, original_max_position_embeddings=22)
        engine = Engine(model, path=path)
        cache = engine.new_cache(max(lengths) + 5)
        engine.prefill(random_tokens(len(lengths), max(lengths)), cache, torch.tensor(lengths))
        return [engine.step(token, cache).clone() for token in random_tokens(len(lengths), 5, seed=1).split(1, dim=1)]

    for got, expected in zip(steps("fused"), steps("native"), strict=True):
        assert error_of(got, expected) < 1e-5


def test_queries_grow_with_their_positions() -> None:
    """Ministral 3's, past the first step of their growth."""
    rope = {**FAMILIES["ministral3"]["rope_parameters"], "original_max_position_embeddings": 8}
    check_steps(sparse(tiny("ministral3", rope_parameters=rope)), [15], 3, path="fused")


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        (
            "olmo2",
            {"norms": "layer", "block": {2: {"norms_of": "heads", "v_norm": "k_norm"}}},
            "norms of values that are",
        ),
        ("llama", {"block": {6: {"stream_scale": "scale"}}}, "blocks with stream_scale without added_norm"),
        ("olmo2", {"norms": "layer"}, "layer norms of heads that are rotated, or of all heads"),
    ],
)
def test_what_has_no_kernel_is_refused(family: str, change: dict[str, Any], reason: str) -> None:
    """In a row of a user's own, which does not say `fused: false`."""
    model: Any = tiny(family)
    row = architecture_of(family).model_dump(mode="json")
    for index, keys in change.pop("block", {}).items():
        row["program"]["block"][index] |= keys
    row["program"] |= change
    model.teal_architecture = Architecture.model_validate(row)
    assert str(FusedPath.unsupported(model, None)).startswith(reason)
