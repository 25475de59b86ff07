"""check.c under sanitizers and, for processors that this machine is not, under an emulator; and functions.c.

The emulator is qemu-user (`apt-get install qemu-user`), and other machines need the package `ziglang`; what is not
there is skipped.
"""

import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from teal_kernels.native import build, library

_CHECK = Path(__file__).with_name("check.c")
# -g1 tells a sanitizer the line, and it prints no more; following variables too, as -g does, takes gcc longer than all
# else (34 s of CPU, not 20).
_FLAGS = ["-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-g1", "-fno-omit-frame-pointer"]
# For what counts every access, optimising costs more than it saves (54 s of CPU, not 43), and may take an access away.
# The library of the other tests is optimised.
_SANITIZED = "-O0"
_OPTIMISED = "-O1"


def _program(folder: Path, *flags: str, target: str | None = None, variants: Iterable[str] = ()) -> Path:
    """check.c and the library in one file, which needs no other; all variants, or some."""
    goal = build.target_of(target)
    chosen = {name: goal.variants[name] for name in variants or goal.variants}
    command = [*build.command_for(goal, "zig" if target else None), *_FLAGS, *flags, f"-I{build.SOURCES}"]
    objects = build.compiled(command, chosen, [*build.SOURCES.glob("*.c"), _CHECK], folder)
    program = folder / "check"
    subprocess.run([*command, *objects, "-lm", "-o", program], check=True)
    return program


def _variants(program: Path, *emulator: str) -> str:
    """What a run that found nothing wrong prints."""
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _emulator(machine: str) -> str:
    found = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if found is None:
        pytest.skip(f"needs qemu-{machine}")
    return found


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
@pytest.mark.parametrize(("kinds", "most"), [("address,undefined", None), ("thread", 1)])  # threads do the same in each
def test_sanitizers_find_nothing(kinds: str, most: int | None, tmp_path: Path) -> None:
    """In all variants that this machine can run, or the first of them."""
    flags = [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", _SANITIZED]
    native = library.load()
    variants = list(native.variants)[:most] if native else list(build.target_of(None).variants)[-1:]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = [*build.find_compiler(), *flags, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("the compiler has no such sanitizer here")
    assert _variants(_program(tmp_path, *flags, variants=variants)) == " ".join(variants)


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
@pytest.mark.parametrize("variant", build.target_of(None).variants)
def test_functions_are_near_those_of_the_c_library(variant: str, tmp_path: Path) -> None:
    native = library.load()
    if native is None or variant not in native.variants:
        pytest.skip(f"cannot run {variant} here")
    goal, program = build.target_of(None), tmp_path / "functions"
    command = [*build.command_for(goal, None), *_FLAGS, _OPTIMISED, *goal.variants[variant], f"-I{build.SOURCES}"]
    subprocess.run([*command, _CHECK.with_name("functions.c"), "-lm", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not find_spec("ziglang"), reason="needs ziglang")
@pytest.mark.parametrize(
    ("machine", "processors"),
    [
        ("aarch64", {"cortex-a72": "neon"}),
        ("x86_64", {"Haswell": "avx2 baseline", "Nehalem": "baseline"}),
    ],
)
def test_other_processors(machine: str, processors: dict[str, str], tmp_path: Path) -> None:
    emulator = _emulator(machine)
    program = _program(tmp_path, "-static", _OPTIMISED, target=f"{machine}-linux-musl")
    for processor, variants in processors.items():
        assert _variants(program, emulator, "-cpu", processor) == variants
