"""Random launches of the kernels and their definitions in float64, for the interpreter and for a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from teal_kernels import active_inputs, masked_input
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed, dequantised, pack, side_by_side
from teal_kernels.triton_decode import Best, output_logits, pick
from teal_kernels.triton_gemv import EMPTY, TileConfig, gemv, squares_of

# Relative norm error of products: float32 sums of forty terms, and up to three roundings to the 16-bit dtype.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
EPS = 1e-5
INPUTS = 44
# No size is a multiple of a block: one that went on over the border would use the next part's threshold.
PARTS = {"plain": (19, 9, 5), "residual": (21,), "gated": (18, 18)}
SPARSITIES = {"plain": (0.3, 0.5, 0.7), "residual": (0.5,), "gated": (0.4, 0.6)}
GUARD = 64
SENTINEL = 7.0
PDL = torch.cuda.is_available() and hopper_or_later(torch.device("cuda"))


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Of norms; absolute where zero is expected."""
    size = float(expected.norm())
    return float((y.double() - expected).norm()) / (size if size > 0 else 1.0)


def weights_of(table: Tensor | Packed) -> Tensor:
    """(in, out), in float64."""
    return dequantised(table, torch.float64) if isinstance(table, Packed) else table.double()


@dataclass
class Case:
    """The arguments of one launch, and its definition."""

    epilogue: str
    parts: tuple[int, ...]
    x: Tensor
    table: Tensor | Packed
    thresholds: Tensor
    before: Tensor
    """What y holds before the launch; `residual` adds to it."""
    bias: Tensor | None
    norm: Norm | None

    @property
    def seen(self) -> Tensor:
        """(rows, in): what the thresholds are compared with, in x's dtype."""
        if self.norm is None:
            return self.x
        scale = torch.rsqrt(self.norm.squares.sum(1, keepdim=True) / self.x.shape[1] + self.norm.eps)
        return (self.x.float() * scale).to(self.x.dtype) * self.norm.weight

    @property
    def kept(self) -> list[int]:
        """Inputs above each part's threshold, over all rows."""
        return [int(active_inputs(self.seen, threshold).sum()) for threshold in self.of_parts]

    @property
    def of_parts(self) -> Tensor:
        """(parts,) thresholds, or (parts, rows, 1) of each row."""
        return self.thresholds if self.thresholds.dim() == 1 else self.thresholds.T.unsqueeze(-1)

    def expected(self) -> Tensor:
        """The result in float64."""
        columns = [
            masked_input(self.seen, threshold).double() @ weights
            for weights, threshold in zip(weights_of(self.table).split(self.parts, dim=1), self.of_parts, strict=True)
        ]
        y = torch.cat(columns, dim=1)
        if self.bias is not None:
            y = y + self.bias.double()
        if self.epilogue == "gated":
            y = silu(y[:, : self.parts[0]]) * y[:, self.parts[0] :]
        return y + self.before.double() if self.epilogue == "residual" else y

    def launch(
        self, config: TileConfig, scratch: Scratch | None = None, counts: Tensor | None = None, *, pdl: bool = False
    ) -> "Result":
        """Run the kernel; what lies around its outputs must stay as it was."""
        scratch = scratch or Scratch(self.x.device)
        rows = self.x.shape[0]
        config = fitting(config, self.table, rows)
        y = _guarded(self.before)
        columns = squares_of(self.table, self.parts, config, rows, self.x.dtype)
        squares = _guarded(torch.zeros(rows, columns, device=self.x.device))
        gemv(
            self.x,
            self.table,
            self.parts,
            self.thresholds,
            y,
            config,
            scratch,
            bias=self.bias,
            norm=self.norm,
            epilogue=self.epilogue,
            squares=squares if self.epilogue == "residual" else None,
            counts=counts,
            pdl=pdl,
        )
        _assert_guard(y)
        _assert_guard(squares)
        assert bool((scratch.tensor("partial", 1, torch.int32, EMPTY) == EMPTY).all())
        return Result(y, squares)


@dataclass
class Result:
    y: Tensor
    squares: Tensor


def _guarded(values: Tensor) -> Tensor:
    """A contiguous copy with a margin of sentinels before and after it."""
    margin = torch.full((GUARD,), SENTINEL, dtype=values.dtype, device=values.device)
    buffer = torch.cat([margin, values.flatten(), margin])
    return buffer[GUARD : GUARD + values.numel()].view(values.shape)


def _assert_guard(values: Tensor) -> None:
    buffer = torch.empty(0, dtype=values.dtype, device=values.device).set_(values.untyped_storage())
    assert bool((buffer[:GUARD] == SENTINEL).all())
    assert bool((buffer[-GUARD:] == SENTINEL).all())


def random_case(
    epilogue: str,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    norm: bool = True,
    listed: bool = True,
    inputs: int = INPUTS,
    parts: tuple[int, ...] | None = None,
    seed: int = 0,
    sparsity: float | None = None,
    packed: tuple[int, int, bool] | None = None,
    device: str = "cpu",
) -> Case:
    """A random launch; thresholds below zero where nothing is to be dropped.

    Each part has a sparsity of its own, or all have the one that is given. Weights are in x's dtype, or quantised
    to so many bits in groups of so many inputs, with zero points or without.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = parts or PARTS[epilogue]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    total = sum(parts)
    x = random(rows, inputs)
    squares = torch.stack([chunk.float().square().sum(1) for chunk in x.split(16, dim=1)], dim=1)
    case = Case(
        epilogue,
        parts,
        x,
        table=random(inputs, total) if packed is None else random_packed(inputs, parts, *packed, device=device),
        thresholds=torch.full((len(parts),), -1.0, device=device),
        before=random(rows, parts[0] if epilogue == "gated" else total),
        bias=random(total) if bias else None,
        norm=Norm(random(inputs), EPS, squares) if norm else None,
    )
    if listed:
        magnitudes = case.seen.abs().float()
        shares = SPARSITIES[epilogue][: len(parts)] if sparsity is None else (sparsity,) * len(parts)
        case.thresholds = torch.stack([magnitudes.quantile(share) for share in shares])
    return case


@dataclass
class Output:
    """What the last norm and the output layer read."""

    hidden: Tensor
    norm: Norm
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def random(
        cls,
        rows: int,
        hidden_size: int,
        vocabulary: int,
        *,
        bias: bool,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "Output":
        generator = torch.Generator().manual_seed(rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        hidden = random(rows, hidden_size)
        squares = torch.stack([chunk.float().square().sum(1) for chunk in hidden.split(24, dim=1)], dim=1)
        norm = Norm(random(hidden_size), EPS, squares)
        weight = random(vocabulary, hidden_size)
        return cls(hidden, norm, weight, random(vocabulary) if bias else None)

    def launch(self) -> tuple[Tensor, Tensor]:
        """Logits (rows, vocabulary) and the greedy tokens (rows,)."""
        logits, token, _ = self.launch_and_check()
        return logits, token

    def launch_and_check(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and (rows,) int64: 1 where the token was chosen among numbers."""
        rows, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        logits = torch.full_like(self.hidden[:, :1], torch.nan).repeat(1, vocabulary)
        best = Best.empty(rows, vocabulary, logits.device)
        token = torch.full((rows,), -1, device=logits.device)
        output_logits(self.hidden, self.norm, self.weight, self.bias, logits, best)
        read = torch.full((rows, 2), -1, device=logits.device)
        pick(best, token, read)
        assert torch.equal(read[:, 0], token)
        return logits, token, read[:, 1]


def random_packed(
    inputs: int, parts: tuple[int, ...], bits: int, group: int, zeros: bool, *, seed: int = 0, device: str = "cpu"
) -> Packed:
    """Quantised weights of projections side by side: any codes and zero points, scales between 0.1 and 1.1."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8).to(device)

    groups = -(-inputs // group)

    def fractions(part: int) -> Tensor:
        return torch.rand(groups, part, generator=generator)

    return side_by_side(
        [
            pack(
                codes(inputs, part),
                (fractions(part) + 0.1).to(device),
                (fractions(part) * (1 << bits)).half().to(device) if zeros else None,
                bits=bits,
                group=group,
            )
            for part in parts
        ]
    )
