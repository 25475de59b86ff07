"""Builds the native library from src/ with a C compiler.

    python -m teal_kernels.native.build

Run as a file it needs nothing but Python's standard library: `make setup` and setup.py do so.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
SOURCES = _HERE / "src"
FOLDER = _HERE / "lib"
"""Where the library is looked for."""

# Contracted multiplications and additions are what the speed comes from; -ffast-math would fold the tricks of exp.
_FLAGS = [
    *("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fvisibility=hidden", "-fPIC", "-pthread", "-g0", "-Wall", "-Wextra", "-Wpointer-arith"),
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# What src/dispatch.c asks a processor for, and no more: a compiler may use all that it is allowed.
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]
_VARIANTS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"avx512": _AVX512, "avx2": _AVX2, "baseline": []},
    "aarch64": {"neon": []},
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # other names of the same
_MACOS = {"x86_64": "10.13", "aarch64": "11.0"}
"""The oldest versions that a library for macOS is made for, unless the target says otherwise."""


class BuildError(Exception):
    """The library cannot be built; why, in one line."""


@dataclass(frozen=True)
class Target:
    """What a library is built for."""

    machine: str
    """As Zig names it: x86_64, aarch64."""
    system: str
    """linux, macos."""
    zig: str
    """The whole of it for Zig's compiler, with the oldest libc or system that the library runs on."""

    @property
    def library(self) -> str:
        """The file's name."""
        return "libteal_native.dylib" if self.system == "macos" else "libteal_native.so"

    @property
    def variants(self) -> dict[str, list[str]]:
        """Flags of each."""
        return _VARIANTS.get(self.machine, {"baseline": []})

    @property
    def wheel_tag(self) -> str:
        """Platforms on which a library that Zig built runs, as wheels name them."""
        machine = "arm64" if (self.machine, self.system) == ("aarch64", "macos") else self.machine
        version = "_".join(self.zig.split(".")[1:3])
        return f"macosx_{version}_{machine}" if self.system == "macos" else f"manylinux_{version}_{machine}"


def target_of(name: str | None) -> Target:
    """`x86_64-linux-gnu.2.17`, `aarch64-macos.11.0` or the like; None is this machine.

    Raises:
        BuildError: nothing that the library is built for.
    """
    if name is None:
        name = _this_machine()
    machine, _, rest = name.partition("-")
    system = rest.partition("-")[0].partition(".")[0]
    if system not in ("linux", "macos") or (system == "linux" and "-" not in rest):
        raise BuildError(f"no target {name!r}; x86_64-linux-gnu.2.17, aarch64-linux-gnu.2.17, aarch64-macos are some")
    if rest == "macos":
        name += f".{_MACOS.get(machine, '11.0')}"
    return Target(machine, system, name)


def _this_machine() -> str:
    machine = platform.machine().lower()
    machine = _MACHINES.get(machine, machine)
    if sys.platform == "darwin":
        return f"{machine}-macos"
    if sys.platform != "linux":
        raise BuildError(f"the native library is for Linux and macOS, not {sys.platform}")
    return f"{machine}-linux-{'gnu.2.17' if platform.libc_ver()[0] == 'glibc' else 'musl'}"


def library_file() -> Path:
    """Where this machine's library is, once it is built."""
    return FOLDER / ("libteal_native.dylib" if sys.platform == "darwin" else "libteal_native.so")


def record_of(library: Path) -> Path:
    """The JSON file beside a library: what made it, and its digest."""
    return library.with_name(f"{library.name}.json")


def is_as_built(library: Path) -> bool:
    """Whether a library is byte for byte what its record says: neither cut off, nor another.

    It costs 1 ms. Loading a file that was cut off kills the process, so that nobody could say why.

    Raises:
        OSError: the library cannot be read.
    """
    record = _read(record_of(library))
    return isinstance(record, dict) and record.get("sha256") == _sha256(library)


def find_compiler(name: str | None = None) -> list[str]:
    """The command of a C compiler.

    Args:
        name: a command, or `zig` for the PyPI package `ziglang` or an installed Zig. None: $CC, cc, gcc, clang and
            Zig, the first that is there.

    Raises:
        BuildError: there is none.
    """
    names = [name] if name else [os.environ.get("CC", ""), "cc", "gcc", "clang", "zig"]
    for command in map(shlex.split, names):
        if command == ["zig"] and find_spec("ziglang"):
            return [sys.executable, "-m", "ziglang", "cc"]
        if command and shutil.which(command[0]):
            return [*command, "cc"] if command == ["zig"] else command
    wanted = f"no C compiler {name!r}" if name else "no C compiler (cc, gcc, clang)"
    raise BuildError(f"{wanted}: install one, or `pip install ziglang`")


def command_for(goal: Target, compiler: str | None = None) -> list[str]:
    """As `find_compiler`; Zig's is told the target, since it compiles for this very processor otherwise.

    Raises:
        BuildError: there is no compiler.
    """
    command = find_compiler(compiler)
    return [*command, "-target", goal.zig] if command[-1] == "cc" and len(command) > 1 else command


def build(
    compiler: str | None = None,
    target: str | None = None,
    out: Path = FOLDER,
    *,
    extra: Sequence[str] = (),
    sources: Path = SOURCES,
) -> tuple[Path, bool]:
    """Build the library, unless the same sources, compiler and flags made the one that is there.

    Args:
        compiler: as `find_compiler`; with a target, Zig where it is None.
        target: as `target_of`; None for this machine.
        out: folder for the library, and for its record (`record_of`).
        extra: more flags.
        sources: folder with the C files.

    Returns:
        The library, and whether it was built now.

    Raises:
        BuildError: no compiler, or it refuses.
    """
    goal = target_of(target)
    command = command_for(goal, compiler or ("zig" if target else None))
    files = sorted(sources.glob("*.[ch]")) + sorted(sources.glob("*.inc"))
    library = out / goal.library
    record = record_of(library)
    made_of = {
        "compiler": command[1:] if command[0] == sys.executable else command,
        "version": _run([*command, "--version"]).splitlines()[0],
        "target": goal.zig,
        "flags": [*_FLAGS, *extra],
        "variants": goal.variants,
        "sources": _digest(files),
    }
    if library.exists() and _read(record) == made_of | {"sha256": _sha256(library)}:
        return library, False
    out.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the library can be renamed into its place.
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as scratch:
        made = _linked([*command, *_FLAGS, *extra], goal, files, Path(scratch))
        written = Path(scratch, "record")
        written.write_text(json.dumps(made_of | {"sha256": _sha256(made)}, indent=1) + "\n")
        made.replace(library)
        written.replace(record)
    return library, True


def compiled(command: list[str], variants: dict[str, list[str]], files: Iterable[Path], folder: Path) -> list[str]:
    """Object files of all C files, `variant.c` once for each variant, in `folder`.

    Args:
        command: the compiler, with flags.
        variants: more flags of each.
        files: C files, and what they include.
        folder: for the objects.

    Raises:
        BuildError: the compiler refuses, or variant.c is missing.
    """
    has = [f"-DTEAL_HAS_{name.upper()}" for name in variants]
    units = {path.stem: (path, has) for path in files if path.suffix == ".c"}
    if "variant" not in units:
        raise BuildError("variant.c is missing among the sources")
    path, _ = units.pop("variant")
    units |= {f"variant-{name}": (path, [f"-DTEAL_VARIANT={name}", *flags]) for name, flags in variants.items()}

    def of(name: str) -> str:
        path, flags = units[name]
        made = str(folder / f"{name}.o")
        _run([*command, *flags, "-c", str(path), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(of, sorted(units, reverse=True)))  # variants take longest


def _linked(command: list[str], goal: Target, files: Iterable[Path], scratch: Path) -> Path:
    objects = compiled(command, goal.variants, files, scratch)
    library = scratch / goal.library
    name = f"-Wl,-install_name,@rpath/{goal.library}" if goal.system == "macos" else f"-Wl,-soname,{goal.library}"
    _run([*command, "-shared", name, *objects, "-lm", "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BuildError(f"the C compiler refused: {shlex.join(command)}")
    return done.stdout


def _read(record: Path) -> object:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where no library comes out."""
    parser = argparse.ArgumentParser(description="Build teal's native CPU library.")
    parser.add_argument("--compiler", help="a command, or zig; otherwise $CC, cc, gcc, clang, zig: what is there")
    parser.add_argument("--target", help="build for another machine with zig, such as aarch64-linux-gnu.2.17")
    parser.add_argument("--out", type=Path, help="folder for the library; otherwise where teal looks for it")
    parser.add_argument("--sanitize", metavar="KINDS", help="address,undefined or thread; with --out")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    options = parser.parse_args(arguments)
    if options.out is None and (options.sanitize or options.target):
        parser.error("--sanitize and --target need --out: the library is not one to run with")
    extra = ["-Werror"] if options.strict else []
    if options.sanitize:
        extra += [f"-fsanitize={options.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    try:
        library, new = build(options.compiler, options.target, options.out or FOLDER, extra=extra)
    except (BuildError, OSError) as error:
        print(f"teal_native: {error}", file=sys.stderr)
        return 1
    print(f"teal_native: {'built' if new else 'nothing to do for'} {library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
