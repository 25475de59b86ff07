"""What a model carries from one token to the next, under the name that its own forward gives it."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import ArtefactError

_NAMES = ("past_key_values", "cache_params", "state")
"""Of transformers' forwards: attention, Mamba and xLSTM, RWKV. The state comes back in a field of the same name."""


@dataclass
class CarriedState:
    """A state that the model makes by itself: nothing before the prompt, then what each forward gives back."""

    value: Any = None
    length: int = 0
    """Tokens that it has seen."""


@dataclass
class WholeSequence:
    """In place of a state, for a model that has none (GPT-1): every step runs all tokens again."""

    ids: Tensor | None = None
    """(batch, tokens) int64 so far; None before the prompt."""
    prompt: int = 0
    """Tokens of the prompt, which stay dense."""

    def extend(self, input_ids: Tensor) -> Tensor:
        """Add tokens; all of them."""
        if self.ids is None:
            self.ids, self.prompt = input_ids, input_ids.shape[1]
        else:
            self.ids = torch.cat([self.ids, input_ids], dim=1)
        return self.ids


class StateNames:
    """How one model is given its state.

    Args:
        model: a causal language model of transformers.

    Raises:
        ArtefactError: its forward takes a state that teal does not know, or its prompts are more than tokens.
    """

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(type(model).forward).parameters
        self._model = model
        self.name = next((name for name in _NAMES if name in parameters), None)
        """Of the parameter and of the output's field; None for a model without a state."""
        self.makes_its_own = self.name is not None and not (
            self.name == "past_key_values" and model._supports_default_dynamic_cache()
        )
        """Whether the state is a `CarriedState`, not a cache of transformers that fits any attention."""
        self.is_recurrent = bool(getattr(model, "_is_stateful", False))
        """Whether blocks keep a state of fixed size (hybrids of Mamba and attention, linear attention)."""
        # As transformers' generate does: a hybrid may count its positions from 0 at every step (Bamba, MiniMax).
        self.takes_positions = (self.is_recurrent or self.makes_its_own) and "position_ids" in parameters
        if self.name is None:
            _check_plain_tokens(model)

    def forget(self, batch: int) -> None:
        """Clear a state that the layers themselves hold (RecurrentGemma), where one text would run into the next."""
        clear = getattr(self._model, "_setup_cache", None)
        if self.is_recurrent and clear is not None:
            clear(self._model.config, batch, self._model.device, self._model.dtype)

    def new(self) -> CarriedState | WholeSequence | None:
        """An empty state; None where a cache of transformers is one."""
        if self.name is None:
            return WholeSequence()
        return CarriedState() if self.makes_its_own else None

    def arguments(self, input_ids: Tensor, state: Any) -> dict[str, Any]:
        """What forward takes besides tokens: (batch, tokens) int64 after the state."""
        carried = isinstance(state, CarriedState)
        found: dict[str, Any] = {str(self.name): state.value if carried else state}
        if self.takes_positions:
            start, tokens = state.length if carried else state.get_seq_length(), input_ids.shape[1]
            # The start may be on the device (of a static cache), where a captured step must find it.
            positions = (torch.arange(tokens, device=input_ids.device) + start)[None]
            found["position_ids"] = positions.expand(input_ids.shape[0], -1)
        return found

    def keep(self, state: Any, input_ids: Tensor, output: Any) -> None:
        """Take what a forward of these tokens gave back."""
        if isinstance(state, CarriedState):
            state.value = output[self.name]
            state.length += input_ids.shape[1]


def _check_plain_tokens(model: Any) -> None:
    """Refuse a model without a state whose own generation runs on something else than the tokens so far."""
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    if "mems" not in inspect.signature(type(model).forward).parameters:
        inputs = model.prepare_inputs_for_generation(ids, use_cache=False)
        if torch.equal(inputs["input_ids"], ids):
            return
    raise ArtefactError(
        f"model type {model.config.model_type} keeps a state between tokens that teal does not know, or needs more "
        "than the tokens: it cannot be decoded here (transformers' generate can)"
    )
