"""Decoding from drafts: what the dense model decodes, on the native path and by transformers' forward."""

import random
from typing import Any

import pytest
import torch
from chi_square import chi_square_p
from conftest import build_model
from drafting import speculator
from fused_pair import error_of, random_tokens
from native_models import NO_LIBRARY, plan_for, sparse, tiny, use_threads
from routed_models import routed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.console import Reporter
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine
from teal_cli.decode.native_cache import NativeLayer
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.speculate import loop as loop_module
from teal_cli.decode.speculate.pace import Offer
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.errors import UsageError
from teal_cli.quantise.copies import quantised_copy
from teal_cli.schemes import Scheme
from teal_cli.sparse import apply_plan_, control_of, sparse_layers
from teal_cli.sparse.intrinsic import make_intrinsic_
from teal_cli.speculation import Speculation
from teal_cli.steps.drafts import speculator_for

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
PATHS = [pytest.param("native", marks=needs_library), "general"]
GREEDY = SamplingConfig()
KINDS = ["sparse", "int8", "int4:32+sparse", "lookup", "lookup+int8"]
TOKENS = 60


def dense_text(engine: Engine, prompt: Tensor, tokens: int = TOKENS) -> list[int]:
    with control_of(engine.model).switched_off():
        return list(engine.generate(prompt, max_new_tokens=tokens, sampling=GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("count", [None, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_greedy_text_is_the_dense_model_s(path: str, kind: str, count: int | None) -> None:
    engine, prompt = Engine(sparse(tiny("llama")), path=path), random_tokens(1, 12)
    prompt[0, 6:] = prompt[0, :6]
    decoder = speculator(engine, kind, count)
    assert list(decoder.generate(prompt, max_new_tokens=TOKENS, sampling=GREEDY)) == dense_text(engine, prompt)
    tally = decoder.tally
    assert tally.tokens == tally.accepted + tally.passes >= TOKENS - 1
    assert tally.accepted <= tally.judged <= tally.drafted
    if count is not None and kind != "lookup":
        assert tally.tokens_per_pass > 1.15  # what is drafted is used


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2-window", "gpt2", "qwen3", "gemma2", "bloom", "mixtral", "falcon", "olmo2"])
@pytest.mark.parametrize("path", PATHS)
def test_other_families(path: str, family: str) -> None:
    engine, prompt = Engine(sparse(tiny(family)), path=path), random_tokens(1, 12)
    decoder = speculator(engine, "sparse", 3)
    assert list(decoder.generate(prompt, max_new_tokens=40, sampling=GREEDY)) == dense_text(engine, prompt, 40)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_stop_tokens_and_a_second_turn(path: str) -> None:
    engine = Engine(sparse(tiny("llama")), path=path, keep="prompts")
    decoder, prompt = speculator(engine, "sparse", 3), random_tokens(1, 70)
    wanted = dense_text(engine, prompt)
    stop = frozenset(wanted[30:31])
    assert (
        list(decoder.generate(prompt, max_new_tokens=TOKENS, sampling=GREEDY, stop=stop))
        == wanted[: wanted.index(wanted[30])]
    )
    longer = torch.cat([prompt, torch.tensor([wanted[:9]])], dim=1)
    assert list(decoder.generate(longer, max_new_tokens=TOKENS, sampling=GREEDY)) == dense_text(engine, longer)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_has_the_bits_of_single_steps(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sequences too, whatever their drafts wrote into the cache before; and so have the keys and values."""
    use_threads(monkeypatch, threads)
    engine = Engine(sparse(tiny("llama", num_key_value_heads=2)).to(dtype), path="native")
    lengths, tokens = [20, 9, 14], random_tokens(3, 8, seed=5)
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for span in (1, 2, 4, 8):
        cache = engine.new_cache(40)
        engine.prefill(random_tokens(3, 20), cache, torch.tensor(lengths))
        draft = engine.path.stepper(cache, sparse=True)
        for index in range(5):
            draft.run(random_tokens(3, 1, seed=index), [length + index for length in lengths])
        target = engine.path.stepper(cache, sparse=False)
        logits = [
            target.run(tokens[:, start : start + span], [length + start for length in lengths])[0].clone()
            for start in range(0, 8, span)
        ]
        states = [
            state for layer in cache.layers for row in range(3) for state in layer.states_of(row, lengths[row] + 8)
        ]
        found[span] = torch.cat(logits, dim=1), [state.clone() for state in states]
        assert cache.row_lengths() == [length + 8 for length in lengths]
        assert isinstance(cache.layers[0], NativeLayer)
    for span in (2, 4, 8):
        assert torch.equal(found[span][0], found[1][0])
        assert all(map(torch.equal, found[span][1], found[1][1]))


@needs_library
@torch.no_grad()
def test_passes_without_drafts_that_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host waits for several at once."""
    engine, prompt = Engine(sparse(tiny("llama")), path="native"), random_tokens(1, 12)
    decoder = speculator(engine, "sparse")
    cache, logits = decoder.run_prompt(prompt, 100)
    token = logits.argmax(-1, keepdim=True)
    loop = decoder.loop(cache, prompt, token, Sampler(GREEDY, engine.device), positions=100)
    monkeypatch.setattr(loop, "_on_gpu", True)
    record = loop._pace.record

    def record_dear_drafts(offer: Offer, count: int, judged: int, accepted: int, seconds: float | None) -> None:
        record(offer, count, judged, accepted, seconds and (9.0 if count else 1.0))

    monkeypatch.setattr(loop._pace, "record", record_dear_drafts)
    found = token[0].tolist()
    ahead = 0
    while len(found) < 80:
        passes = loop.tally.passes
        found += loop.advance()[0]
        ahead = max(ahead, loop.tally.passes - passes)
    assert ahead == 4
    assert found[:80] == dense_text(engine, prompt, 80)
    assert loop.tally.counts[0] > 40
    assert loop.lengths == [11 + len(found)]


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "lookup+int8"])
def test_rows_of_a_batch_accept_each_its_own_number(kind: str) -> None:
    """Prompts of different lengths, and a row that ends before the others."""
    engine = Engine(sparse(tiny("llama")), path="native")
    prompts, lengths = random_tokens(3, 20), [20, 7, 13]
    prompts[1, 2:7] = prompts[1, 0]
    wanted = [dense_text(engine, prompts[row : row + 1, :length], 30) for row, length in enumerate(lengths)]
    cache = engine.path.new_cache_for_steppers(60)
    sampler = Sampler(GREEDY, engine.device)
    token = sampler.next_token(engine.prefill(prompts, cache, torch.tensor(lengths)))
    decoder = speculator(engine, kind, 3)
    loop = decoder.loop(cache, prompts, token, sampler, positions=60, lengths=lengths)
    texts = [[int(token[row])] for row in range(3)]
    steps: list[list[int]] = []
    while min(map(len, texts)) < 30:
        new = loop.advance()
        steps.append([len(tokens) for tokens in new])
        for row, tokens in enumerate(new):
            texts[row] += tokens
            if len(texts[row]) >= 30:
                loop.end(row)
    assert [text[:30] for text in texts] == wanted
    assert any(len(set(counts)) > 1 for counts in steps)
    assert [0 in counts for counts in steps][-1]  # a row that has ended goes on no more


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_a_quantised_model_verifies(path: str) -> None:
    """int8 verifies, int4 drafts; the model stays as it is."""
    model = sparse(tiny("llama"), scheme="int8")
    engine, prompt = Engine(model, path=path), random_tokens(1, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = dense_text(engine, prompt)
    decoder = speculator(engine, "int4:32", 3)
    assert list(decoder.generate(prompt, max_new_tokens=TOKENS, sampling=GREEDY)) == wanted
    assert dense_text(engine, prompt) == wanted
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert decoder.tally.acceptance > 0.3


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_copy_of_experts_drafts(scheme: str | None) -> None:
    """Of weights, and of codes."""
    engine, prompt = Engine(sparse(tiny("mixtral"), scheme=scheme), path="native"), random_tokens(1, 12)
    decoder = speculator(engine, "int4:32" if scheme else "int8", 3)
    assert list(decoder.generate(prompt, max_new_tokens=40, sampling=GREEDY)) == dense_text(engine, prompt, 40)
    assert decoder.tally.acceptance > 0.3


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(("kind", "routes"), [("int8", True), ("int8+sparse", False)])
def test_copies_of_mlps_that_leave_neurons_out_are_refused(kind: str, routes: bool) -> None:
    """Before they are made: the library would refuse them at the first draft."""
    model = routed() if routes else tiny("llama", hidden_act="relu")
    if not routes:
        make_intrinsic_(model)
    reporter = Reporter(quiet=True)
    with pytest.raises(UsageError, match="model.layers.0.mlp leaves neurons out"):
        speculator_for(Engine(model, path="native"), Speculation.parse(kind), 3, reporter, {})
    engine, prompt = Engine(model, path="native" if kind == "int8+sparse" else "general"), random_tokens(1, 12)
    decoder, _ = speculator_for(engine, Speculation.parse("int8"), 3, reporter, {})
    assert list(decoder.generate(prompt, max_new_tokens=20, sampling=GREEDY)) == dense_text(engine, prompt, 20)


@torch.no_grad()
def test_a_quantised_copy_shares_what_it_does_not_quantise() -> None:
    model = sparse(tiny("llama"))
    made, taken = quantised_copy(model, Scheme.parse("int8"))
    assert made.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert made.model.norm.weight is model.model.norm.weight
    codes = sum(layer.qweight.nbytes for layer in sparse_layers(made).values())
    assert codes < taken < 1.3 * codes
    rules = {name: layer.rule for name, layer in sparse_layers(model).items()}
    assert {name: layer.rule for name, layer in sparse_layers(made).items() if name in rules} == rules
    assert control_of(made) is not control_of(model)
    apply_plan_(made, plan_for(model, "apart"))  # which moves no weight of the model
    assert {name: layer.rule for name, layer in sparse_layers(model).items()} == rules


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("kind", ["lookup+int8", "sparse"])
def test_a_seed_gives_the_same_text_whatever_passes_took(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same decoder too, which has written greedy text in between."""
    engine, prompt = Engine(sparse(tiny("llama")), path="native"), random_tokens(1, 12)
    decoder, drawn = speculator(engine, kind), SamplingConfig(0.7, seed=3)
    texts = []
    for seed in range(3):
        clock = random.Random(seed)
        monkeypatch.setattr(loop_module.time, "perf_counter", clock.random)
        texts.append(list(decoder.generate(prompt, max_new_tokens=TOKENS, sampling=drawn)))
        assert decoder.tally.drafted > 0
        list(decoder.generate(prompt, max_new_tokens=TOKENS, sampling=GREEDY))
    assert texts[0] == texts[1] == texts[2]


@needs_library
@torch.no_grad()
def test_a_kept_cache_has_no_refused_drafts() -> None:
    """The next prompt goes on from keys and values of the reply, not of what was drafted behind it."""
    engine, prompt = Engine(sparse(tiny("llama")), path="native", keep="replies"), random_tokens(1, 12)
    decoder = speculator(engine, "sparse", 4)
    text = list(decoder.generate(prompt, max_new_tokens=20, sampling=GREEDY))
    assert decoder.tally.accepted < decoder.tally.drafted
    kept, (cache, _) = engine.run_prompt(torch.tensor([[*prompt[0].tolist(), *text, 1, 2]]), 60, None)
    assert kept is not None
    dense = engine.new_cache(60)
    with control_of(engine.model).switched_off():
        engine.prefill(prompt, dense)
        for token in [*text, 1, 2]:
            engine.step(torch.tensor([[token]]), dense)
    for own, other in zip(cache.layers, dense.layers, strict=True):
        for state, expected in zip(own.states_of(0, 34), other.states_of(0, 34), strict=True):
            assert error_of(state, expected) < 1e-5


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(("kind", "count"), [("int4:32", 2), ("lookup", 2), ("sparse", None)])
def test_sampled_text_is_distributed_as_the_dense_model_s(kind: str, count: int | None) -> None:
    """The second and third token of a model of sixteen tokens, by chi-square over pairs."""
    model = sparse(tiny("llama", vocab_size=16))
    engine, rows, sampling = Engine(model, path="native"), 256, SamplingConfig(0.8, top_k=9, seed=4)
    prompt = torch.tensor([[3, 5, 3, 5, 3]])
    sampler = Sampler(sampling, engine.device)
    decoder = speculator(engine, kind, count)
    counts = torch.zeros(16, 16)
    prompts = prompt.expand(rows, -1)
    for _ in range(12):
        cache = engine.path.new_cache_for_steppers(20)
        engine.prefill(prompts[:, :-1], cache)
        loop = decoder.loop(cache, prompts[:, :-1], prompts[:, -1:], sampler, positions=20)
        texts: list[list[int]] = [[] for _ in range(rows)]
        while min(map(len, texts)) < 2:
            for row, tokens in enumerate(loop.advance()):
                texts[row] += tokens
        for text in texts:
            counts[text[0], text[1]] += 1
    with control_of(model).dense():
        first = sampler.probabilities(model(input_ids=prompt).logits[:, -1])[0]
        both = torch.cat([prompt.expand(16, -1), torch.arange(16)[:, None]], dim=1)
        then = sampler.probabilities(model(input_ids=both).logits[:, -1])
    shares = first[:, None] * then
    often = shares.flatten() * counts.sum() > 5  # rarer pairs together
    cells = [torch.cat([own.flatten()[often], own.flatten()[~often].sum()[None]]) for own in (counts, shares)]
    assert len(cells[0]) > 12
    assert chi_square_p(*cells) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "reason"),
    [("t5", "encoder-decoder"), ("phi3-long", "rope type longrope")],
)
def test_models_that_cannot_take_tokens_back_are_refused(family: str, reason: str) -> None:
    model: Any = build_model(family)
    with pytest.raises(UsageError, match=reason):
        Speculator(Engine(model), model)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shape"), [("mamba", {"state_size": 8}), ("openai-gpt", {"n_positions": 64})])
def test_states_from_which_no_token_can_be_taken_back(kind: str, shape: dict[str, int]) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **shape)).eval()
    with pytest.raises(UsageError, match="from which no token can be taken back"):
        Speculator(Engine(model), model)


@torch.no_grad()
def test_a_batch_by_transformers_forward_is_refused() -> None:
    engine = Engine(sparse(tiny("llama")), path="general")
    decoder, prompt = speculator(engine, "sparse", 2), random_tokens(2, 9)
    cache, logits = decoder.run_prompt(prompt, 20)
    with pytest.raises(UsageError, match="decode one sequence"):
        decoder.loop(cache, prompt, logits.argmax(-1, keepdim=True), Sampler(GREEDY, engine.device), positions=20)


@needs_library
@torch.no_grad()
def test_the_cache_is_the_dense_model_s() -> None:
    """After a reply its keys and values are those of dense steps, not of drafts."""
    engine, prompt = Engine(sparse(tiny("llama")), path="native"), random_tokens(1, 12)
    decoder = speculator(engine, "sparse", 3)
    cache, logits = decoder.run_prompt(prompt, 40)
    sampler = Sampler(GREEDY, engine.device)
    loop = decoder.loop(cache, prompt, sampler.next_token(logits), sampler, positions=40)
    for _ in range(4):
        loop.advance()
    (length,) = loop.lengths
    dense = engine.new_cache(40)
    with control_of(engine.model).switched_off():
        token = sampler.next_token(engine.prefill(prompt, dense))
        for _ in range(length - 12):
            token = sampler.next_token(engine.step(token, dense))
    assert isinstance(dense, FixedCache)
    for own, other in zip(cache.layers, dense.layers, strict=True):
        for state, expected in zip(own.states_of(0, length), other.states_of(0, length), strict=True):
            assert error_of(state, expected) == 0
