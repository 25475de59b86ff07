"""Random launches of attention and of the product that merges its partials, and their definitions in float64."""

import math
from dataclasses import dataclass, replace

import torch
from kernel_cases import EPS, LIMITS, random_packed, relative_error, weights_of
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from teal_kernels import active_inputs, masked_input
from teal_kernels.operands import AttentionPartials, Positions, Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed
from teal_kernels.triton_attention import Heads, attention_splits, decode_attention
from teal_kernels.triton_gemv import TileConfig, gemv

# Relative norm error: float32 sums over the head size and the cache; for 16 bits the rounding of rotated
# queries and keys, of the weights of the values and of the result.
ATTENTION_LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
POSITIONS = 160
RARE = ("sinks", "alibi", "clip", "layer norms", "own layer norms", "keys as values")
"""What fewer models have of attention: `Attention.rare`."""
Position = int | tuple[int, ...]
"""Of the new token: of every row, or of each."""


def _of_rows(position: Position, rows: int) -> list[int]:
    """The position of each row."""
    return [position] * rows if isinstance(position, int) else list(position)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' rotary embedding: the halves are turned against one another."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


@dataclass
class Attention:
    """The arguments of one launch, and its definition. Cache positions that are not written hold rubbish."""

    rows: int
    kv_heads: int
    group: int
    dim: int
    position: Position
    window: int = 0
    norm: bool = False
    dtype: torch.dtype = torch.float32
    positions: int = POSITIONS
    device: str = "cpu"
    split_multiple: int = 64
    """As in `AttentionPartials`."""
    splits: int = 0
    """Splits of the cache at most; by default those that a model gets."""
    rare: tuple[str, ...] = ()
    """Of `RARE`."""
    span: int = 1
    """Rows of one sequence; what they give together is not defined here."""

    def __post_init__(self) -> None:
        self.at = _of_rows(self.position, self.rows)
        generator = torch.Generator().manual_seed(max(self.at) + 1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        parts = self.group + (1 if "keys as values" in self.rare else 2)
        self.qkv = random(self.rows, parts * self.kv_heads * self.dim)
        self.keys = random(self.rows // self.span, self.kv_heads, self.positions, self.dim)
        self.values = random(*self.keys.shape)
        angles = torch.rand(self.positions, self.dim // 2, generator=generator).to(self.device).repeat(1, 2) * 6.3
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.q_norm = random(self.dim) if self.norm else None
        self.k_norm = random(self.dim) if self.norm else None
        self.scale = 0.7 * self.dim**-0.5
        heads = self.kv_heads * self.group
        self.sinks = random(heads) * 3 if "sinks" in self.rare else None
        slopes = torch.linspace(0.02, 0.5, heads)[:, None]
        alibi = (slopes * torch.arange(self.positions)).to(self.device)
        self.alibi = alibi if "alibi" in self.rare else None
        self.v_norm = random(self.dim) if "keys as values" in self.rare else None
        self.clip = 0.9 if "clip" in self.rare else 0.0
        self.biases: tuple[Tensor, Tensor] | None = None
        if "layer norms" in self.rare:
            self.q_norm, self.k_norm, self.biases = random(self.dim), random(self.dim), (random(self.dim),) * 2
        if "own layer norms" in self.rare:
            self.q_norm, self.k_norm = random(heads * self.dim), random(self.kv_heads * self.dim)

    def _normed(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """(rows, heads, D)"""
        if weight is None:
            return x
        weight = weight.double().view(-1, self.dim)
        if self.norm:
            return rms_norm(x, (self.dim,), None, EPS) * weight
        normed = layer_norm(x, (self.dim,), None, None, EPS) * weight
        return normed if bias is None else normed + bias.double()

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64: the result (rows, heads D), and the key and value (rows, K, D) that go into the cache."""
        heads = self.kv_heads * self.group
        sizes = [count * self.dim for count in (heads, self.kv_heads, self.kv_heads)]
        if self.v_norm is not None:
            sizes.pop()
        qkv = self.qkv.clamp(-self.clip, self.clip) if self.clip else self.qkv
        q, k, *rest = (part.view(self.rows, -1, self.dim).double() for part in qkv.split(sizes, dim=1))
        v = rest[0] if self.v_norm is None else rms_norm(k, (self.dim,), self.v_norm.double(), EPS)
        q_bias, k_bias = self.biases or (None, None)
        q, k = self._normed(q, self.q_norm, q_bias), self._normed(k, self.k_norm, k_bias)
        turn = self.cos[self.at].double()[:, None], self.sin[self.at].double()[:, None]
        q, k = _rotated(q, *turn), _rotated(k, *turn)
        results = []
        for row, position in enumerate(self.at):
            lowest = max(0, position + 1 - self.window) if self.window else 0
            seen_keys, seen_values = (
                torch.cat([cache[row, :, lowest:position].double(), new[row, :, None]], dim=1).repeat_interleave(
                    self.group, dim=0
                )
                for cache, new in ((self.keys, k), (self.values, v))
            )
            scores = (seen_keys @ q[row, :, :, None])[..., 0] * self.scale  # (heads, keys)
            if self.alibi is not None:
                scores = scores + self.alibi[:, lowest : position + 1].double()
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.double()[:, None]], dim=1)
            shares = scores.softmax(1)[:, : position + 1 - lowest]
            results.append((shares[:, None] @ seen_values)[:, 0])
        return torch.stack(results).reshape(self.rows, -1), k, v

    def row(self, row: int) -> "Attention":
        """That row alone."""
        alone = replace(self, rows=1, position=self.at[row])
        alone.qkv, alone.keys, alone.values = (of[row : row + 1] for of in (self.qkv, self.keys, self.values))
        for name in ("cos", "sin", "q_norm", "k_norm", "sinks", "alibi", "biases", "v_norm"):
            setattr(alone, name, getattr(self, name))
        return alone

    def launch(self, keys: Tensor, values: Tensor, *, pdl: bool = False) -> Tensor:
        """Run the kernel on a cache that it writes to. The result is merged here, as the next product does it."""
        return merged(self.partials(keys, values, pdl=pdl)).to(self.dtype)

    def partials(self, keys: Tensor, values: Tensor, *, pdl: bool = False) -> AttentionPartials:
        """What the kernel leaves: NaN and minus infinity where it wrote nothing."""
        positions = Positions.at(self.at, self.device)
        splits = self.splits or attention_splits(self.rows * self.kv_heads)
        sizes = (self.rows, self.kv_heads * self.group, self.dim, splits)
        partials = AttentionPartials.empty(*sizes, positions, window=self.window, split_multiple=self.split_multiple)
        partials.sums.fill_(torch.nan)
        partials.logs.fill_(-torch.inf)
        decode_attention(
            self.qkv,
            keys,
            values,
            self.cos,
            self.sin,
            partials,
            scale=self.scale,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=EPS,
            heads=Heads(
                centred=self.q_norm is not None and not self.norm,
                biases=self.biases,
                clip=self.clip,
                sinks=self.sinks,
                alibi=self.alibi,
                keys_as_values=self.v_norm is not None,
                v_norm=self.v_norm,
            ),
            span=self.span,
            pdl=pdl,
        )
        assert positions.own.tolist() == self.at
        return partials

    def check(self, *, pdl: bool = False) -> None:
        """One launch against float64; nothing but each row's new position of the cache is written."""
        limit = ATTENTION_LIMITS[self.dtype]
        expected, k, v = self.expected()
        keys, values = self.keys.clone(), self.values.clone()
        out = self.launch(keys, values, pdl=pdl)
        assert float((out.double() - expected).norm() / expected.norm()) < limit
        for row, here in enumerate(self.at):
            assert float((keys[row, :, here].double() - k[row]).norm() / k[row].norm()) < limit
            if self.v_norm is None:
                assert torch.equal(values[row, :, here].double(), v[row])
            else:
                assert relative_error(values[row, :, here], v[row]) < limit
            keys[row, :, here], values[row, :, here] = self.keys[row, :, here], self.values[row, :, here]
        assert torch.equal(keys, self.keys)  # nowhere else
        assert torch.equal(values, self.values)


def merged(partials: AttentionPartials) -> Tensor:
    """(rows, heads D) float32: what the partials that were written (whose logarithm is finite, or NaN) stand for."""
    shares = (partials.logs * math.log(2)).softmax(0)[..., None]
    sums = partials.sums.view(*partials.logs.shape, -1)
    return torch.where(shares == 0, 0.0, shares * sums).sum(0).flatten(1)


@dataclass
class PartialsCase:
    """A product of what attention left, at positions where those are several."""

    rows: int
    heads: int
    dim: int
    position: Position
    split_multiple: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    outputs: int = 72
    packed: tuple[int, int, bool] | None = None
    """As in `random_case`."""
    splits: int = 16
    """Of the cache at most."""
    window: int = 0
    """As in `AttentionPartials`."""

    def __post_init__(self) -> None:
        at = _of_rows(self.position, self.rows)
        generator = torch.Generator().manual_seed(max(at))

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device)

        positions = Positions.at(at, self.device)
        sizes = (self.rows, self.heads, self.dim, self.splits)
        self.read = AttentionPartials.empty(*sizes, positions, window=self.window, split_multiple=self.split_multiple)
        seen = [min(position + 1, self.window or position + 1) for position in at]
        written = [-(-length // self.split_multiple) for length in seen]
        assert max(written) <= self.splits
        sums = random(max(written), *self.read.sums.shape[1:])
        logs = random(max(written), *self.read.logs.shape[1:]) * 3
        # What an earlier token left beyond the longest row's must not be seen; beyond a row's own nothing weighs.
        self.read.sums.fill_(torch.nan)
        self.read.logs.fill_(torch.nan)
        self.read.sums[: max(written)], self.read.logs[: max(written)] = 0.0, -torch.inf
        for row, count in enumerate(written):
            self.read.sums[:count, row], self.read.logs[:count, row] = sums[:count, row], logs[:count, row]
            logs[count:, row] = -torch.inf
        self.x = merged(replace(self.read, sums=sums, logs=logs)).to(self.dtype)
        inputs = self.heads * self.dim
        self.table: Tensor | Packed = random(inputs, self.outputs).to(self.dtype)
        if self.packed is not None:
            self.table = random_packed(inputs, (self.outputs,), *self.packed, device=self.device)

    def all_at(self, row: int) -> "PartialsCase":
        """All rows as long as that one is."""
        same = replace(self)
        count = int(self.read.logs[:, row, 0].isfinite().sum())
        fill = [of.nan_to_num(0.0, 0.0, 0.0) for of in (self.read.sums, self.read.logs)]
        for of in fill:
            of[count:] = torch.nan
        positions = Positions.at(self.read.positions.own[row].repeat(self.rows).tolist(), self.device)
        same.read, same.table = replace(self.read, sums=fill[0], logs=fill[1], positions=positions), self.table
        return same

    def launch(
        self, tuned: TileConfig, threshold: Tensor, counts: Tensor | None = None, *, pdl: bool = False
    ) -> Tensor:
        """Run the kernel: (rows, outputs)."""
        y = torch.full((self.rows, self.outputs), torch.nan, dtype=self.dtype, device=self.device)
        config = fitting(tuned, self.table, self.rows)
        gemv(self.read, self.table, (self.outputs,), threshold, y, config, Scratch(y.device), counts=counts, pdl=pdl)
        return y

    def check(self, tuned: TileConfig, *, pdl: bool = False) -> None:
        """Against float64, at a threshold that no input is near."""
        sizes = self.x.abs().flatten().float().sort().values
        middle = sizes[sizes.numel() // 3 : sizes.numel() // 2]
        gap = int(middle.diff().argmax())
        threshold = torch.full((1,), float(middle[gap] + middle[gap + 1]) / 2, device=self.device)
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        y = self.launch(tuned, threshold, counts, pdl=pdl)
        seen = self.x if tuned.dense else masked_input(self.x, threshold)
        assert relative_error(y, seen.double() @ weights_of(self.table)) < 2 * LIMITS[self.dtype]
        assert int(counts[0]) == (0 if tuned.dense else int(active_inputs(self.x, threshold).sum()))
