"""The native library from Python: structures against the header, what weights become, and when it cannot be used."""

import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal_kernels import BackendUnavailableError, input_major
from teal_kernels.native import build, library
from teal_kernels.native import structures as native
from teal_kernels.packing import Packed, pack, side_by_side

_COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_a_compiler = pytest.mark.skipif(_COMPILER is None, reason="no C compiler here")
needs_the_library = pytest.mark.skipif(library.load() is None, reason=str(library.unavailable_reason()))

_STRUCTURES = (
    native.Weight,
    native.Norm,
    native.Product,
    native.Attention,
    native.Route,
    native.Router,
    native.Step,
    native.Program,
)
_ENUMS = (
    (native.Dtype, "TEAL_"),
    (native.Layout, "TEAL_"),
    (native.NormKind, "TEAL_"),
    (native.HeadNorms, "TEAL_"),
    (native.Epilogue, "TEAL_"),
    (native.Activation, "TEAL_"),
    (native.Scores, "TEAL_"),
    (native.StepKind, "TEAL_STEP_"),
)


@needs_a_compiler
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    ours: dict[str, int] = {"TEAL_ABI": native.ABI, "TEAL_MAX_ROWS": native.MAX_ROWS}
    ours |= {"TEAL_MAX_PARTS": native.MAX_PARTS, "TEAL_KEY_BLOCK": native.KEY_BLOCK}
    ours |= {f"{prefix}{member.name}": member.value for enum, prefix in _ENUMS for member in enum}
    for structure in _STRUCTURES:
        name = f"teal_{structure.__name__.lower()}"
        ours[f"sizeof({name})"] = ctypes.sizeof(structure)
        ours |= {f"offsetof({name}, {field[0]})": getattr(structure, field[0]).offset for field in structure._fields_}
    lines = "".join(f'printf("%ld\\n", (long)({expression}));\n' for expression in ours)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "teal_native.h"\nint main(void) {{\n{lines}return 0;\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([_COMPILER, f"-I{build.SOURCES}", source, "-o", program], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(ours, map(int, printed), strict=True)) == ours


def test_every_name_of_the_header_is_mirrored() -> None:
    header = (build.SOURCES / "teal_native.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    bodies = re.findall(r"typedef enum \{(.*?)\}", text, re.DOTALL)
    enums = {name for body in bodies for name in re.findall(r"TEAL_\w+", body)}
    assert enums == {f"{prefix}{member.name}" for enum, prefix in _ENUMS for member in enum}
    functions = re.sub(r"typedef void .*?;", "", text, flags=re.DOTALL)
    assert set(re.findall(r"(teal_\w+)\(", functions)) == set(library._SIGNATURES)


def _values(weight: native.Weight) -> Tensor:
    """(in, out) float32: what a weight points to, as the header describes it."""
    rows, columns = weight.inputs, weight.outputs
    if weight.layout == native.Layout.ROW_MAJOR:
        rows, columns = columns, rows
    kind = {
        native.Dtype.F32: torch.float32,
        native.Dtype.BF16: torch.bfloat16,
        native.Dtype.F16: torch.float16,
    }.get(weight.dtype, torch.uint8)
    bits = 4 if weight.dtype == native.Dtype.INT4 else 8 * kind.itemsize
    count = -(-columns * bits // 8) // kind.itemsize
    table = torch.stack([_memory(weight.data + row * weight.row_bytes, count, kind) for row in range(rows)])
    if weight.dtype not in (native.Dtype.INT8, native.Dtype.INT4):
        return (table.t() if weight.layout == native.Layout.ROW_MAJOR else table).float()
    if bits == 4:
        table = torch.stack([table & 15, table >> 4], dim=-1).flatten(1)[:, :columns]
    group = torch.arange(rows) // weight.group
    scale_kind = {native.Dtype.F16: torch.float16, native.Dtype.F32: torch.float32}[weight.scale_dtype]

    def of_groups(address: int, stride: int, dtype: torch.dtype) -> Tensor:
        one = [_memory(address + g * stride * dtype.itemsize, columns, dtype) for g in range(int(group[-1]) + 1)]
        return torch.stack(one).float()[group]

    zeros = of_groups(weight.zeros, weight.zero_stride, torch.float16) if weight.zeros else 1 << (bits - 1)
    return (table.float() - zeros) * of_groups(weight.scales, weight.scale_stride, scale_kind)


def _memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


@pytest.mark.parametrize("dtype", list(native.DTYPES))
def test_weights_of_floats(dtype: torch.dtype) -> None:
    whole = torch.randn(12, 7).to(dtype)
    for table, layout in (
        (whole, native.Layout.ROW_MAJOR),
        (whole[:, 1:6], native.Layout.ROW_MAJOR),
        (input_major(whole), native.Layout.INPUT_MAJOR),
        (input_major(whole)[3:8], native.Layout.INPUT_MAJOR),  # a part of a table
        (input_major(whole)[:1], native.Layout.INPUT_MAJOR),
    ):
        weight = native.weight_of(table, threshold=0.25, expected=0.5, counter=3)
        assert weight.layout == layout
        assert torch.equal(_values(weight), table.t().float())
        assert weight.data == table.data_ptr()
        assert (weight.threshold, weight.expected, weight.counter, weight.bias) == (0.25, 0.5, 3, None)
    plain = native.weight_of(whole)
    assert (plain.threshold, plain.expected, plain.counter) == (-inf, 0, -1)


def _packed(n_in: int, n_out: int, bits: int, group: int, zeros: torch.dtype | None) -> tuple[Packed, Tensor]:
    """Codes, and the (in, out) values that they stand for."""
    groups = -(-n_in // group)
    codes = torch.randint(0, 1 << bits, (n_in, n_out), dtype=torch.uint8)
    scales = torch.rand(groups, n_out).half()
    points = None if zeros is None else torch.randint(0, 1 << bits, (groups, n_out)).to(zeros)
    of = torch.arange(n_in) // group
    values = (codes.float() - (1 << (bits - 1) if points is None else points.float()[of])) * scales.float()[of]
    return pack(codes, scales, points, bits=bits, group=group), values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [None, torch.uint8, torch.float16])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_codes(bits: int, zeros: torch.dtype | None, scales: torch.dtype) -> None:
    """Three projections side by side: one that does not fill its last word, a last group that is shorter."""
    made = [_packed(19, outputs, bits, 8, zeros) for outputs in (11, 16, 5)]
    table = side_by_side([packed for packed, _ in made])
    table = Packed(table.words, table.scales.to(scales), table.zeros, bits, 8, table.parts)
    starts = [0, 11, 27, 32]
    for part, (packed, values) in enumerate(made):
        columns = slice(starts[part], starts[part + 1])
        rounded = values / packed.scales.float()[torch.arange(19) // 8]
        expected = rounded * table.scales[:, columns].float()[torch.arange(19) // 8]
        weight = native.weight_of(table, part=part)
        torch.testing.assert_close(_values(weight), expected, rtol=1e-6, atol=0)
        assert (weight.inputs, weight.outputs) == (19, values.shape[1])
    alone = Packed(table.words[:, : -(-11 * bits // 32)], table.scales[:, :11], None, bits, 8, (11,))
    assert native.weight_of(alone).row_bytes == 4 * table.words.stride(0)


def test_what_a_weight_points_to_stays() -> None:
    """Copies that were made for it, and the tensors of the caller."""
    bias = torch.randn(6, dtype=torch.bfloat16)
    product = native.product_of(
        [native.weight_of(torch.randn(6, 4), bias=bias) for _ in range(2)], native.Epilogue.GATED
    )
    cache = torch.zeros(1, 1, 1, 4, 16), torch.zeros(1, 1, 16, 4)
    rotary = (torch.ones(16, 2, dtype=torch.float64),) * 2
    attention = native.attention_of(*cache, heads=1, scale=1, rotary=rotary)
    program = native.program_of(
        [native.norm_of(torch.full((4,), 2.0).half(), 1e-5), product, attention],
        embedding=native.weight_of(torch.randn(5, 4)),
        output=native.product_of([native.weight_of(torch.randn(5, 4))], native.Epilogue.PLAIN),
    )
    del product, attention
    torch.randn(1000)  # would take freed memory
    steps = (native.Step * 3).from_address(program.steps)
    assert [step.kind for step in steps] == list(native.StepKind)[:3]
    norm = native.Norm.from_address(steps[0].of)
    assert _memory(norm.weight, 4, torch.float32).tolist() == [2] * 4
    parts = native.Product.from_address(steps[1].of).parts
    assert torch.equal(_memory(parts[1].bias, 6, torch.float32), bias.float())
    assert parts[2].data is None
    seen = native.Attention.from_address(steps[2].of)
    assert (seen.rotary, seen.positions, _memory(seen.cos, 32, torch.float32).tolist()) == (2, 16, [1] * 32)
    assert (program.vocabulary, program.hidden, program.n_steps) == (5, 4, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: native.weight_of(torch.zeros(3, 4, dtype=torch.float64)), "float64"),
        (lambda: native.weight_of(torch.zeros(3, 4, 2)[..., 0]), "strides"),
        (lambda: native.weight_of(torch.zeros(3, 4, device="meta")), "meta"),
        (lambda: native.weight_of(torch.zeros(3, 4), bias=torch.zeros(4)), "do not fit"),
        (lambda: native.product_of([], native.Epilogue.PLAIN), "1 to 4 parts"),
        (lambda: native.attention_of(torch.zeros(1, 1, 1, 4, 16), torch.zeros(1, 1, 17, 4), heads=1, scale=1), "keys"),
        (
            lambda: native.attention_of(
                torch.zeros(1, 1, 2, 4, 16), torch.zeros(1, 1, 32, 4), heads=1, scale=1, rotary=(torch.ones(31, 2),) * 2
            ),
            "too short",
        ),
    ],
)
def test_what_the_library_cannot_read(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.SETTING, raising=False)
    monkeypatch.setattr(library, "library_file", lambda: tmp_path / "none.so")
    assert library.load() is None
    assert "python -m teal_kernels.native.build" in str(library.unavailable_reason())
    with pytest.raises(BackendUnavailableError, match="not built"):
        library.Pool(2)
    monkeypatch.setenv(library.SETTING, "avx2")
    with pytest.raises(BackendUnavailableError, match="TEAL_NATIVE=avx2 .* not built"):
        library.load()
    text = tmp_path / "text.so"
    text.write_text("no library")
    _record(text)
    monkeypatch.setattr(library, "library_file", lambda: text)
    monkeypatch.delenv(library.SETTING)
    assert "is no native library for this machine" in str(library.unavailable_reason())


def _record(path: Path) -> None:
    build.record_of(path).write_text(json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))


@needs_a_compiler
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int teal_abi(void) { return 99; }", f"interface 99, not {native.ABI}"),
        ("int other(void) { return 0; }", "no native library"),
        (f"int teal_abi(void) {{ return {native.ABI}; }}", "no native library"),
    ],
)
def test_another_library(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even loaded where it has no record."""
    monkeypatch.delenv(library.SETTING, raising=False)
    file = tmp_path / "other.c"
    file.write_text(source)
    for recorded in (False, True):
        other = tmp_path / f"other-{recorded}.so"
        subprocess.run([_COMPILER, "-shared", "-fPIC", file, "-o", other], check=True)
        if recorded:
            _record(other)
        monkeypatch.setattr(library, "library_file", lambda path=other: path)
        assert library.load() is None
        reason = str(library.unavailable_reason())
        assert (said if recorded else "is damaged, or another file than was built") in reason
        assert "python -m teal_kernels.native.build" in reason


@needs_the_library
def test_a_library_that_was_cut_off(tmp_path: Path) -> None:
    """In a process of its own, which loading the file would kill (SIGBUS)."""
    file = build.library_file()
    cut = tmp_path / file.name
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.copy(build.record_of(file), tmp_path)
    code = (
        "import sys; from pathlib import Path; from teal_kernels.native import library; "
        "library.library_file = lambda: Path(sys.argv[1]); print(library.unavailable_reason())"
    )
    environment = {name: value for name, value in os.environ.items() if name != library.SETTING}
    command = [sys.executable, "-c", code, str(cut)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{cut} is damaged, or another file than was built; ")
    assert done.stdout.count("\n") == 1


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(library.os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    assert library.default_threads() == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert library.default_threads() == 1
    monkeypatch.delattr(library.os, "sched_getaffinity")
    monkeypatch.setattr(library.os, "cpu_count", lambda: None)
    assert library.default_threads() == 1


@needs_the_library
def test_the_environment_picks_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.SETTING, raising=False)
    found = library.load()
    assert found is not None
    assert set(found.variants) <= set(build.target_of(None).variants)
    assert (found.variant, library.unavailable_reason()) == (found.variants[0], None)
    for variant in found.variants:
        monkeypatch.setenv(library.SETTING, variant)
        assert library.load() == library.Native(found.variants, variant, found.path, found.functions)
    monkeypatch.setenv(library.SETTING, "sse9")
    with pytest.raises(
        BackendUnavailableError, match=f"TEAL_NATIVE=sse9 cannot run here, only {', '.join(found.variants)}"
    ):
        library.load()
    monkeypatch.setenv(library.SETTING, "off")
    assert library.load() is None
    assert library.unavailable_reason() == "switched off by TEAL_NATIVE=off"
    with pytest.raises(BackendUnavailableError, match="switched off"):
        library.linear(native.weight_of(torch.ones(2, 2)), torch.ones(2))


def _decoder() -> tuple[native.Program, Tensor]:
    """The smallest: embedding, output layer. And the logits of each token."""
    embedding, output = torch.randn(9, 16), torch.randn(24, 16)
    norm = native.norm_of(torch.ones(16), 1e-5)
    program = native.program_of(
        [norm],
        embedding=native.weight_of(embedding),
        norm=norm,
        output=native.product_of([native.weight_of(input_major(output), counter=0)], native.Epilogue.PLAIN),
        counters=1,
    )
    return program, torch.nn.functional.rms_norm(embedding, (16,), eps=1e-5) @ output.t()


def _step(session: library.Session, tokens: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
    logits, best = torch.zeros(session.rows, 24), torch.zeros(session.rows, dtype=torch.int64)
    session.step(torch.tensor(tokens), torch.tensor(positions), logits, best)
    return logits, best


@needs_the_library
def test_a_session() -> None:
    program, expected = _decoder()
    with library.Pool(2) as pool:
        session = library.Session(program, pool, 2)
        logits, best = _step(session, [3, 8], [0, 5])
        # 16 products of normal numbers, added in any order.
        torch.testing.assert_close(logits, expected[[3, 8]], rtol=0, atol=2e-5)
        assert torch.equal(best, logits.argmax(1))
        assert session.kept().tolist() == [2 * 16]
        for tokens in ([3, 9], [-1, 3]):
            with pytest.raises(ValueError, match="out of range"):
                _step(session, tokens, [0, 0])
        assert session.kept().tolist() == [2 * 16]
        with pytest.raises(ValueError, match=r"not contiguous torch.int64 \(2,\)"):
            _step(session, [3], [0])
        session.close()
        session.close()
        with pytest.raises(RuntimeError, match="the Session was closed"):
            session.kept()
        session = library.Session(program, pool, 2)
    with pytest.raises(RuntimeError, match="the Pool was closed"):
        _step(session, [3, 8], [0, 5])


@needs_the_library
def test_a_session_that_the_library_refuses() -> None:
    program, _ = _decoder()
    with pytest.raises(ValueError, match="row"):
        library.Session(program, library.shared_pool(1), native.MAX_ROWS + 1)
    with pytest.raises(BackendUnavailableError, match="native variant sse9 cannot run here"):
        library.Session(program, library.shared_pool(1), 1, "sse9")


def _in_a_child(session: library.Session, expected: Tensor) -> None:
    logits, _ = _step(session, [4], [0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert session.kept().tolist() == [16]  # its own session, its own counts
    session.close()


@needs_the_library
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_has_threads_of_its_own() -> None:
    program, expected = _decoder()
    session = library.Session(program, library.shared_pool(2))
    _step(session, [3], [0])
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(session, expected[[4]]))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(_step(session, [3], [1])[0].argmax(1), expected[[3]].argmax(1))
    assert session.kept().tolist() == [2 * 16]
    assert library.shared_pool(2) is session.pool


@needs_the_library
@pytest.mark.parametrize("rows", [1, 3, 19])
def test_linear(rows: int) -> None:
    weight, bias, x = torch.randn(10, 16), torch.randn(10), torch.randn(2, rows, 16)
    for table in (weight, input_major(weight)):
        y = library.linear(native.weight_of(table, bias=bias), x, 2)
        torch.testing.assert_close(y, x @ weight.t() + bias, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="not contiguous"):
        library.linear(native.weight_of(weight), torch.randn(2, 15))
