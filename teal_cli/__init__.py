"""teal: faster decoding of language models by training-free activation sparsity.

Importing this package is cheap on purpose: neither torch nor transformers is loaded here. Import
`teal_cli.hf` to let transformers load TEAL checkpoints.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("teal-cli")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+uninstalled"

__all__ = ["__version__"]
