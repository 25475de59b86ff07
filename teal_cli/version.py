"""The version of this teal: apart from the rest, since reading it takes a third of the time of `teal --help`."""

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("teal-cli")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+uninstalled"


__version__ = _installed()
