"""The general path compiled, on a real GPU: the text of other steps, captured as a graph."""

from typing import Any

import pytest
import torch
from conftest import VOCABULARY, build_family
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.compiling import Compiling
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import sparsify_

GREEDY = SamplingConfig()
ALWAYS = Compiling("always")
HYBRID = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "attn_layer_indices": [1],
}


def _ids() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))


def _written(model: Any, compiling: Compiling | None = None) -> list[int]:
    engine = Engine(model, path="general", compiling=compiling)
    return list(engine.generate(_ids(), max_new_tokens=24, sampling=GREEDY))


def _loop(engine: Engine, compiled: bool, steps: int) -> TokenLoop:
    cache, ids = engine.new_cache(20 + steps, compiled), _ids().cuda()
    sampler = Sampler(GREEDY, engine.device)
    loop = TokenLoop(engine, cache, sampler.next_token(engine.prefill(ids, cache)), sampler)
    for _ in range(steps):
        loop.advance()
    return loop


def _sparse(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build_family(family).to("cuda", dtype)
    sparsify_(model, SparsityPlan("uniform", 0.5, {p.name: Threshold(0.3, 0.5) for p in find_projections(model)}))
    return model


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_compiled_text_is_that_of_other_steps(family: str) -> None:
    """Dense and sparse; windows of 16 positions, which 44 leave."""
    model = _sparse(family)
    control = Engine(model, path="general").control
    assert control is not None
    assert _written(model, ALWAYS) == _written(model)
    with control.switched_off():
        assert _written(model, ALWAYS) == _written(model)
        engine = Engine(model, path="general")
        assert _loop(engine, True, 4)._graph is not None
        assert _loop(engine, False, 4)._graph is not None  # windows do not roll


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_dense_experts_are_captured(family: str, dtype: torch.dtype) -> None:
    model = _sparse(family, dtype)
    control = Engine(model, path="general").control
    assert control is not None
    with control.switched_off():
        engine = Engine(model, path="general", compiling=ALWAYS)
        assert engine.choose(_ids(), 44).compiled  # the logits were compared
        loop = _loop(engine, True, 4)
        assert loop._graph is not None
        if dtype == torch.float32:
            assert _written(model, ALWAYS) == _written(model)


def test_recurrent_states_are_captured_after_the_prompt() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bamba", **HYBRID)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model = model.to("cuda")
    assert _written(model, ALWAYS) == _written(model)
    assert _loop(Engine(model, path="general"), True, 4)._graph is not None
