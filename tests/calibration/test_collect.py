"""Collecting hidden states: which ones, from which positions, and leaving no trace on the model."""

import pytest
import torch
from conftest import VOCABULARY, build_model, calibrate_tiny, save_tiny

from teal_cli.calibration import histogram
from teal_cli.calibration.collect import HiddenStateCollector, collect
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import find_projections


def _blocks(count: int = 4, length: int = 48) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(2, VOCABULARY, (count, length))


def test_counts_what_the_projections_see(family: str) -> None:
    model = build_model(family)
    projections = find_projections(model)
    blocks = _blocks()
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in projections}
    handles = [
        model.get_submodule(p.name).register_forward_pre_hook(
            lambda module, args, name=p.name: seen[name].append(args[0][:, 4:].clone())
        )
        for p in projections
    ]
    histograms = collect(model, projections, blocks.split(2), sink_tokens=4)
    for handle in handles:
        handle.remove()
    assert len(histograms) == 4 * 2  # four sites a block
    for projection in projections:
        x = torch.cat([part.reshape(-1) for part in seen[projection.name]])
        assert torch.equal(histograms[projection.site], histogram.count(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_thresholds_realise_the_sparsity_at_every_site(dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    projections = find_projections(model)
    blocks = _blocks(8, 128)
    histograms = collect(model, projections, blocks.split(1), sink_tokens=4)
    states: dict[str, list[torch.Tensor]] = {p.name: [] for p in projections}
    for p in projections:
        model.get_submodule(p.name).register_forward_pre_hook(
            lambda module, args, name=p.name: states[name].append(args[0][:, 4:].abs().float().flatten())
        )
    with torch.no_grad():
        for block in blocks.split(1):
            model(input_ids=block, use_cache=False)
    for p in projections:
        x = torch.cat(states[p.name])
        for sparsity in (0.25, 0.5, 0.75):
            threshold = histogram.threshold_for(histograms[p.site], sparsity)
            assert abs(float((x <= threshold).float().mean()) - sparsity) < 0.005


def test_two_halves_merge_into_the_whole(tmp_path) -> None:
    folder = save_tiny(tmp_path / "m")
    model, blocks = build_model("llama"), _blocks(6)
    projections = find_projections(model)
    whole = collect(model, projections, blocks.split(1), sink_tokens=4)
    calibration = calibrate_tiny(folder)
    calibration.histograms = collect(model, projections, blocks[:3].split(1), sink_tokens=4)
    other = calibrate_tiny(folder)
    other.histograms = collect(model, projections, blocks[3:].split(1), sink_tokens=4)
    merged = calibration.merged(other)
    assert merged.info.tokens == calibration.info.tokens + other.info.tokens
    for site, counts in whole.items():
        assert torch.equal(merged.histograms[site], counts)


def test_calibrations_of_other_weights_do_not_merge(tmp_path) -> None:
    first = calibrate_tiny(save_tiny(tmp_path / "a", seed=0))
    second = calibrate_tiny(save_tiny(tmp_path / "b", seed=1))
    with pytest.raises(ArtefactError, match="different weights"):
        first.merged(second)


def test_padding_and_sinks_are_left_out() -> None:
    """A left-padded row counts as the same row without padding does."""
    model = build_model("llama")
    projections = find_projections(model)[:3]
    plain, padded = _blocks(1, 20), torch.ones(1, 27, dtype=torch.int64)
    padded[:, 7:] = plain
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    with torch.no_grad():
        with HiddenStateCollector(model, projections, sink_tokens=4) as short:
            model(input_ids=plain, use_cache=False)
        with HiddenStateCollector(model, projections, sink_tokens=4) as long:
            long.attend(mask)
            model(input_ids=padded, attention_mask=mask, use_cache=False)
    (site,) = short.histograms
    assert int(short.histograms[site].sum()) == 16 * 64
    assert torch.equal(long.histograms[site], short.histograms[site])


def test_hooks_are_removed_even_after_an_error() -> None:
    model = build_model("llama")
    with pytest.raises(RuntimeError), HiddenStateCollector(model, find_projections(model), 4):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_memory_is_constant() -> None:
    model = build_model("llama")
    projections = find_projections(model)
    few = collect(model, projections, _blocks(1).split(1), sink_tokens=4)
    many = collect(model, projections, _blocks(6).split(1), sink_tokens=4)
    assert {s: c.shape for s, c in few.items()} == {s: c.shape for s, c in many.items()}
    assert all(counts.nbytes < 200_000 for counts in many.values())


def test_states_that_are_not_finite_are_an_error() -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    blocks = torch.full((1, 16), 5)
    with pytest.raises(ArtefactError, match="infinite, NaN"):
        collect(model, find_projections(model), [blocks], sink_tokens=4)


def test_nothing_counted_is_an_error() -> None:
    model = build_model("llama")
    with pytest.raises(ArtefactError, match="no hidden state was counted"):
        collect(model, find_projections(model), [_blocks(1, 4)], sink_tokens=4)
