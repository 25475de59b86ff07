"""Gate first: the `up` product of a gated MLP, computed for the live neurons only.

In a model that was trained to be sparse most neurons of an MLP are exactly zero once the gate's
activation is known (ReLU; FATReLU, arXiv 2402.13516; dReLU, arXiv 2406.05955; squared ReLU). So the
gate product is computed densely, and of `up_proj`, whose rows are the neurons, only the rows of the
live ones are read. What is left out is multiplied with zero: the result is that of the dense
product, except that an infinity or a NaN which meets such a zero does not show.

Here is the definition in plain torch, the CPU's version, and the choice; `triton_gate_first` is the GPU's.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_kernels.ops import resolve_backend
from teal_kernels.triton_gate_first import GateLayer, triton_gate_first

Kind = Literal["relu", "fatrelu", "relu2", "drelu"]

# Rows of a chunk are copied and multiplied while they lie in the caches. 4096 x 11008 in float32, 89 % dead, two
# quiet Zen 4 cores: 1.27 ms with chunks of 1 MiB, 1.25 with 2, 1.47 with 4, 2.19 in one piece, and 0.95 without copies
# (`_sampled_products`). Where others use the cores too, every call waits for a thread that does not run: 272, 152, 74
# and 32 ms with 1, 2, 4 and 16 MiB.
_CHUNK_BYTES = 1 << 22
# oneDNN makes code for every number of rows that it meets: 0.6 ms for a bfloat16 product that then takes 0.13.
_ROWS_ALIKE = 32


@dataclass(frozen=True)
class GateActivation:
    """How the gate decides, and what it is multiplied with.

    relu: max(g, 0); fatrelu: g where g >= threshold, else 0; relu2: max(g, 0) squared; drelu: max(g, 0),
    times max(up, 0) in place of up. The threshold is rounded to the dtype of the gate.
    """

    kind: Kind
    threshold: float = 0.0

    def live(self, gate: Tensor) -> Tensor:
        """Which neurons are not zero, bool of gate's shape. NaN is live: it must show."""
        if self.kind == "fatrelu":
            return (gate < rounded_threshold(self.threshold, gate.dtype)).logical_not_()
        return (gate <= 0).logical_not_()

    def of_gate(self, gate: Tensor) -> Tensor:
        """The activation itself, in gate's dtype."""
        if self.kind == "fatrelu":
            return torch.where(self.live(gate), gate, torch.zeros((), dtype=gate.dtype, device=gate.device))
        positive = F.relu(gate)
        return positive.square() if self.kind == "relu2" else positive

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        """What `down_proj` reads: the activated gate times up, as the dense model has it."""
        return self.of_gate(gate) * (F.relu(up) if self.kind == "drelu" else up)


@lru_cache(maxsize=64)
def rounded_threshold(threshold: float, dtype: torch.dtype) -> float:
    """The threshold as a value of the dtype, so that every backend compares with the same number."""
    return float(torch.tensor(threshold, dtype=dtype))


def reference_gate_first(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, activation: GateActivation
) -> Tensor:
    """The meaning of `gate_first`, at dense cost; arguments and result are the same."""
    hidden = activation.hidden(gate, F.linear(x, weight, bias))
    return torch.where(activation.live(gate), hidden, torch.zeros((), dtype=x.dtype, device=x.device))


def cpu_gate_first(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, activation: GateActivation) -> Tensor:
    """On the CPU: reads the rows of the neurons that live for any token. Deterministic for a given thread count."""
    n_out, n_in = weight.shape
    inputs, gates = x.reshape(-1, n_in), gate.reshape(-1, n_out)
    live = activation.live(gates)
    index = (live if live.shape[0] == 1 else live.any(0, keepdim=True)).view(-1).nonzero().view(-1)
    hidden = gates.new_zeros(gates.shape)
    if index.shape[0]:
        if inputs.shape[0] == 1 and weight.dtype == torch.float32:
            up = _sampled_products(inputs, weight, live, index.shape[0])
        else:
            up = gathered_products(inputs, weight, index)
        if bias is not None:
            up = up + bias.index_select(0, index)
        product = activation.hidden(gates.index_select(1, index), up)
        if gates.shape[0] > 1:  # dead for this token, live for another: up may be infinite
            product = torch.where(live.index_select(1, index), product, product.new_zeros(()))
        hidden.index_copy_(1, index, product)
    return hidden.view(gate.shape)


def _sampled_products(x: Tensor, weight: Tensor, live: Tensor, count: int) -> Tensor:
    """(1, in), (out, in), (1, out) bool with `count` live ones -> (1, live): each live row times x, where it lies.

    torch has this as a product of which a sparse result asks for some entries only, in float32.
    """
    _announce_csr()
    rows = F.pad(live.view(-1).cumsum(0, dtype=torch.int32), (1, 0))
    wanted = torch.sparse_csr_tensor(
        rows, rows.new_zeros(count), x.new_zeros(count), (weight.shape[0], 1), check_invariants=False
    )
    products: Tensor = torch.sparse.sampled_addmm(wanted, weight, x.t(), beta=0.0).values()
    return products.view(1, count)


@lru_cache(maxsize=1)
def _announce_csr() -> None:
    """torch warns once a process that this layout is in beta; here it never leaves a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def gathered_products(inputs: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(rows, in), (out, in), (live,) -> (rows, live): the live rows of the weight are copied, a chunk at a time."""
    count = index.shape[0]
    rows = _ROWS_ALIKE * max(1, _CHUNK_BYTES // (inputs.shape[1] * weight.itemsize * _ROWS_ALIKE))
    chunks = F.pad(index, (0, -count % _ROWS_ALIKE)).split(rows)
    return torch.cat([F.linear(inputs, weight.index_select(0, chunk)) for chunk in chunks], dim=1)[:, :count]


def _gate_first(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind, threshold: float, backend: str
) -> Tensor:
    activation = GateActivation(kind, threshold)
    name = resolve_backend(backend, x.device, x.dtype)
    if name == "cpu":
        return cpu_gate_first(x, gate, weight, bias, activation)
    if name == "triton":
        rounded = rounded_threshold(threshold, gate.dtype)
        return triton_gate_first(x, gate, weight, bias, kind=kind, threshold=rounded)
    return reference_gate_first(x, gate, weight, bias, activation)


def _gated_hidden(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: Kind,
    threshold: float,
    backend: str,
) -> Tensor:
    if resolve_backend(backend, x.device, x.dtype) == "triton":
        rounded = rounded_threshold(threshold, x.dtype)
        return triton_gate_first(x, GateLayer(gate_weight, gate_bias), weight, bias, kind=kind, threshold=rounded)
    return _gate_first(x, F.linear(x, gate_weight, gate_bias), weight, bias, kind, threshold, backend)


_library = torch.library.Library("teal", "FRAGMENT")
_ACTIVATION = "str kind, float threshold, str backend"
_library.define(f"gate_first(Tensor x, Tensor gate, Tensor weight, Tensor? bias, {_ACTIVATION}) -> Tensor")
_library.define(
    "gated_hidden(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor weight, Tensor? bias, "
    f"{_ACTIVATION}) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _library.impl("gate_first", _gate_first, _device)
    _library.impl("gated_hidden", _gated_hidden, _device)


@torch.library.register_fake("teal::gate_first", lib=_library)
def _(x: Tensor, gate: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(gate)


@torch.library.register_fake("teal::gated_hidden", lib=_library)
def _(x: Tensor, gate_weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate_weight.shape[0]))


def gate_first(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: GateActivation,
    backend: str = "auto",
) -> Tensor:
    """The hidden state of a gated MLP from its gate product, without reading the rows of dead neurons.

    Args:
        x: (..., in), what gate_proj and up_proj read; each leading index is one token.
        gate: (..., out), the gate product, before its activation.
        weight: (out, in) of up_proj, row-major, the dtype of x.
        bias: (out,) of up_proj, or None.
        activation: how the gate decides.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (..., out), the dtype of x: activation(gate) times up, zero where the gate is dead.

    Raises:
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    if type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling():  # as in `ops`
        return _gate_first(x, gate, weight, bias, activation.kind, activation.threshold, backend)
    y: Tensor = torch.ops.teal.gate_first.default(x, gate, weight, bias, activation.kind, activation.threshold, backend)
    return y


def gated_hidden(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: GateActivation,
    backend: str = "auto",
) -> Tensor:
    """As `gate_first`, with the gate product computed on the way: on a GPU in the same launch.

    Args:
        x: (..., in), what gate_proj and up_proj read.
        gate_weight: (out, in) of gate_proj, row-major, the dtype of x.
        gate_bias: (out,) of gate_proj, or None.
        weight: (out, in) of up_proj, row-major, the dtype of x.
        bias: (out,) of up_proj, or None.
        activation: how the gate decides.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (..., out), the dtype of x.

    Raises:
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    y: Tensor = torch.ops.teal.gated_hidden.default(
        x, gate_weight, gate_bias, weight, bias, activation.kind, activation.threshold, backend
    )
    return y
