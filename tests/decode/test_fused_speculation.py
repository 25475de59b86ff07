"""Several tokens of one sequence in a step of the fused path, in Triton's interpreter, and texts from drafts."""

from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS, build_family, build_model
from fused_pair import LIMIT, Pair, error_of, random_tokens, use_small_tiles
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.speculate.pace import Offer
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.quantise.copies import quantised_copy
from teal_cli.schemes import Scheme

GREEDY = SamplingConfig()


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


def _with_a_window() -> Any:
    shape = {**TINY_CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "lengths", "spans"),
    [
        ("llama", [20], (3, 1, 4)),
        ("llama", [20, 13], (4, 4)),
        ("qwen2-window", [20], (4, 4)),
        ("qwen3", [20], (8,)),
        ("gpt2", [20], (4, 4)),
        ("olmo2", [20, 13], (3, 1, 4)),
        ("mpt-clip", [20], (3, 5)),
        ("gpt_oss", [20, 15], (4, 4)),
        ("gemma2", [20], (4, 4)),
        ("gemma4_text", [20], (5, 3)),
        ("cohere-norms", [20], (4, 4)),
        ("persimmon", [20], (4, 4)),
    ],
    ids=str,
)
def test_a_pass_over_several_tokens_gives_what_single_steps_give(
    family: str, lengths: list[int], spans: tuple[int, ...]
) -> None:
    """Over a cache that a draft wrote into, and with keys and values as single steps write them."""
    pair = Pair(_with_a_window() if family == "qwen2-window" else build_family(family))
    pair.control.backend = "triton"
    rows, tokens = len(lengths), random_tokens(len(lengths), 8, seed=5)

    def run(sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        cache = pair.fused.new_cache(40)
        pair.fused.prefill(random_tokens(rows, 20), cache, torch.tensor(lengths))
        pair.fused.path.stepper(cache, sparse=True).run(random_tokens(rows, 1, 7), lengths)
        target, found, start = pair.fused.path.stepper(cache, sparse=False), [], 0
        for size in sizes:
            at = [length + start for length in lengths]
            logits, best = target.run(tokens[:, start : start + size], at)
            assert torch.equal(logits.argmax(-1), best)
            found.append(logits.clone())
            start += size
        states = [
            state for layer in cache.layers for row in range(rows) for state in layer.states_of(row, lengths[row] + 8)
        ]
        return torch.cat(found, dim=1), [state.clone() for state in states]

    expected, expected_states = run((1,) * 8)
    got, states = run(spans)
    for row in range(rows):
        for index in range(8):
            assert error_of(got[row, index], expected[row, index]) < LIMIT
    for state, wanted in zip(states, expected_states, strict=True):
        assert error_of(state, wanted) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize(("kind", "count"), [("sparse", 2), ("int8", 3), ("lookup", None)])
def test_greedy_text_is_the_dense_model_s(kind: str, count: int | None) -> None:
    pair = Pair(build_model("llama"))
    pair.control.backend = "triton"
    prompt = random_tokens(1, 12)
    prompt[0, 6:] = prompt[0, :6]
    with pair.control.switched_off():
        wanted = list(pair.fused.generate(prompt, max_new_tokens=14, sampling=GREEDY))
    draft: Any = None
    if kind == "int8":
        draft, _ = quantised_copy(pair.model, Scheme.parse("int8"))
    elif kind == "sparse":
        draft = pair.model
    decoder = Speculator(pair.fused, draft, sparse=kind == "sparse", lookup=kind == "lookup", count=count)
    assert list(decoder.generate(prompt, max_new_tokens=14, sampling=GREEDY)) == wanted
    assert decoder.tally.tokens >= 13


@torch.no_grad()
def test_as_many_rows_as_a_launch_takes() -> None:
    pair = Pair(build_model("llama"))
    assert pair.fused.path.spans_for(1) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert pair.fused.path.spans_for(3) == (1, 2)
    decoder = Speculator(pair.fused, pair.model, sparse=True, count=5)
    cache, _ = decoder.run_prompt(random_tokens(3, 5), 20)
    target, _ = decoder.steppers_on(cache)
    assert decoder.pace(3, target).choose([Offer("model", "model", 7)], 9)[1] == 1
