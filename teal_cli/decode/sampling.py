"""Choosing the next token, on the device, with transformers' own logits warpers."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.threads import in_one_thread


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Draws tokens from logits, reproducibly for a seed."""

    def __init__(self, config: SamplingConfig, device: torch.device) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.greedy = config.temperature == 0.0
        self.generator = None if self.greedy else torch.Generator(device=device).manual_seed(config.seed)
        self._warpers = LogitsProcessorList()
        if not self.greedy:
            self._warpers.append(TemperatureLogitsWarper(config.temperature))
            if config.top_k > 0:
                self._warpers.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(config.top_p))

    def ahead(self) -> "Sampler":
        """One that draws by the random numbers that this one is going to draw by, which stay as they are."""
        made = copy.copy(self)
        made.generator = None if self.generator is None else self.generator.clone_state()
        return made

    @in_one_thread
    def probabilities(self, logits: Tensor) -> Tensor:
        """Of sampling: (rows, vocabulary) logits -> (rows, vocabulary) float32 probabilities of the next token."""
        # The warpers look at scores alone; they ask for input_ids by interface.
        scores: Tensor = self._warpers(None, logits.float())  # type: ignore[arg-type]
        return scores.softmax(-1)

    @in_one_thread
    def draw(self, probabilities: Tensor) -> Tensor:
        """One token of each row: (rows, vocabulary) -> (rows, 1) int64."""
        return draw(probabilities, self.generator)

    @in_one_thread
    def next_token(self, logits: Tensor) -> Tensor:
        """(batch, vocabulary) logits -> (batch, 1) int64 tokens."""
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        return self.draw(self.probabilities(logits))


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row by weights that need not add up to 1: (rows, vocabulary) -> (rows, 1) int64.

    As torch.multinomial draws a single sample, less its check of the input, for which the host waits.
    """
    waits = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / waits).argmax(-1, keepdim=True)
