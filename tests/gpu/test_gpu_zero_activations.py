"""dReLU and FATReLU as keys of a configuration, on the fused path of a real GPU, beside transformers' forward."""

import pytest
import torch
from conftest import FAMILIES, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.decode.engine import Engine
from teal_cli.models.layers import unstack_experts_
from teal_cli.sparse import control_of, make_intrinsic_

KEYS: dict[str, dict[str, object]] = {"drelu": {}, "fatrelu": {"hidden_act_param": [0.1, 0.4]}}
STEPS = 6


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_steps_equal_the_general_path(family: str, name: str, rows: int) -> None:
    """In float32, and it counts the same zeros."""
    key = "hidden_activation" if family == "gemma2" else "hidden_act"
    shape = FAMILIES[family] | {key: name} | KEYS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.2)
    unstack_experts_(model)
    model.to("cuda")
    make_intrinsic_(model)
    control = control_of(model)
    ids = torch.randint(2, VOCABULARY, (rows, 12 + STEPS), generator=torch.Generator().manual_seed(1)).cuda()
    logits, counted = {}, {}
    for path, backend in (("general", "reference"), ("fused", "triton")):
        control.backend = backend
        engine = Engine(model, path=path)
        cache = engine.new_cache(12 + STEPS)
        engine.prefill(ids[:, :12], cache)
        with control.counting() as counter:
            found = [engine.step(ids[:, at : at + 1], cache).clone() for at in range(12, 12 + STEPS)]
        logits[path], counted[path] = torch.stack(found), counter.by_projection()
    error = (logits["fused"] - logits["general"]).norm() / logits["general"].norm()
    assert float(error) < 2e-4
    assert counted["fused"] == pytest.approx(counted["general"], abs=2e-3)
    downs = [share for projection, share in counted["fused"].items() if projection.endswith("down_proj")]
    assert min(downs) > 0.3
