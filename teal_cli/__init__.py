"""teal: faster decoding of language models by training-free activation sparsity.

Importing this package is cheap on purpose: neither torch nor transformers is loaded here, but by the
first use of a function (`teal_cli.api`). Import `teal_cli.hf` to let transformers load TEAL checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teal_cli.api import adapt_model, calibrate, evaluate, export, generate, load

    __version__: str

__all__ = ["__version__", "adapt_model", "calibrate", "evaluate", "export", "generate", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("teal_cli.version").__version__
    if name in __all__:
        return getattr(import_module("teal_cli.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
