"""transformers' static cache, in which layers with a window keep all positions too."""

from typing import Any

from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

_MOST_POSITIONS = 1 << 15
"""Above this a rolling window saves more memory than anybody would give for a graph: of Gemma-3-4B 4.5 GB."""

_MARK = "_dynamo_static_input_type"


class WholeWindowLayer(StaticLayer):
    """In place of a layer that forgets what leaves its window: all positions stay, and the mask hides them.

    A rolling window moves by rules in Python, on a count that the host keeps. A captured graph would freeze the
    count, and compiled code would be made anew for each.
    """


def static_cache(config: Any, positions: int) -> StaticCache:
    """An empty cache in fixed memory.

    Args:
        config: the model's.
        positions: that it is for. Above 32,768, layers with a window roll as transformers lets them.
    """
    cache = StaticCache(config=config, max_cache_len=positions)
    if positions > _MOST_POSITIONS:
        return cache
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:  # kinds made of it keep more, and roll on
            cache.layers[index] = WholeWindowLayer(positions)
    return cache


def forget_addresses(cache: Any) -> None:
    """Let code that was compiled for one cache run on another of its shape. After the prompt, which takes the memory.

    transformers marks the tensors for torch's own CUDA graphs, which are not used here. Releases of torch compile
    anew where a marked address changes (they guard by default), and keep the tensor for as long as the code.
    """
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if hasattr(tensor, _MARK):
                    delattr(tensor, _MARK)


def has_windows(cache: Any) -> bool:
    """Whether some layer of a cache of transformers sees a window only."""
    return any(cache.is_sliding) or any(isinstance(layer, WholeWindowLayer) for layer in cache.layers)
