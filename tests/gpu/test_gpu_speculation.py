"""Decoding from drafts on a GPU: passes over several tokens against single steps, a graph for each number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, export_tiny, save_tiny

from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.model_loading import load_model
from teal_cli.quantise.copies import quantised_copy
from teal_cli.schemes import Scheme
from teal_cli.sparse import control_of

GREEDY = SamplingConfig()
LIMIT = {"float32": 2e-5, "bfloat16": 0.03}
"""Relative norm of errors: other splits of the cache are added up in another order."""


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.fixture(params=sorted(LIMIT))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    return Engine(load_model(out, device="cuda", dtype=request.param), path="fused")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[20], [300, 5], [20, 13, 9, 400]], ids=str)
def test_a_pass_gives_what_single_steps_give(engine: Engine, lengths: list[int]) -> None:
    rows, positions = len(lengths), max(lengths) + 20
    found: dict[int, torch.Tensor] = {}
    tokens = _tokens(rows, 12, seed=5)
    for span in (1, 2) if rows > 2 else (1, 2, 4):
        cache = engine.new_cache(positions)
        engine.prefill(_tokens(rows, max(lengths)), cache, torch.tensor(lengths))
        engine.path.stepper(cache, sparse=True).run(_tokens(rows, 1, 7), lengths)
        target, logits = engine.path.stepper(cache, sparse=False), []
        for start in range(0, 12, span):  # the first pass runs as it is, the second is captured, later ones are replays
            at = [length + start for length in lengths]
            logits.append(target.run(tokens[:, start : start + span], at)[0].clone())
        found[span] = torch.cat(logits, dim=1).double()
    limit = LIMIT[str(engine.model.dtype).removeprefix("torch.")]
    for span, logits in found.items():
        assert float((logits - found[1]).norm() / found[1].norm()) < limit, span


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "int8", "int4:32+sparse", "lookup"])
def test_greedy_text_is_the_dense_model_s(engine: Engine, kind: str) -> None:
    if engine.model.dtype != torch.float32:
        pytest.skip("tokens whose logits are alike up to rounding may differ")
    prompt = _tokens(1, 40)
    prompt[0, 20:] = prompt[0, :20]
    with control_of(engine.model).switched_off():
        wanted = list(engine.generate(prompt, max_new_tokens=200, sampling=GREEDY))
    draft: Any = None if kind == "lookup" else engine.model
    if kind.startswith("int"):
        draft, _ = quantised_copy(engine.model, Scheme.parse(kind.partition("+")[0]))
    for count in (None, 1, 3, 7):
        decoder = Speculator(engine, draft, sparse="sparse" in kind, lookup=kind == "lookup", count=count)
        for _ in range(2):  # the second on the memory and graphs of a cache of its own
            assert list(decoder.generate(prompt, max_new_tokens=200, sampling=GREEDY)) == wanted


@torch.no_grad()
def test_rows_and_sampling(engine: Engine) -> None:
    """Two rows, each with its own number of accepted tokens; sampled ones are repeated by their seed."""
    prompts = _tokens(2, 30)
    texts = []
    for _ in range(2):
        decoder = Speculator(engine, engine.model, sparse=True, count=3)
        cache, logits = decoder.run_prompt(prompts, 120)
        sampler = Sampler(SamplingConfig(0.7, seed=3), engine.device)
        token = sampler.next_token(logits)
        loop = decoder.loop(cache, prompts, token, sampler, positions=120)
        rows: list[list[int]] = [[], []]
        while min(map(len, rows)) < 40:
            for row, tokens in enumerate(loop.advance()):
                rows[row] += tokens
        texts.append([row[:40] for row in rows])
    assert texts[0] == texts[1]
