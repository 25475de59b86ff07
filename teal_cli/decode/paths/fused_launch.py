"""A product as one session of the fused path launches it: thresholds, tile config, and the experts that it is of."""

from dataclasses import replace

import torch
from torch import Tensor

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense, Rule
from teal_cli.decode.activations import activation_of, curve_of
from teal_cli.decode.blocks import Product
from teal_cli.decode.paths import fused_gate_first, fused_routed
from teal_cli.decode.paths.fused_experts import Routing, alternate, bias_of, stack_of
from teal_cli.decode.row_levels import RowLevels
from teal_cli.sparse import SparseLinear
from teal_kernels.experts import fitting_experts
from teal_kernels.experts import table_of as first_table
from teal_kernels.gate_first import rounded_threshold
from teal_kernels.operands import Added, AttentionPartials, Beside, Norm, Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import Curve, gemv, squares_of
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of


class Launch:
    """A product as one session runs it: thresholds, and the tile config that fits the sparsity they give.

    Args:
        product: what is launched.
        enabled: False runs it dense.
        rows: of the batch.
        dtype: of the hidden states.
        scale: of what it adds to the residual stream.
        sums: whether a layer norm follows.
        beside: of a product whose norm the next product adds to the stream.
        routing: of the block's router, where it has one.
        levels: of which each row has one (`use_levels`); by default all have the rules of the layers.
        summed: whether ranks sum what it writes; then the epilogue is the sum's, but for the weights of experts: what
            it makes is added to zeros.
    """

    def __init__(
        self,
        product: Product,
        enabled: bool,
        rows: int,
        dtype: torch.dtype,
        scale: float = 1.0,
        *,
        sums: bool = False,
        beside: Beside | None = None,
        routing: Routing | None = None,
        levels: RowLevels | None = None,
        summed: bool = False,
    ) -> None:
        self.product = product
        self.table, self.parts = table_of(product)
        self.beside = beside
        self.epilogue = product.epilogue
        self.chosen = None if routing is None else routing.of(product)
        if summed:
            self.epilogue = "plain" if self.chosen is None else "residual"
        elif product.norm is not None:
            self.epilogue = "plain" if beside is None else "beside"
        if alternate(product):
            self.epilogue = "paired"
        self.scale = scale if self.epilogue == "residual" and not summed else 1.0
        self.activation, threshold = activation_of(product)
        self.activation_threshold = rounded_threshold(threshold, dtype)
        curve = curve_of(product)
        self.curve = Curve(*curve) if curve else None
        self.bias = bias_of(product)
        of_layers = [_rules(layer, levels) if enabled else (Dense(),) for layer in product.sparse_layers]
        of_layers *= len(self.parts) // len(of_layers)  # gate and up in one layer
        chosen = levels.tuned_for if levels is not None and enabled else 0
        rules = [of_levels[chosen] for of_levels in of_layers]
        device = self.table.device
        values = [[rule.threshold for rule in of_levels] for of_levels in of_layers]
        self._of_levels = torch.tensor(values, dtype=torch.float32, device=device).T.contiguous()
        """(levels, parts)"""
        self.thresholds = self._of_levels[chosen].clone()
        """(parts,), or of each row where rows have levels of their own."""
        if levels is not None and rows > 1:
            self.thresholds = self.thresholds.expand(rows, -1).contiguous()
        self.kept = torch.zeros(3, dtype=torch.int64, device=device)
        """Inputs that were kept, for each part; added to by every launch that skips."""
        expected = [ASSUMED_ZEROS if (share := rule.expected_sparsity) is None else share for rule in rules]
        skipped = sum(share * part for share, part in zip(expected, self.parts, strict=True))
        side_by_side = in_a_row = 1
        if self.chosen is not None:  # tuned as one long product, which the tables of the chosen experts are
            side_by_side, in_a_row = self.chosen.side_by_side(self.epilogue), self.chosen.summed(self.epilogue)
        config = choose_config(
            device,
            inputs=self.table.shape[0] * in_a_row,
            parts=tuple(part * side_by_side for part in self.parts),
            dtype=kind_of(self.table),
            rows=rows if self.chosen is None else 1,
            epilogue="plain" if self.epilogue in ("activated", "paired") else product.epilogue,
            sparsity=skipped / sum(self.parts),
        )
        if self.chosen is not None:
            config = fitting_experts(config, self.table.shape[0], self.parts)
        self.config = fitting(config, self.table, rows if self.chosen is None else 1)
        count = squares_of(self.table, self.parts, self.config, rows, dtype, self.chosen)
        shape = (*([2] * sums), rows, count) if beside is None else (4, count)
        self.squares = torch.empty(shape, dtype=torch.float32, device=device)
        """Partial sums of squares of what a `residual` launch wrote, for the norm that follows; of a layer norm sums,
        too. Those of a `beside` one are `Added.sums`."""

    def use_levels(self, levels: Tensor) -> None:
        """Take the thresholds of a level for each row: (rows,) int64."""
        if len(self._of_levels) > 1:
            self.thresholds.copy_(self._of_levels[levels].view_as(self.thresholds))

    @property
    def times(self) -> int:
        """How often each of its inputs is one in a token: of experts once for each that was chosen."""
        return self.chosen.ids.shape[1] if self.chosen is not None else 1

    def run(
        self,
        x: Tensor | AttentionPartials,
        y: Tensor,
        scratch: Scratch,
        pdl: bool,
        norm: Norm | None = None,
        added: Added | None = None,
    ) -> None:
        """Launch it."""
        gemv(
            x,
            self.table,
            self.parts,
            self.thresholds,
            y,
            self.config,
            scratch,
            bias=self.bias,
            norm=norm,
            epilogue=self.epilogue,
            activation=self.activation,
            activation_threshold=self.activation_threshold,
            curve=self.curve,
            scale=self.scale,
            squares=self.squares if self.epilogue in ("residual", "beside") else None,
            added=added,
            beside=self.beside,
            counts=self.kept,
            experts=self.chosen,
            pdl=pdl,
        )


def _rules(layer: SparseLinear, levels: RowLevels | None) -> tuple[Rule, ...]:
    """Its rule, or one of each level."""
    return (layer.rule,) if levels is None else levels.of(layer)


def table_of(product: Product) -> tuple[Tensor | Packed, tuple[int, ...]]:
    """The table of a product as it is launched, and its parts: of a joined gate and up both, one beside the other.

    Of experts it is the first one's. Where gate and up alternate they are one part.
    """
    table, parts = first_table(stack_of(product)) if product.experts else product.table, product.parts
    if not product.joined or alternate(product):
        return table, parts
    parts = (parts[0] // 2,) * 2
    return replace(table, parts=parts) if isinstance(table, Packed) else table, parts


def cannot_launch(product: Product) -> str | None:
    """Why a joined product cannot be launched as gate and up, or one of an MLP that decodes gate first or is routed;
    None where it can."""
    packed = getattr(product.layers[0], "packed", None)
    if product.joined and not alternate(product) and packed is not None and product.outputs * packed.bits % 32:
        return f"codes of {product.outputs} outputs of {product.name} that end inside a word"
    return fused_gate_first.cannot_launch(product) or fused_routed.cannot_launch(product)
