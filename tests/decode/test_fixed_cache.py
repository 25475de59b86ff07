"""The KV cache of the fused path, as transformers' forward fills it."""

import pytest
import torch
from conftest import TINY_CONFIGS
from fused_pair import random_tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from teal_cli.decode.cache import FixedCache


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(20, 12), (20, 1), (1, 20), (5, 5)], ids=str)
@pytest.mark.parametrize("of", ["llama", "mistral", "qwen2-window"])
def test_a_fixed_cache_behaves_as_a_dynamic_one(of: str, chunks: tuple[int, int]) -> None:
    """In a prefill of two chunks; the windows are shorter than the prompt."""
    shape = dict(TINY_CONFIGS[of.removesuffix("-window")])
    if of == "qwen2-window":
        shape |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2)
    dynamic, fixed = DynamicCache(config=model.config), FixedCache(model.config.num_hidden_layers, 40)
    ids = random_tokens(2, sum(chunks))
    for chunk in ids.split(list(chunks), dim=1):
        expected, got = (model(input_ids=chunk, past_key_values=cache).logits for cache in (dynamic, fixed))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert fixed.get_seq_length() == dynamic.get_seq_length() == fixed.length == sum(chunks)
    everything = model(input_ids=ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(got[:, -1], everything, rtol=1e-4, atol=1e-5)


def test_a_fixed_cache_keeps_its_memory() -> None:
    cache = FixedCache(1, 10)
    layer = cache.layers[0]
    assert (cache.length, layer.get_max_length(), layer.get_max_cache_shape()) == (0, 10, 10)
    states = torch.randn(2, 3, 4, 8)
    keys, values = layer.update(states, states * 2)
    assert torch.equal(keys, states)
    assert torch.equal(values, states * 2)
    address = layer.keys.data_ptr()
    assert layer.get_mask_sizes(5) == (9, 0)
    keys, _ = layer.update(states[:, :, :1] + 1, states[:, :, :1])
    assert torch.equal(keys, torch.cat([states, states[:, :, :1] + 1], dim=2))
    cache.advance()
    assert (cache.length, layer.keys.data_ptr(), layer.keys.shape) == (6, address, (2, 3, 10, 8))
    assert not layer.keys[:, :, 5:].any()  # a masked read of them must not find NaN
    cache.reset()
    assert (cache.length, layer.keys.data_ptr()) == (0, address)
