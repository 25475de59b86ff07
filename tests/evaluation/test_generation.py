"""What sparse and dense write: the numbers against plain decoding."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, calibrate_tiny, save_tiny
from transformers import DynamicCache

from teal_cli.allocation import make_plan
from teal_cli.evaluation.generation import agree
from teal_cli.sparse import apply_plan_, control_of, sparsify_

PROMPTS = torch.randint(2, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(8))
NEW = 10


def _write(model: torch.nn.Module, prompt: torch.Tensor) -> list[int]:
    """Greedy, token by token, with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    with control_of(model).dense():
        token = model(input_ids=prompt[None], past_key_values=cache).logits[0, -1].argmax()
    tokens = [int(token)]
    while len(tokens) < NEW:
        tokens.append(int(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1].argmax()))
        token = torch.tensor(tokens[-1])
    return tokens


@torch.no_grad()
def test_numbers_against_plain_decoding(tmp_path: Path) -> None:
    calibration = calibrate_tiny(save_tiny(tmp_path / "m"))
    model = build_model("llama")
    plans = [make_plan(calibration, sparsity, "uniform") for sparsity in (0.0, 0.6)]
    sparsify_(model, plans[0])
    same, found = agree(model, plans, PROMPTS, new_tokens=NEW)
    assert (same.identical, same.tokens_until_difference, same.top1_agreement) == (1.0, NEW, 1.0)
    assert same.sparse_text_perplexity == pytest.approx(same.dense_text_perplexity)
    assert same.realised_sparsity == 0.0

    control = control_of(model)
    apply_plan_(model, plans[1])
    sparse = [_write(model, prompt) for prompt in PROMPTS]
    with control.switched_off():
        dense = [_write(model, prompt) for prompt in PROMPTS]
    parts = [next((i for i in range(NEW) if s[i] != d[i]), NEW) for s, d in zip(sparse, dense, strict=True)]
    assert 0 < sum(parts) < 4 * NEW  # the case is one in which they part
    assert found.tokens_until_difference == sum(parts) / 4
    assert found.identical == sum(part == NEW for part in parts) / 4
    hits, losses = 0, []
    for prompt, theirs, ours in zip(PROMPTS, dense, sparse, strict=True):
        cache = DynamicCache(config=model.config)
        with control.dense():
            model(input_ids=prompt[None], past_key_values=cache)
        for given, wanted in itertools.pairwise(theirs):
            logits = model(input_ids=torch.tensor([[given]]), past_key_values=cache).logits[0, -1]
            hits += int(logits.argmax()) == wanted
        with control.switched_off():
            ids = torch.cat([prompt, torch.tensor(ours)])[None]
            logprobs = model(input_ids=ids).logits[0, 11:-1].log_softmax(-1)
        losses.append(-float(logprobs.gather(1, torch.tensor(ours)[:, None]).mean()))
    assert found.top1_agreement == hits / (4 * (NEW - 1))
    assert found.sparse_text_perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert 0.4 < found.realised_sparsity < 0.8
