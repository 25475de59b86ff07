"""Builds the native CPU library into wheels; all else is in pyproject.toml.

A wheel with the library runs on one platform and on every Python. TEAL_NATIVE_TARGET=aarch64-linux-gnu.2.17, or another
target of native/build.py, makes the wheel for that platform, with Zig.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "kernels" / "teal_kernels" / "native"))
import build as native

_TARGET = os.environ.get("TEAL_NATIVE_TARGET")


class BuildWithLibrary(build_py):
    """Compiles the library beside the package's files."""

    has_library = False

    def run(self) -> None:
        """As build_py; an editable install gets its library from `make setup`."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "teal_kernels", "native", native.FOLDER.name)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build for another platform
        try:
            native.build(target=_TARGET, out=folder)
        except native.BuildError as error:
            if _TARGET:
                raise
            print(f"teal: the wheel has no native CPU library, so decoding on a CPU takes PyTorch's path: {error}")
        else:
            self.has_library = True


class WheelOfOnePlatform(bdist_wheel):
    """Names the platform where the wheel has the library."""

    def run(self) -> None:
        """As bdist_wheel; whether the library comes out is known after the build."""
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_py").has_library
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The library needs no particular Python."""
        tag = super().get_tag()
        if self.root_is_pure:
            return tag
        return "py3", "none", native.target_of(_TARGET).wheel_tag if _TARGET else tag[2]


setup(
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfOnePlatform},
    setup_requires=["ziglang>=0.17,<0.18"] if _TARGET else [],
)
