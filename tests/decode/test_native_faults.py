"""The native path when things go wrong around it: interrupts, forks, threads, copies of its cache."""

import copy
import os
import sys
from threading import Thread
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import build_model
from fused_pair import error_of, random_tokens
from native_models import NO_LIBRARY, sparse, tiny, use_threads
from torch import Tensor

from teal_cli.decode import cache as cache_module
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths import native_session, program_session
from teal_cli.decode.paths.native import NativePath
from teal_cli.errors import ArtefactError
from teal_kernels.native import library

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

_FILES = {module.__file__ for module in (cache_module, native_session, program_session)}
"""Not library.py: Python delivers no signal where a `with` gives its lock back, but a trace can raise there."""


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, 2)


def _prefilled(model: Any, seed: int = 0) -> tuple[Engine, Any]:
    """An engine with a session on a cache of 60 positions, 21 of which are taken."""
    engine = Engine(model, path="native")
    cache = engine.new_cache(60)
    engine.prefill(random_tokens(1, 20, seed), cache)
    engine.step(random_tokens(1, 1, seed), cache)
    return engine, cache


def _steps(engine: Engine, cache: Any, count: int, seed: int = 1) -> Tensor:
    return torch.cat([engine.step(random_tokens(1, 1, seed + index), cache) for index in range(count)])


class _Interrupt:
    """Ctrl-C before the n-th line of the files above, counted over all of them."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in _FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)


@torch.no_grad()
def test_a_step_can_be_taken_again_wherever_it_was_interrupted() -> None:
    """Unless the cache says that it was taken. Nothing that comes after it, a prompt neither, can tell."""
    model = sparse(tiny("llama"))
    engine, begun = _prefilled(model)
    before = begun.length
    _, cache = _prefilled(model)
    expected = _steps(Engine(model, path="native"), cache, 2), engine.prefill(random_tokens(1, 5, 9), cache)
    lines = 0
    while True:
        engine, cache = _prefilled(model)
        lines += 1
        try:
            with _Interrupt(lines):
                engine.step(random_tokens(1, 1, 1), cache)
            break
        except KeyboardInterrupt:
            pass
        if cache.length == before:
            engine.step(random_tokens(1, 1, 1), cache)
        assert torch.equal(engine.step(random_tokens(1, 1, 2), cache), expected[0][1:]), lines
        assert torch.equal(engine.prefill(random_tokens(1, 5, 9), cache), expected[1]), lines
    assert lines > 30  # of one step


@torch.no_grad()
@pytest.mark.parametrize("made_again", [False, True])
def test_a_copy_of_a_cache_goes_on_by_itself(made_again: bool) -> None:
    model = sparse(tiny("llama"))
    engine, cache = _prefilled(model)
    other = copy.deepcopy(cache)
    expected = _steps(engine, cache, 3)
    if made_again:
        engine = Engine(model, path="native")
    assert torch.equal(_steps(engine, other, 3), expected)
    assert other.length == cache.length == 24
    assert other.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()


@torch.no_grad()
def test_two_models_decode_at_the_same_time() -> None:
    """On one pool, whose threads work for one step at a time."""
    models = [sparse(tiny("llama")), sparse(tiny("qwen2"), scheme="int8")]
    expected = [_steps(*_prefilled(model, seed), 30, seed) for seed, model in enumerate(models)]
    found: dict[int, Tensor] = {}

    def decode(seed: int) -> None:
        with torch.no_grad():
            found[seed] = _steps(*_prefilled(models[seed], seed), 30, seed)

    for _ in range(5):
        found.clear()
        threads = [Thread(target=decode, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[seed], expected[seed]) for seed in range(2))


@torch.no_grad()
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_parent_and_child_go_on_after_a_fork() -> None:
    model = sparse(tiny("llama"))
    engine, cache = _prefilled(model)
    expected = _steps(*_prefilled(model), 5)
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = torch.equal(_steps(engine, cache, 5), expected)
        finally:
            os._exit(0 if same else 1)
    assert torch.equal(_steps(engine, cache, 5), expected)
    assert os.waitpid(child, 0)[1] == 0


@torch.no_grad()
def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--threads 64` takes no more than there are; a pool of so many is slow, but right."""
    model = sparse(tiny("llama"))
    expected = _steps(*_prefilled(model), 3)
    use_threads(monkeypatch, 64)
    assert error_of(_steps(*_prefilled(model), 3), expected) < 1e-5  # sums are split among threads
    monkeypatch.setattr(library.torch, "get_num_threads", lambda: 64)
    assert library.default_threads() <= (os.cpu_count() or 1)


@torch.no_grad()
def test_another_error_is_not_taken_for_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a damaged table of the fused path: it is said, and the path stays."""

    def refuse(path: NativePath, cache: object) -> object:
        raise ArtefactError("a table is damaged")

    engine = Engine(build_model("llama"))
    monkeypatch.setattr(NativePath, "open", refuse)
    with pytest.raises(ArtefactError, match="a table is damaged"):
        engine.check(random_tokens(1, 12))
    assert engine.path.name == "native"
