"""The sparse linear layer: a drop-in `nn.Linear` that skips small inputs while decoding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.checkpoint.rules import Dense, Rule
from teal_cli.sparse.context import PassContext, decide
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.counting import SparsityCounter
from teal_cli.sparse.merged import MergedProjections
from teal_kernels import active_inputs
from teal_kernels.packing import Packed
from teal_kernels.triton_masks import is_worth_it, masked_rows

# Below this many rows MKL's float32 product rounds differently for the two weight layouts; from it
# on the results were equal bit for bit (2 to 256 rows, 12 shapes from 37x65 to 4096x14336, AVX-512).
# bfloat16 was always equal, float16 never.
_LAYOUT_EXACT_ROWS = 16


class SparseLinear(nn.Linear):
    """`nn.Linear` that skips inputs by a rule when one token a row is decoded.

    `weight` stays (out, in) with the dense model's key and values; `merged` lays it out input-major
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
        merged: MergedProjections,
        part: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.name = name
        self.control = control
        self.merged = merged
        self.part = merged.add(self, part)
        self.rule: Rule = Dense()
        self.is_planned = True
        """Whether plans name this layer. Only a quantised output layer may be without; then nothing is dropped."""
        self.is_output = False
        """Whether this is the layer of the logits."""
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device), persistent=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, name: str, control: SparsityControl, merged: MergedProjections
    ) -> "SparseLinear":
        """A sparse layer that takes over the parameters of a dense one, without a copy."""
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features, linear.out_features, has_bias, name=name, control=control, merged=merged, device="meta"
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.train(linear.training)
        layer.take_hooks_(linear)
        return layer

    def take_hooks_(self, before: nn.Module) -> None:
        """Do after each call what was done after those of the layer whose place it takes: sums over ranks, say."""
        self._forward_hooks.update(before._forward_hooks)

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
            self.merged.forget_layout()
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
        """(..., tokens, in) or, flattened, (batch * tokens, in) -> the same with out; what is skipped `decide` says."""
        control = self.control
        context = control.context or control.context_alone(x)
        rows = x.numel() // self.in_features
        decision = decide(self.rule, context, rows)
        if decision == "skip":
            if context.counter is not None:
                self._count(context.counter, x.numel(), _left_out(active_inputs(x, self.threshold)))
            return self.merged.product(self, x, context, control.backend)
        if decision == "masked":
            return self._masked(x, context, rows)
        if context.counter is not None and self.is_planned and context.may_drop(rows):
            # A projection that is left dense counts in the model's sparsity.
            seen = context.rows_that_drop(rows, *self._positions(x, context, rows), x.device)
            self._count(context.counter, seen * self.in_features, 0)
        return self._dense(x, context, context.exact or rows > context.batch)

    def _positions(self, x: Tensor, context: PassContext, rows: int) -> tuple[int, int]:
        """Positions of each row in x, and of the pass before them: an output layer may be given the last ones only."""
        tokens = x.shape[-2] if x.dim() > 2 else rows // context.batch
        return tokens, max(context.tokens - tokens, 0) if self.is_output else 0

    def _masked(self, x: Tensor, context: PassContext, rows: int) -> Tensor:
        """The plain product of x without the inputs that are skipped."""
        return F.linear(self._without_skipped(x, context, rows), self.weight, self.bias)

    def _without_skipped(self, x: Tensor, context: PassContext, rows: int) -> Tensor:
        """x with zeros for the inputs that are skipped; in training on a GPU perhaps in the dtype of the product."""
        tokens, offset = self._positions(x, context, rows)
        if is_worth_it(x):
            return self._by_kernel(x, context, rows, tokens, offset)
        active = active_inputs(x, self.threshold)
        stays = context.stays_dense(tokens, offset, x.device)
        if stays is not None:
            if x.dim() == 2:
                stays = stays.expand(context.batch, tokens, 1).reshape(rows, 1)
            active |= stays
        self._count_masked(context, rows, tokens, offset, _left_out(active))
        masked = x * active
        return x + (masked - x).detach() if self.control.straight_through else masked

    def _by_kernel(self, x: Tensor, context: PassContext, rows: int, tokens: int, offset: int) -> Tensor:
        """The same in one launch."""
        autocasts = torch.is_autocast_enabled(x.device.type)
        masked, dropped = masked_rows(
            x,
            self.threshold,
            context.start.to(x.device) if isinstance(context.start, Tensor) else context.start,
            tokens=tokens,
            offset=offset,
            dtype=torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype,
            straight_through=self.control.straight_through,
        )
        self._count_masked(context, rows, tokens, offset, dropped)
        return masked

    def _count_masked(self, context: PassContext, rows: int, tokens: int, offset: int, dropped: Tensor) -> None:
        if context.counter is not None:
            seen = context.rows_that_drop(rows, tokens, offset, dropped.device) * self.in_features
            self._count(context.counter, seen, dropped)

    def _count(self, counter: SparsityCounter, seen: int | Tensor, dropped: int | Tensor) -> None:
        """Count inputs that could be skipped, and those that are."""
        counter.add(self.name, self.in_features * self.out_features, seen, dropped)

    def kept_inputs(self, x: Tensor) -> Tensor:
        """What this layer multiplies with its weight in a masked pass; x itself in all others.

        For training: adapters beside the layer must read the same, or merging them is not exact.
        """
        context = self.control.context or self.control.context_alone(x)
        rows = x.numel() // self.in_features
        return self._without_skipped(x, context, rows) if decide(self.rule, context, rows) == "masked" else x

    def _dense(self, x: Tensor, context: PassContext, exact: bool) -> Tensor:
        """The plain product; on the CPU with the plain layer's bits where that is owed."""
        weight = self.weight
        if exact and x.device.type == "cpu" and not weight.is_contiguous():
            rows = x.numel() // x.shape[-1]
            alike = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and rows >= _LAYOUT_EXACT_ROWS)
            if not alike:
                # A transposed copy of one weight, for as long as one product takes.
                weight = weight.contiguous()
        return F.linear(x, weight, self.bias)


def _left_out(active: Tensor) -> Tensor:
    """How many inputs are not active; it stays on the device."""
    return active.numel() - active.count_nonzero()
