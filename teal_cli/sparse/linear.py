"""The sparse linear layer: a drop-in `nn.Linear` that skips small inputs while decoding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.checkpoint.rules import Dense, Rule
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.site import Site
from teal_kernels import active_inputs
from teal_kernels.packing import Packed

# Below this many rows MKL's float32 product rounds differently for the two weight layouts; from it
# on the results were equal bit for bit (2 to 256 rows, 12 shapes from 37x65 to 4096x14336, AVX-512).
# bfloat16 was always equal, float16 never.
_LAYOUT_EXACT_ROWS = 16


class SparseLinear(nn.Linear):
    """`nn.Linear` whose inputs below a threshold are dropped when one token a row is decoded.

    `weight` stays (out, in) with the dense model's key and values; its site lays it out input-major
    in memory. `threshold` is a 0-d float32 buffer that is not saved: it lives in the
    checkpoint's configuration. A layer whose rule is `Dense` is an ordinary linear layer.
    """

    threshold: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        name: str,
        control: SparsityControl,
        site: Site,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.name = name
        self.control = control
        self.site = site
        self.number = site.add(self)
        self.rule: Rule = Dense()
        self.is_planned = True
        """Whether plans name this layer. Only a quantised output layer may be without; then nothing is dropped."""
        self.is_output = False
        """Whether this is the layer of the logits."""
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, control: SparsityControl, site: Site) -> "SparseLinear":
        """A sparse layer that takes over the parameters of a dense one, without a copy."""
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features, linear.out_features, has_bias, name=name, control=control, site=site, device="meta"
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.train(linear.training)
        return layer

    @property
    def packed(self) -> Packed | None:
        """Codes in place of weights, where this layer is quantised."""
        return None

    def hold_(self, words: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        """Of a quantised layer: hold these codes, parts of a table, in place of its own."""
        raise TypeError(f"{self.name} is not quantised")

    @property
    def stays_as_it_is(self) -> bool:
        """Whether its weights need no other layout: an output layer that drops nothing and is not quantised."""
        return self.is_output and isinstance(self.rule, Dense) and self.packed is None

    @property
    def storage(self) -> Tensor:
        """What the weights are held in."""
        return self.weight

    def set_rule_(self, rule: Rule) -> None:
        """Skip inputs by this rule; the threshold goes to the device of the weight."""
        self.rule = rule
        self.threshold = torch.tensor(rule.threshold, dtype=torch.float32, device=self.storage.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        before = self.storage.data_ptr()
        super()._apply(fn, recurse)
        if self.storage.data_ptr() != before:
            self.site.forget_layout()
        if not self.storage.is_meta:
            self.set_rule_(self.rule)  # a cast of the model must not round the threshold
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As a dense layer saves: row-major tensors that share no storage."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    def extra_repr(self) -> str:
        """Shape and rule, for `print(model)`."""
        return f"{super().extra_repr()}, rule={self.rule}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, in) -> (..., tokens, out); which tokens run sparse is `SparsityControl`'s say."""
        control = self.control
        if control.flattens:
            if x.dim() == 2:
                return self.forward(x.view(*control.shape, x.shape[-1])).flatten(0, 1)
            control.shape = tuple(x.shape[:2])
        tokens = x.shape[-2] if x.dim() > 1 else 1
        before = 0  # positions of this pass that are not in x
        if control.output is not None:
            if self.is_output:
                before = max(control.positions - tokens, 0)
            else:
                control.positions = tokens
        several = before + tokens > 1
        mode = "masked" if control.encodes and control.mode == "auto" else control.mode
        if not control.enabled or mode == "dense" or (mode == "auto" and several):
            return self._dense(x, several)
        masked = mode == "masked"
        prefix = max(control.dense_prefix - before, 0) if masked else 0
        counter = control.counter if control.counter is not None and control.counter.active else None
        if isinstance(self.rule, Dense):
            if (
                counter is not None and self.is_planned
            ):  # a projection that is left dense counts in the model's sparsity
                counter.add(
                    self.name, self.in_features * self.out_features, x.numel() // tokens * max(tokens - prefix, 0), 0
                )
            return self._dense(x, several)
        if counter is not None or masked:
            active = active_inputs(x, self.threshold)
            if counter is not None:
                counted = active[..., prefix:, :] if prefix else active
                dropped = counted.numel() - counted.count_nonzero()
                counter.add(self.name, self.in_features * self.out_features, counted.numel(), dropped)
            if masked:
                active[..., :prefix, :] = True
                return F.linear(x * active, self.weight, self.bias)
        return self.site.product(self.number, x, control.backend)

    def _dense(self, x: Tensor, several: bool) -> Tensor:
        """The plain product, with the plain layer's bits when it is a prefill (of several tokens) on the CPU."""
        weight = self.weight
        if x.device.type == "cpu" and (several or self.control.mode == "dense") and not weight.is_contiguous():
            rows = x.numel() // x.shape[-1]
            exact = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and rows >= _LAYOUT_EXACT_ROWS)
            if not exact:
                # A transposed copy of one weight, for as long as one product takes.
                weight = weight.contiguous()
        return F.linear(x, weight, self.bias)
