"""The general path compiled: the same text, where it measures faster; otherwise a line, and decoding as before.

Where compiling is the matter, torch's compiler traces as it does anywhere, and runs what it traced as it is (backend
"eager"): seconds in place of minutes. Elsewhere nothing is compiled at all. tests/gpu has real code made.
"""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_family, export_tiny, save_tiny
from fused_pair import random_tokens
from test_state import SHAPES, _build
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.cli import run
from teal_cli.decode import choice, compiling
from teal_cli.decode.choice import Forms
from teal_cli.decode.compiling import CompiledSteps, Compiling, compiled_positions
from teal_cli.decode.deadline import OutOfTimeError, can_stop, deadline
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.whole_cache import WholeWindowLayer
from teal_cli.errors import MachineError
from teal_cli.models.architectures import find_projections
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import SparsityCounter, apply_plan_, sparsify_

GREEDY = SamplingConfig()
ALWAYS = Compiling("always")
_COMPILE = torch.compile


def _compile_by(monkeypatch: pytest.MonkeyPatch, backend: Any = None) -> list[Any]:
    """What is compiled from now on, by this backend; None leaves it as it is."""
    made: list[Any] = []

    def compile_(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append(step)
        return step if backend is None else _COMPILE(step, **options, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_)
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps that were compiled."""
    return _compile_by(monkeypatch, "eager")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps that would have been compiled."""
    return _compile_by(monkeypatch)


class Clock:
    """In place of the real times: seconds of a compiled step and of any other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiled: float, plain: float) -> None:
        self.compiled, self.plain = compiled, plain
        monkeypatch.setattr(choice, "seconds_of", self._seconds)
        monkeypatch.setattr(choice, "LEAST_BYTES", 0)

    def _seconds(self, work: Any, device: torch.device) -> float:
        work()
        return self.compiled if work.__self__._cache.compiled else self.plain


def _sparse(family: str) -> Any:
    model = build_family(family)
    thresholds = {p.name: Threshold(0.3, 0.5) for p in find_projections(model)}
    sparsify_(model, SparsityPlan("uniform", 0.5, thresholds))
    return model


def _written(model: Any, compiling: Compiling | None = None, tokens: int = 24) -> list[int]:
    engine = Engine(model, path="general", compiling=compiling)
    return list(engine.generate(random_tokens(1, 16), max_new_tokens=tokens, sampling=GREEDY))


def test_windows_and_sparse_steps(traced: list[Any]) -> None:
    """Windows of 16 positions, which 40 leave."""
    model = _sparse("gemma3_text")
    control = Engine(model, path="general").control
    assert control is not None
    assert _written(model, ALWAYS) == _written(model)
    with control.switched_off():
        assert _written(model, ALWAYS) == _written(model)
    assert len(traced) == 2


def test_experts_are_compiled_dense(traced: list[Any]) -> None:
    model = _sparse("mixtral")
    auto = Engine(model, path="general", compiling=Compiling("auto"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "LEAST_BYTES", 0)
        (line,) = auto.choose(random_tokens(1, 16), 40).lines
    assert line == "sparse steps are not compiled: experts that skip inputs wait for the host"
    assert auto.control is not None
    with auto.control.switched_off():
        assert _written(model, ALWAYS) == _written(model)


@pytest.mark.parametrize("kind", ["mamba", "bamba"])
def test_states_that_are_no_keys_are_compiled_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all caches, with a torch as well that would compile anew for each address."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def mark(tensor: torch.Tensor) -> None:
        tensor._dynamo_static_input_type = "guarded"  # type: ignore[attr-defined]

    monkeypatch.setattr(torch._dynamo, "mark_static_address", mark)
    _compile_by(monkeypatch, backend)
    model = _build(kind, **SHAPES[kind])
    expected, engine = _written(model), Engine(model, path="general", compiling=ALWAYS)
    for _ in range(3):
        assert list(engine.generate(random_tokens(1, 16), max_new_tokens=24, sampling=GREEDY)) == expected
    assert len(graphs) == 1


def test_fixed_memory_keeps_all_positions_of_windows() -> None:
    """What a GPU would get; the memory is taken with the first keys."""
    for family, kinds in (("gemma3_text", {WholeWindowLayer, StaticLayer}), ("llama", {StaticLayer})):
        engine = Engine(build_family(family), path="general")
        engine.path.device = torch.device("cuda")
        assert {type(layer) for layer in engine.new_cache(40).state.layers} <= kinds
        assert engine.path.can_capture(engine.new_cache(40))
        assert engine.new_cache(1 << 16).state.is_sliding == [family == "gemma3_text"] * 2
    path = Engine(build_family("gemma3_text"), path="general").path
    path.device = torch.device("cuda")
    assert path.not_compiled_because(1 << 16) == "a window that rolls cannot be compiled"
    assert "sees a window of 16 positions" in path.equal_lengths_because(path.new_cache(40))


@torch.no_grad()
def test_local_attention_of_gpt_neo_has_a_cache_that_grows() -> None:
    """In a fixed one it would take the last keys that there are for the last that were written."""
    shape = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    path = Engine(_build("gpt_neo", **shape), path="general").path
    path.device = torch.device("cuda")
    assert isinstance(path.new_cache(40).state, DynamicCache)
    assert isinstance(path.new_cache(8).state, StaticCache)  # the window holds all of it
    path = Engine(_build("gpt_neo", **shape | {"attention_types": [[["global"], 2]]}), path="general").path
    path.device = torch.device("cuda")
    assert isinstance(path.new_cache(40).state, StaticCache)


def test_local_attention_of_gpt_neo_within_its_window(traced: list[Any]) -> None:
    model = _build("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]])
    assert _written(model, ALWAYS) == _written(model)


def test_code_is_made_once_for_rows_and_positions(made: list[Any]) -> None:
    model = _sparse("llama")
    engine = Engine(model, path="general", compiling=ALWAYS)
    for tokens in (8, 100):
        list(engine.generate(random_tokens(1, 16), max_new_tokens=tokens, sampling=GREEDY))
    assert len(made) == 1
    assert [compiled_positions(length) for length in (1, 256, 257, 5000)] == [256, 256, 512, 8192]
    # Counting needs each layer's own call.
    control = engine.control
    assert control is not None
    cache = engine.new_cache(40, compiled=True)
    engine.prefill(random_tokens(1, 16), cache)
    with control.counting(SparsityCounter()) as counter:
        engine.step(random_tokens(1, 1), cache)
    assert 0.1 < (counter.model_wide() or 0.0) < 0.9


@pytest.mark.parametrize(("compiled", "plain"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_form_decodes(
    compiled: float, plain: float, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, compiled, plain)
    engine = Engine(_sparse("llama"), path="general", never_worse=True, compiling=Compiling("auto"))
    found = engine.choose(random_tokens(1, 16), 40)
    assert found.compiled == (compiled < plain)
    assert found.forms == (Forms("dense", plain, compiled), Forms("sparse", plain, compiled))
    taken = "compiled" if compiled < plain else "as it is"
    assert found.lines == [
        f"a {kind} step took {compiled:.0f}000 ms compiled (torch.compile), {plain:.0f}000 as it is: decoding {taken}"
        for kind in ("dense", "sparse")
    ]
    assert found.sparse_seconds == found.dense_seconds == min(compiled, plain)
    assert len(made) == 2
    clock.compiled = 7.0
    apply_plan_(
        engine.model,
        SparsityPlan("uniform", 0.5, {p.name: Threshold(0.4, 0.6) for p in find_projections(engine.model)}),
    )
    again = engine.choose(random_tokens(1, 16), 40)  # dense steps are the same at every plan
    assert again.forms == (Forms("dense", plain, compiled), Forms("sparse", plain, 7.0))
    assert len(made) == 2


def test_for_a_reply_it_has_to_pay(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And then one kind of step is compiled, the faster one."""
    Clock(monkeypatch, compiled=0.01, plain=0.1)
    for tokens, kinds in ((100, 0), (100_000, 1)):
        engine = Engine(_sparse("llama"), path="general", never_worse=True, compiling=Compiling("auto", tokens))
        assert engine.choose(random_tokens(1, 16), 40).compiled == bool(kinds)
        assert len(made) == kinds


def _raise(*_: Any) -> Any:
    raise ValueError("no compiler\nof a kind")


def _dawdle(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    for _ in range(3000):
        time.sleep(0.01)
    return graph.forward


@pytest.mark.parametrize(
    ("backend", "because"), [(_raise, "ValueError: no compiler"), (_dawdle, "it took longer than 2 s")]
)
def test_where_it_does_not_work_steps_are_as_before(
    backend: Any, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, compiled=1.0, plain=2.0)
    monkeypatch.setattr(compiling, "LIMIT_SECONDS", 2.0 if backend is _dawdle else 100.0)
    _compile_by(monkeypatch, backend)
    model, alarm = build_family("llama"), signal.getsignal(signal.SIGALRM)
    engine = Engine(model, path="general", compiling=Compiling("auto"))
    found = engine.choose(random_tokens(1, 16), 40)
    assert found.lines == [f"dense steps are not compiled: {because}"]
    assert not found.compiled
    assert found.forms[0].measured == {"plain": 2.0, "compiled": None}
    assert _written(model) == list(engine.generate(random_tokens(1, 16), max_new_tokens=24, sampling=GREEDY))
    assert can_stop()
    assert signal.getsignal(signal.SIGALRM) == alarm
    if backend is _dawdle:  # what was given up leaves nothing in the way of another
        _compile_by(monkeypatch, "eager")
        assert _written(model, ALWAYS) == _written(model)
    else:
        with pytest.raises(MachineError, match=r"compile always .*: steps are not compiled: .*; use --compile auto"):
            _written(model, ALWAYS)


def test_logits_that_differ_are_not_taken(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, compiled=1.0, plain=2.0)
    real = CompiledSteps.logits
    monkeypatch.setattr(CompiledSteps, "logits", lambda *given: real(*given).roll(1, -1))
    found = Engine(build_family("llama"), path="general", compiling=Compiling("auto")).choose(random_tokens(1, 16), 40)
    assert re.fullmatch(r"dense steps are not compiled: their logits .* by 1\d\d%", found.lines[0])
    assert not found.compiled


def test_quantised_weights_are_not_compiled(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, compiled=1.0, plain=2.0)
    model = build_family("llama")
    packs = quantise_(model, Scheme.parse("int8"))
    sparsify_(model, SparsityPlan("uniform", 0.5, {p.name: Threshold(0.3, 0.5) for p in find_projections(model)}))
    pack_(model, packs)
    found = Engine(model, path="general", never_worse=True, compiling=Compiling("auto")).choose(
        random_tokens(1, 16), 40
    )
    because = "quantised weights have kernels that torch's compiler does not know"
    assert [form.because for form in found.forms] == [because] * 2
    assert made == []


@pytest.mark.parametrize("kind", ["openai-gpt", "rwkv", "gpt_neo", "minimax"])
def test_what_cannot_be_compiled(kind: str, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, compiled=1.0, plain=2.0)
    shape = SHAPES.get(kind, {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8})
    model = _build(kind, **shape)
    auto = Engine(model, path="general", compiling=Compiling("auto"))
    assert not auto.choose(random_tokens(1, 16), 40).compiled
    with pytest.raises(MachineError, match="always .*: steps are not compiled: .+; use"):
        Engine(model, path="general", compiling=ALWAYS).choose(random_tokens(1, 16), 40)


def test_only_the_main_thread_gives_up() -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(can_stop())
        with pytest.raises(RuntimeError), deadline(1.0):
            found.append("begun")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    with pytest.raises(OutOfTimeError), deadline(0.05):
        time.sleep(5)
    with deadline(60.0):
        assert not can_stop()  # one at a time
    with deadline(None):
        assert can_stop()


def test_results_say_both_times(
    tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEAL_NATIVE", "off")
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    Clock(monkeypatch, compiled=0.001, plain=0.002)
    bench = ["bench", "--model", str(out), "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"]
    assert run([*bench, "--json", "b.json"]) == 0
    runs = json.loads(Path("b.json").read_text())["runs"]
    assert [entry["compiled"] for entry in runs] == [True, True]
    assert [entry["step_seconds"] for entry in runs] == [{"plain": 0.002, "compiled": 0.001}] * 2
    err = capsys.readouterr().err
    for kind in ("dense", "sparse"):
        assert err.count(f"a {kind} step took 1 ms compiled (torch.compile), 2 as it is: decoding compiled") == 1
    assert run([*bench, "--json", "b.json", "--compile", "never"]) == 0
    runs = json.loads(Path("b.json").read_text())["runs"]
    assert [(entry["compiled"], entry["step_seconds"]) for entry in runs] == [(False, None)] * 2
    generate = ["generate", "--model", str(out), "--prompt", "the stars", "--max-new-tokens", "4", "--json", "g.json"]
    for more, compiled in (([], False), (["--compile", "always"], True)):
        assert run([*generate, *more]) == 0
        assert json.loads(Path("g.json").read_text())["compiled"] == compiled


def test_kinds_of_steps_do_not_count_against_one_another(made: list[Any]) -> None:
    """torch limits how often it compiles one code."""
    steps = CompiledSteps(build_family("llama"))
    for kind in [*range(3)] * 2:
        steps.logits(kind, random_tokens(1, 1), {})
    assert len({id(step.__code__) for step in made}) == len(made) == 3
