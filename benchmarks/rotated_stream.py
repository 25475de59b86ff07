"""A Llama whose residual stream is turned by an orthogonal matrix that its weights absorb."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.checkpoint.calibration import Calibration
from teal_cli.models.block_calls import hooked


@torch.no_grad()
def second_moments(model: Any, readers: dict[str, Any], text: Tensor) -> dict[str, Tensor]:
    """Key of a layer -> sum of x^T x over what it reads, (in, in); sink tokens are not counted."""
    moments: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0][:, 4:].flatten(0, 1)
            moments[key] = moments.get(key, 0.0) + x.T @ x

        return hook

    with hooked([layer.register_forward_pre_hook(note(key)) for key, layer in readers.items()]):
        for sequence in text:
            model(input_ids=sequence[None], use_cache=False, logits_to_keep=1)
    return moments


def _principal(moments: dict[str, Tensor]) -> Tensor:
    """Axes of the covariance averaged over sites."""
    axes: Tensor = torch.linalg.eigh(sum(map(Tensor.double, moments.values()), torch.zeros(1)))[1]
    return axes


def _random(moments: dict[str, Tensor]) -> Tensor:
    """No axes in particular."""
    size = len(next(iter(moments.values())))
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes: Tensor = torch.linalg.qr(noise)[0]
    return axes


ROTATIONS = {"principal": _principal, "random": _random}
"""Site -> second moments of its normalised hidden states, to axes as columns: (hidden, hidden) float64."""


@torch.no_grad()
def fold_norms_(model: Any) -> None:
    """Move the weights of a Llama's norms into the layers behind them, which then read normalised hidden states."""
    stack, head = model.model, model.lm_head
    head.weight = nn.Parameter(head.weight.clone())  # no longer tied
    behind = [(stack.norm, [head])]
    for block in stack.layers:
        attention, mlp = block.self_attn, block.mlp
        behind.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        behind.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    for norm, layers in behind:
        for layer in layers:
            layer.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


@torch.no_grad()
def turn_stream_(model: Any, calibration: Calibration, text: Tensor, choice: str) -> None:
    """Turn the residual stream of a dense Llama by one orthogonal matrix; its logits stay (SliceGPT, arXiv 2401.15024).

    As in QuaRot (arXiv 2404.00456) what writes to the stream and what reads it absorb the matrix, so that no bytes
    are added.
    """
    fold_norms_(model)
    readers = {p.name: p.site for p in calibration.projections if p.site.endswith(("attention_input", "mlp_input"))}
    moments = second_moments(model, {site: model.get_submodule(name) for name, site in readers.items()}, text)
    turn = ROTATIONS[choice](moments)
    for layer in [model.model.embed_tokens, model.lm_head, *map(model.get_submodule, readers)]:
        layer.weight.copy_(layer.weight.double() @ turn)
    for writer in (p.name for p in calibration.projections if p.name not in readers):
        weight = model.get_submodule(writer).weight
        weight.copy_(turn.T @ weight.double())
