"""Routed MLPs on the native path, against the model's own forward in float64."""

import pytest
import torch
from native_models import NO_LIBRARY, check_steps, tiny, use_threads
from routed_models import routed, text

from teal_cli.decode.engine import Engine
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import Rule, Threshold, control_of

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("group", "rank", "threads"), [(4, None, 2), (20, None, 3), (1, 12, 2), (4, 7, 1)])
def test_logits_and_counts(
    group: int, rank: int | None, threads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, threads)
    check_steps(routed(group=group, rank=rank), [12, 5, 9, 7, 3, 8, 4, 6][:rows])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),  # gelu, and norms that add to the stream
        ("cohere2", {}),  # a layer norm, and an MLP beside the attention
        ("granite", {}),
        ("qwen3", {"hidden_act": "relu2"}),
        ("llama", {"mlp_bias": True}),
    ],
)
def test_other_families(family: str, changes: dict[str, object]) -> None:
    check_steps(routed(of=tiny(family, **changes)), [12, 5])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Logits of groups lie apart from zero here, so that rounding moves none to the other side."""
    model = routed(dtype=dtype)
    for block in model.model.layers:
        bias = block.mlp.router.bias
        bias.copy_(torch.where(torch.arange(len(bias)) % 3 == 0, 30.0, -30.0))
    check_steps(model, [12, 5])


@torch.no_grad()
def test_thresholds_elsewhere() -> None:
    sites = {p.name: p.site for p in find_projections(routed().cpu())}
    rules: dict[str, Rule] = {name: Threshold(0.3, 0.3) for name, site in sites.items() if "attention" in site}
    check_steps(routed(elsewhere=rules), [9])


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("share", ["none", "all", "first"])
def test_groups_that_are_all_there_or_gone(share: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, threads)
    model = routed()
    for block in model.model.layers:
        bias = block.mlp.router.bias
        bias.fill_(-1e3 if share == "all" else 1e3)
        if share == "first":
            bias[1:] = -1e3
    check_steps(model, [6, 3], 2)


@torch.no_grad()
def test_dense_steps_are_routed_too() -> None:
    """They compute every neuron, and what is left out is zero all the same."""
    model = routed()
    engine, control = Engine(model, path="native"), control_of(model)
    prompt, tokens = text(1, 9), text(1, 2, seed=3)
    steps = []
    for sparse in (True, False):
        cache = engine.new_cache(16)
        control.enabled = sparse
        engine.prefill(prompt, cache)
        steps.append(torch.stack([engine.step(token, cache) for token in tokens.split(1, dim=1)]))
    expected = model(input_ids=torch.cat([prompt, tokens], 1)).logits[:, -2:]
    for found in steps:
        assert torch.allclose(found.transpose(0, 1), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_rows_of_groups_that_are_left_out_are_not_read() -> None:
    model = routed()
    for block in model.model.layers:
        block.mlp.router.bias[0] = -1e3
    engine = Engine(model, path="native")
    logits = []
    for broken in (False, True):
        cache = engine.new_cache(16)
        engine.prefill(text(1, 9), cache)
        for block in model.model.layers if broken else ():
            for layer in block.mlp.layers[:2]:
                layer.weight[:4] = torch.nan
        logits.append(engine.step(text(1, 1), cache).clone())
    assert torch.equal(*logits)
