"""From what a client asks to what the scheduler takes."""

import secrets
from collections.abc import Sequence

from teal_cli.config import ServeConfig
from teal_cli.decode.requests import Mask, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.serve.errors import ApiError
from teal_cli.serve.prompts import too_long
from teal_cli.serve.schemas import ChatRequest, CompletionRequest
from teal_cli.serve.service import Served

_SEEDS = 1 << 63


def check_model(asked: ChatRequest | CompletionRequest, served: Served) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: 404.
    """
    if asked.model != served.name:
        raise ApiError(
            404,
            f"there is no model {asked.model[:100]!r} here, but {served.name!r}",
            param="model",
            code="model_not_found",
        )


def scheduled(
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
    masks: Sequence[Mask | None],
    served: Served,
    config: ServeConfig,
) -> list[Request]:
    """One request to the scheduler for each reply: `n` of each prompt, one prompt after another.

    Args:
        asked: says how.
        prompts: tokens of each.
        masks: of the replies to one prompt, one for each.
        served: the model.
        config: limits and defaults.

    Raises:
        ApiError: no room for the reply, more tokens than a reply may have, or more replies than can ever wait.
    """
    most = served.scheduler.slots.at_once + config.queue
    if len(prompts) * len(masks) > most:
        raise ApiError(400, f"{len(prompts) * len(masks):,} replies at once: at most {most} here", param="n")
    temperature = config.temperature if asked.temperature is None else asked.temperature
    seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
    found: list[Request] = []
    for prompt in prompts:
        tokens = _tokens(asked, len(prompt), served.scheduler.positions, config)
        for mask in masks:
            sampling = SamplingConfig(
                temperature=temperature,
                top_k=max(asked.top_k or 0, 0),
                top_p=1.0 if asked.top_p is None else asked.top_p,
                # Each reply draws numbers of its own; the first those of the seed.
                seed=(seed + len(found)) % _SEEDS,
            )
            found.append(
                Request(
                    prompt=prompt,
                    max_new_tokens=tokens,
                    sampling=sampling,
                    stop=served.stop,
                    sparsity=_level(asked.sparsity, served),
                    logprobs=asked.alternatives,
                    deadline_seconds=config.max_seconds,
                    mask=mask,
                )
            )
    return found


def _tokens(asked: ChatRequest | CompletionRequest, prompt: int, positions: int, config: ServeConfig) -> int:
    """How many a reply may have."""
    wanted = asked.most_tokens
    if wanted is not None and wanted > config.max_new_tokens:
        raise ApiError(
            400, f"max_tokens of {wanted:,}: replies have at most {config.max_new_tokens:,} here", param="max_tokens"
        )
    if prompt + (wanted or 1) > positions:
        raise too_long(f"{prompt:,} tokens of the prompt and {wanted or 1:,} of the reply", positions)
    return min(config.max_new_tokens, positions - prompt) if wanted is None else wanted


def _level(asked: float | None, served: Served) -> float | None:
    """The level that a request means, which a client may have rounded."""
    if asked is None:
        return None
    levels = served.scheduler.levels.all
    nearest = min(levels, key=lambda level: abs(level - asked))
    if abs(nearest - asked) > 1e-6:
        known = ", ".join(f"{level:g}" for level in levels)
        raise ApiError(400, f"there is no sparsity {asked:g} here, but {known}", param="sparsity")
    return nearest
