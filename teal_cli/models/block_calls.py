"""A model's decoder blocks, one at a time: what each was called with, and calling it again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states, whatever else it returns: a tensor, or a tuple or list (GPT-1) that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class BlockCall(NamedTuple):
    """Arguments of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """(batch, tokens, hidden): what it reads."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def without_hidden(self) -> "BlockCall":
        """The same call, which holds no hidden states; `on` gives it others."""
        if self.args:
            return BlockCall((None, *self.args[1:]), self.kwargs)
        return BlockCall((), {key: value for key, value in self.kwargs.items() if key != "hidden_states"})

    def on(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states for other inputs, all else as it was."""
        if self.args:
            return hidden_of(block(hidden, *self.args[1:], **self.kwargs))
        return hidden_of(block(**self.kwargs | {"hidden_states": hidden}))


@contextmanager
def recorded(blocks: Iterable[nn.Module]) -> Iterator[list[BlockCall]]:
    """Every block's call inside the context, in order."""
    calls: list[BlockCall] = []

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall(args, kwargs))

    with hooked([block.register_forward_pre_hook(called, with_kwargs=True) for block in blocks]):
        yield calls
