"""The context of a pass: who sets it, what it decides, and that nothing of it stays."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, build_family
from torch import Tensor, nn
from transformers import DynamicCache

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.models.architectures import architecture_of, find_projections
from teal_cli.sparse import Dense, Rule, Threshold, Zeros, control_of, sparsify_
from teal_cli.sparse.context import PassContext, decide, shape_of_inputs
from teal_cli.sparse.control import SparsityControl

CAUSAL = sorted(name for name, row in FAMILIES.items() if architecture_of(row["model_type"]).kind == "causal")


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))


def _sparse(family: str, *, output_layer: bool | None = None) -> Any:
    """A tiny model whose every projection has a threshold at which about half of its inputs go."""
    model = build_family(family)
    names = [p.name for p in find_projections(model, output_layer=output_layer)]
    found: dict[str, float] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, float(args[0].abs().median()))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    with torch.no_grad():
        model(input_ids=_tokens(2, 16))
    for hook in hooks:
        hook.remove()
    sparsify_(model, SparsityPlan("by hand", 0.5, {name: Threshold(found[name], 0.5) for name in names}))
    return model


@pytest.mark.parametrize(
    ("rule", "phase", "rows", "expected"),
    [
        (Threshold(0.1, 0.5), "dense", 2, "dense"),
        (Threshold(0.1, 0.5), "decode", 2, "skip"),
        (Threshold(0.1, 0.5), "decode", 10, "dense"),  # cross attention reads the encoder's states
        (Threshold(0.1, 0.5), "masked", 10, "masked"),
        (Zeros(), "decode", 2, "skip"),
        (Zeros(), "masked", 10, "masked"),
        (Dense(), "decode", 2, "dense"),
        (Dense(), "masked", 10, "dense"),
    ],
)
def test_one_function_decides(rule: Rule, phase: Any, rows: int, expected: str) -> None:
    assert decide(rule, PassContext(phase, batch=2, tokens=5), rows) == expected


@pytest.mark.parametrize(
    ("change", "tokens", "phase"),
    [
        ({}, 1, "decode"),
        ({}, 2, "dense"),
        ({"mode": "dense"}, 1, "dense"),
        ({"enabled": False, "mode": "masked"}, 4, "dense"),
        ({"mode": "masked"}, 1, "masked"),
        ({"encodes": True}, 1, "masked"),
    ],
)
def test_what_a_pass_is(change: dict[str, Any], tokens: int, phase: str) -> None:
    assert SparsityControl(**change).context_of(3, tokens).phase == phase


def test_the_shape_comes_from_what_a_model_is_called_with() -> None:
    ids, embeddings = torch.zeros(2, 7, dtype=torch.long), torch.zeros(3, 4, 8)
    assert shape_of_inputs((ids,), {}) == (2, 7)
    assert shape_of_inputs((), {"input_ids": ids, "attention_mask": embeddings}) == (2, 7)
    assert shape_of_inputs((), {"input_ids": None, "inputs_embeds": embeddings}) == (3, 4)
    assert shape_of_inputs((None,), {}) is None
    assert shape_of_inputs((), {"past_key_values": ids}) is None


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_rows_of_different_prompts_give_what_each_gives_alone(family: str) -> None:
    """`masked` takes the length of each row's prompt; counts add up, too."""
    model = _sparse(family).double()  # in float32 a rounding may decide at a threshold
    control, ids, prompts = control_of(model), _tokens(3, 14), torch.tensor([3, 14, 8])
    with control.masked(prompts), control.counting() as together:
        logits = model(input_ids=ids, use_cache=False).logits
        last = model(input_ids=ids, use_cache=False, logits_to_keep=4).logits
    with control.counting() as apart:
        for row, prompt in enumerate(prompts.tolist()):
            with control.masked(prompt):
                alone = model(input_ids=ids[row : row + 1], use_cache=False).logits
                kept = model(input_ids=ids[row : row + 1], use_cache=False, logits_to_keep=4).logits
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last[row : row + 1], kept, rtol=1e-9, atol=1e-9)
    assert together.by_projection() == apart.by_projection()


class _StopError(BaseException):
    """As KeyboardInterrupt: hooks that are always called are not called for it."""


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, _StopError])
@pytest.mark.parametrize("inside", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_pass_that_fails_leaves_nothing_behind(inside: str, error: type[BaseException]) -> None:
    model = _sparse("llama")
    control, prompt, token = control_of(model), _tokens(2, 9), _tokens(2, 1)
    expected = [model(prompt).logits, model(token).logits]

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    handle = model.model.layers[1].get_submodule(inside).register_forward_pre_hook(fail)
    for ids in (prompt, token):
        with pytest.raises(error):
            model(ids)
        assert control.context is None or error is _StopError
    handle.remove()
    assert torch.equal(model(prompt).logits, expected[0])
    assert torch.equal(model(token).logits, expected[1])
    assert control.context is None


def _through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  # our own


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle])
def test_copies_have_a_context_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = _sparse("llama")
    other = copied(model)
    assert control_of(other) is not control_of(model)
    assert all(layer.control is control_of(other) for layer in other.modules() if hasattr(layer, "control"))
    token = _tokens(1, 1)
    with control_of(model).dense(), control_of(other).counting() as counter:
        torch.testing.assert_close(other(token).logits, _sparse("llama")(token).logits)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "qwen3_moe", "llama"])
def test_a_stack_called_without_its_model_is_a_pass_too(family: str) -> None:
    """Of OPT it flattens tokens away, of experts they are routed."""
    model = _sparse(family)
    token, cache = _tokens(3, 1), DynamicCache(config=model.config)
    inner = model.base_model
    model(input_ids=_tokens(3, 8), past_key_values=cache)
    with control_of(model).counting() as counter:
        inner(input_ids=token, past_key_values=cache)
    assert all(0.2 < share < 0.8 for share in counter.by_projection().values())
    with control_of(model).counting() as counter:
        inner(input_ids=_tokens(3, 8))
    assert counter.by_projection() == {}


@torch.no_grad()
def test_a_layer_alone_goes_by_the_shape_of_its_input() -> None:
    model = _sparse("llama")
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 64)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    masked = nn.functional.linear(x * (x.abs() > layer.threshold), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), dense)
    torch.testing.assert_close(layer(x[:, :1]), masked[:, :1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0, 0]), masked[0, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_encoder_decoder_has_a_pass_for_each_of_its_texts() -> None:
    model = _sparse_seq2seq()
    control, source = control_of(model), _tokens(2, 9)
    encoded = model.get_encoder()(input_ids=source)
    with control.counting() as counter:
        model(encoder_outputs=encoded, decoder_input_ids=_tokens(2, 1))
    realised = counter.by_projection()
    cross = {name for name in realised if "EncDecAttention" in name and name.endswith((".k", ".v"))}
    assert not cross  # they read all states of the encoder, as one reads a prompt
    assert realised
    assert all(name.startswith("decoder.") for name in realised)
    assert control.context is None


def _sparse_seq2seq() -> Any:
    model = build_family("t5")
    rules = {p.name: Threshold(0.05, 0.5) for p in find_projections(model)}
    sparsify_(model, SparsityPlan("by hand", 0.5, rules))
    return model


@torch.no_grad()
@pytest.mark.parametrize("way", ["dense", "switched_off"])
def test_a_hook_that_switches_sparsity_off_in_a_pass_gets_it_and_leaves_the_pass_as_it_was(way: str) -> None:
    model = _sparse("opt")  # its layers are given flattened tokens: only the pass knows of rows
    control, ids, prefixes = control_of(model), _tokens(3, 8), torch.tensor([2, 8, 5])
    layer = model.model.decoder.layers[0].fc2
    x = torch.randn(6, layer.in_features)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    with control.masked(prefixes):
        expected = model(input_ids=ids, use_cache=False).logits

        def look(module: nn.Module, args: Any) -> None:
            with getattr(control, way)():
                torch.testing.assert_close(layer(x), dense)

        handle = model.model.decoder.layers[0].fc1.register_forward_pre_hook(look)
        got = model(input_ids=ids, use_cache=False).logits
        handle.remove()
    assert torch.equal(got, expected)
    assert control.context is None
