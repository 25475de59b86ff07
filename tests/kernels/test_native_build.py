"""Building the native library: which compiler, what is built again, what is left when it fails."""

import ctypes
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from teal_kernels.native import build

_ABI = '#include <stdint.h>\n__attribute__((visibility("default"))) int32_t teal_abi(void) { return %d; }\n'
_VARIANT = """
#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
int NAMED(variant_, TEAL_VARIANT)(void) { return 1; }
"""
_CALL = """
#ifdef TEAL_HAS_%s
int variant_%s(void);
int call_%s(void) { return variant_%s(); }
#endif
"""

needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Little ones: a variant each says its name, and what is compiled once needs them all."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "variant.c").write_text(_VARIANT)
    calls = "".join(_CALL % (name.upper(), name, name, name) for name in ("avx512", "avx2", "neon", "baseline"))
    (folder / "dispatch.c").write_text(_ABI % 1 + calls)
    return folder


@needs_a_compiler
def test_what_is_built_is_not_built_again(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "lib"
    library, new = build.build(out=out, sources=sources)
    assert new
    assert sorted(path.name for path in out.iterdir()) == [library.name, f"{library.name}.json"]
    assert build.build(out=out, sources=sources) == (library, False)
    assert build.build(out=out, sources=sources, extra=["-DOTHER"]) == (library, True)
    (sources / "more.h").write_text("")
    assert build.build(out=out, sources=sources, extra=["-DOTHER"]) == (library, True)
    library.unlink()
    assert build.build(out=out, sources=sources, extra=["-DOTHER"]) == (library, True)
    record = build.record_of(library)
    assert set(json.loads(record.read_text())["variants"]) == set(build.target_of(None).variants)
    record.write_text("{")
    assert build.build(out=out, sources=sources, extra=["-DOTHER"]) == (library, True)
    library.write_bytes(library.read_bytes()[:1000])
    assert build.build(out=out, sources=sources, extra=["-DOTHER"]) == (library, True)


@needs_a_compiler
@pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
def test_a_record_knows_its_library(record: str | None, sources: Path, tmp_path: Path) -> None:
    library, _ = build.build(out=tmp_path / "lib", sources=sources)
    assert build.is_as_built(library)
    whole = library.read_bytes()
    for other in (whole[: len(whole) // 2], whole + b"\0", b""):
        library.write_bytes(other)
        assert not build.is_as_built(library)
    library.write_bytes(whole)
    assert build.is_as_built(library)
    if record is None:
        build.record_of(library).unlink()
    else:
        build.record_of(library).write_text(record)
    assert not build.is_as_built(library)


@needs_a_compiler
def test_a_library_survives_a_build_that_fails(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lib"
    library, _ = build.build(out=out, sources=sources)
    before = library.read_bytes()
    (sources / "dispatch.c").write_text("this is no C\n")
    with pytest.raises(build.BuildError, match="the C compiler refused"):
        build.build(out=out, sources=sources)
    assert library.read_bytes() == before
    assert len(list(out.iterdir())) == 2
    assert "dispatch.c" in capfd.readouterr().err


@needs_a_compiler
def test_the_sources_have_no_warnings(tmp_path: Path) -> None:
    """In any variant of this machine. Optimising takes a minute and warns of nothing more."""
    build.build(out=tmp_path, extra=["-O0", "-Werror"])


def test_set_up_needs_python_alone(tmp_path: Path) -> None:
    """It comes before torch is installed."""
    command = [sys.executable, "-I", "-S", build.__file__, "--compiler", "/no/such/cc", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("teal_native: no C compiler '/no/such/cc': ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not find_spec("ziglang"), reason="needs ziglang")
def test_zig_builds_for_another_machine(sources: Path, tmp_path: Path) -> None:
    library, _ = build.build(target="aarch64-linux-gnu.2.17", out=tmp_path / "arm", sources=sources)
    header = library.read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
    library, _ = build.build("zig", out=tmp_path / "here", sources=sources)
    assert ctypes.CDLL(str(library)).teal_abi() == 1


def test_which_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(name: str) -> None:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=r"no C compiler \(cc, gcc, clang\).*pip install ziglang"):
        build.find_compiler()
    assert build.main([]) == 1
    with pytest.raises(build.BuildError, match="no C compiler 'icc'"):
        build.find_compiler("icc")
    program("zig")
    assert build.find_compiler() == ["zig", "cc"]
    monkeypatch.setattr(build, "find_spec", lambda name: object())
    assert build.find_compiler() == [sys.executable, "-m", "ziglang", "cc"]
    for name in ("clang", "gcc", "cc"):
        program(name)
        assert build.find_compiler() == [name]
    monkeypatch.setenv("CC", "gcc -m64")
    assert build.find_compiler() == ["gcc", "-m64"]
    assert build.find_compiler("clang") == ["clang"]


@pytest.mark.parametrize(
    ("name", "variants", "tag", "library"),
    [
        ("x86_64-linux-gnu.2.17", ["avx512", "avx2", "baseline"], "manylinux_2_17_x86_64", "libteal_native.so"),
        ("aarch64-linux-gnu.2.28", ["neon"], "manylinux_2_28_aarch64", "libteal_native.so"),
        ("riscv64-linux-gnu.2.35", ["baseline"], "manylinux_2_35_riscv64", "libteal_native.so"),
        ("aarch64-macos", ["neon"], "macosx_11_0_arm64", "libteal_native.dylib"),
        ("x86_64-macos.12.3", ["avx512", "avx2", "baseline"], "macosx_12_3_x86_64", "libteal_native.dylib"),
    ],
)
def test_targets(name: str, variants: list[str], tag: str, library: str) -> None:
    target = build.target_of(name)
    assert (list(target.variants), target.wheel_tag, target.library) == (variants, tag, library)


@pytest.mark.parametrize("name", ["", "x86_64", "x86_64-linux", "x86_64-windows-gnu"])
def test_no_such_target(name: str) -> None:
    with pytest.raises(build.BuildError, match="no target"):
        build.target_of(name)


@pytest.mark.parametrize("flags", [["--sanitize", "thread"], ["--target", "aarch64-macos"]])
def test_a_library_that_teal_should_not_load_needs_a_folder(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.main(flags)
