"""Prompts that the native library reads: their logits, what the cache holds, and which prompts they are."""

import copy
from typing import Any

import pytest
import torch
from covering import covering
from fused_pair import error_of, half_plan, random_tokens
from native_models import (
    ALL_MIXTURES,
    FAMILIES,
    LIMIT,
    LIMIT_OF_4_BITS,
    NO_LIBRARY,
    OTHERS,
    exact_prompt,
    sparse,
    tiny,
    use_threads,
)
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths import native
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.slot_cache import SlotCache
from teal_cli.errors import ArtefactError
from teal_cli.sparse import apply_plan_

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[1], [8], [13], [40], [3, 9, 6], [2] * 9, [20, 1]]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of a prompt transformers' forward was given, each time."""
    lengths: list[int] = []
    forward = native.ProgramPath.prefill

    def counted(self: Any, input_ids: Tensor, *args: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *args)

    monkeypatch.setattr(native.ProgramPath, "prefill", counted)
    return lengths


def read(engine: Engine, lengths: list[int], forwards: list[int], room: int = 0) -> tuple[Tensor, Any]:
    """Prompts by the library, however many calls that takes: logits and cache."""
    vars(engine.path)["_most_calls"] = 100
    cache = engine.new_cache(max(lengths) + room)
    forwards.clear()
    logits = engine.prefill(random_tokens(len(lengths), max(lengths)), cache, torch.tensor(lengths))
    assert forwards in ([], [1])  # of one token: shapes of keys and values
    assert cache.row_lengths() == lengths
    return logits, cache


def check_prompt(model: Any, lengths: list[int], limit: float, forwards: list[int]) -> None:
    logits, _ = read(Engine(model, path="native"), lengths, forwards)
    expected = exact_prompt(model, random_tokens(len(lengths), max(lengths)), lengths)
    for row in range(len(lengths)):
        assert (error := error_of(logits[row], expected[row])) < limit, (row, error)


@torch.no_grad()
@covering(2, family=[*FAMILIES, *OTHERS], dtype=DTYPES, lengths=LENGTHS, threads=[1, 2, 3])
def test_logits(
    family: str,
    dtype: torch.dtype,
    lengths: list[int],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[int],
) -> None:
    """Dense, whatever the plan; of layers with a window too, that is shorter or longer than the prompt."""
    use_threads(monkeypatch, threads)
    check_prompt(sparse(tiny(family).to(dtype)), lengths, LIMIT[dtype], forwards)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4:32"])
@pytest.mark.parametrize("lengths", [[1], [13], [3, 9, 6]], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_logits_of_quantised_weights(family: str, scheme: str, lengths: list[int], forwards: list[int]) -> None:
    check_prompt(sparse(tiny(family), scheme=scheme, output=True), lengths, LIMIT_OF_4_BITS, forwards)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[13], [3, 9, 6]], ids=str)
@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_logits_of_experts(family: str, lengths: list[int], forwards: list[int]) -> None:
    check_prompt(sparse(tiny(family)), lengths, LIMIT[torch.float32], forwards)


@torch.no_grad()
@pytest.mark.parametrize("parts", [(8, 5), (5, 8), (1, 12), (9, 1, 3), (12, 1)], ids=str)
def test_what_follows_a_prompt(parts: tuple[int, ...], forwards: list[int]) -> None:
    """Up to the last position of the cache, and none beyond; keys and values are those of one prompt, bit for bit."""
    engine = Engine(sparse(tiny("qwen2-window")), path="native")
    whole, expected = read(engine, [13], forwards)
    cache, done = engine.new_cache(13), 0
    for part in parts:
        logits = engine.prefill(random_tokens(1, 13)[:, done : done + part], cache)
        done += part
        assert cache.length == done
    assert torch.equal(logits, whole)
    for own, other in zip(cache.layers, expected.layers, strict=True):
        assert all(map(torch.equal, own.states_of(0, 13), other.states_of(0, 13)))
    with pytest.raises(ArtefactError, match="full"):
        engine.prefill(random_tokens(1, 1), cache)


@torch.no_grad()
def test_a_prompt_of_one_place(forwards: list[int]) -> None:
    """Which has no more positions than its tokens; those of its neighbours stay as they are."""
    engine = Engine(sparse(tiny("llama")), path="native")
    whole, one = read(engine, [13], forwards)
    slots = SlotCache(one, 3, 13)
    before = [layer.keys.fill_(3.0).clone() for layer in slots.layers]
    cache = slots.some(range(1, 2))
    assert torch.equal(engine.prefill(random_tokens(1, 13), cache), whole)
    assert slots.lengths == [0, 13, 0]
    for layer, filled in zip(slots.layers, before, strict=True):
        assert torch.equal(layer.keys[::2], filled[::2])


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "scheme", "slow", "calls"),
    [
        (torch.float32, None, False, 2),
        (torch.bfloat16, None, True, 8),
        (torch.bfloat16, None, False, 1),
        (torch.float32, "int8", False, 8),
    ],
)
def test_which_prompts_the_library_reads(
    dtype: torch.dtype, scheme: str | None, slow: bool, calls: int, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    """As many tokens as fit into some calls, of one sequence or of several."""
    monkeypatch.setattr(native, "is_slow", lambda _: slow)
    engine = Engine(sparse(tiny("llama").to(dtype), scheme=scheme), path="native")
    engine.prefill(random_tokens(1, 1), engine.new_cache(1))
    for rows, tokens, of_forward in (
        (1, 8 * calls, False),
        (1, 8 * calls + 1, True),
        (2 * calls, 4, False),
        (2 * calls + 1, 4, True),
        (calls + 1, 5, True),
    ):
        forwards.clear()
        engine.prefill(random_tokens(rows, tokens), engine.new_cache(tokens))
        assert forwards == [tokens] * of_forward, (rows, tokens)


@torch.no_grad()
def test_a_prompt_whose_angles_depend_on_its_length_is_transformers(forwards: list[int]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    engine = Engine(tiny("llama", rope_parameters=rope), path="native")
    engine.prefill(random_tokens(1, 3), engine.new_cache(3))
    assert forwards == [3]


@torch.no_grad()
@pytest.mark.parametrize("change", ["plan", "cast", "norm", "weight", "parameter", "part of a table"])
def test_a_model_that_changed_between_prompts(change: str, forwards: list[int]) -> None:
    """What one prompt leaves for the next is of the model as it was."""
    model = sparse(tiny("llama"))
    engine = Engine(model, path="native")
    first, _ = read(engine, [9], forwards)
    if change == "plan":
        apply_plan_(model, half_plan(model, 1.5))
    elif change == "cast":
        model.to(torch.bfloat16)
    else:
        block = model.model.layers[0]
        layer = {"norm": model.model.norm, "part of a table": block.self_attn.q_proj}.get(change, block.mlp.up_proj)
        if change in ("parameter", "part of a table"):
            layer.weight = torch.nn.Parameter(layer.weight * 2)
        else:
            layer.weight.mul_(2)
    second, _ = read(engine, [9], forwards)
    expected = exact_prompt(model, random_tokens(1, 9), [9])
    assert error_of(second[0], expected[0]) < LIMIT[model.dtype]
    assert torch.equal(first, second) == (change == "plan")
    text = list(engine.generate(random_tokens(1, 9), max_new_tokens=12, sampling=SamplingConfig()))
    plain = Engine(copy.deepcopy(model), path="general")
    assert change == "cast" or text == list(
        plain.generate(random_tokens(1, 9), max_new_tokens=12, sampling=SamplingConfig())
    )
