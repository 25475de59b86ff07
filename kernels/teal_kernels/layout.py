"""Weight layout. A skipped input saves memory traffic only if its weights lie side by side.

`torch.nn.Linear` holds (out, in) row by row, where the weights of one input are strided. The
sparse kernels want them *input-major*: the same (out, in) tensor with strides (1, out), so shapes,
names and state dicts stay what transformers expects and only the order in memory changes.
"""

from torch import Tensor


def is_input_major(weight: Tensor) -> bool:
    """True where the weights of one input are contiguous: weight is (out, in) with strides (1, out)."""
    return weight.dim() == 2 and weight.t().is_contiguous()


def input_major(weight: Tensor) -> Tensor:
    """The same (out, in) values, input-major; no copy where they already are."""
    return weight if is_input_major(weight) else weight.t().contiguous().t()
