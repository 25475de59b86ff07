"""Wheels: with the library for one platform, without a compiler for all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

_ROOT = Path(__file__).parents[2]
_BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with teal_kernels alone, and a library that is compiled in no time."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, tmp_path)
    package = tmp_path / "kernels" / "teal_kernels"
    shutil.copytree(_ROOT / "kernels" / "teal_kernels", package, ignore=shutil.ignore_patterns("lib", "src", "*.pyc"))
    sources = package / "native" / "src"
    sources.mkdir()
    (sources / "variant.c").write_text("typedef int nothing;\n")
    (sources / "some.h").write_text("")
    return tmp_path


def _wheel(project: Path, **environment: str) -> tuple[str, list[str], str]:
    """Name of the wheel, its files of the native package, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD],
        cwd=project,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name = done.stdout.split()[-1]
    files = ZipFile(project / "out" / name).namelist()
    return name, [file for file in files if "native/" in file and not file.endswith(".py")], done.stdout


def test_a_wheel_with_and_without_a_compiler(project: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = ["teal_kernels/native/src/some.h", "teal_kernels/native/src/variant.c"]
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        name, files, said = _wheel(project)
        assert name.split("-")[2:4] == ["py3", "none"]
        assert "any" not in name
        (library,) = (file for file in files if "/lib/" in file and not file.endswith(".json"))
        assert library.startswith("teal_kernels/native/lib/libteal_native.")
        assert set(source) < set(files)
        with ZipFile(project / "out" / name) as wheel:
            record = json.loads(wheel.read(f"{library}.json"))
            assert record["sha256"] == hashlib.sha256(wheel.read(library)).hexdigest()
        assert "no native CPU library" not in said
    # What an earlier build left is not taken for this one's.
    name, files, said = _wheel(project, CC="no-such-compiler", PATH=str(project))
    assert name.endswith("-py3-none-any.whl")
    assert [file for file in files if not file.endswith(".md")] == source
    assert said.count("the wheel has no native CPU library") == 1
