"""From the last hidden states to logits, a few tokens at a time.

Logits of all tokens are the largest tensor of a run: 49,152 to 262,144 a token, in float32, and a loss holds several.
So a pass stops at the hidden states that the output layer would read, and the loss makes logits in pieces.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.errors import UsageError
from teal_cli.models.block_calls import hooked
from teal_cli.models.forward import run_text, watched
from teal_cli.sparse import SparseLinear

_TOLERANCE = 1e-3
_PROBED = 4
"""Tokens on which the logits made here are held against the model's."""


class LogitMaker:
    """Runs a decoder up to its output layer, and makes logits of what it found there.

    Args:
        model: with an output layer that is linear; may be sparse.

    Raises:
        UsageError: it makes logits in a way that is unknown here.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layer = model.get_output_embeddings()
        if not isinstance(self.layer, nn.Linear):
            raise UsageError(f"teal adapt needs a decoder with a linear output layer, not {type(self.layer).__name__}")
        self._finish = _finish_of(model)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, hidden): what the output layer reads, small inputs left out."""
        found: list[Tensor] = []

        def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0].to(layer.weight.device)  # of a model on several devices it may come from another
            found.append(layer.kept_inputs(given) if isinstance(layer, SparseLinear) else given)

        hooks = [self.layer.register_forward_pre_hook(keep)]
        with hooked(hooks), watched(self.model, with_output=True) as run:
            run(ids)
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary), in the dtype of the product."""
        return self._finish(F.linear(hidden, self.layer.weight, self.layer.bias))

    @torch.no_grad()
    def require_exact(self) -> None:
        """Hold the logits of a few tokens against those that the model's own forward makes.

        Raises:
            UsageError: they differ.
        """
        device = self.layer.weight.device
        ids = torch.arange(_PROBED, device=device).view(1, -1)
        own = run_text(self.model, ids, logits_to_keep=0).logits[0].float()
        ours = self.logits(self.hidden_states(ids)[0]).float()
        if not torch.allclose(ours, own, rtol=_TOLERANCE, atol=_TOLERANCE * float(own.abs().max())):
            raise UsageError(
                f"teal adapt cannot distil model type {self.model.config.model_type}: what it does to its logits after "
                "the output layer is unknown here"
            )


def _finish_of(model: Any) -> Callable[[Tensor], Tensor]:
    """What a model does to the products of its output layer, by the names that configurations have for it."""
    config = model.config.get_text_config()
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    if scale:
        return lambda logits: logits * scale
    if divisor:
        return lambda logits: logits / divisor
    return lambda logits: logits
