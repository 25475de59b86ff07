"""The product of a layer that vLLM runs, in CUDA graphs, on a real GPU."""

import pytest
import torch
import torch.nn.functional as F

from teal_cli.vllm_plugin.product import note_rows, prepare, product
from teal_kernels import KEEP_ALL, input_major, masked_input

# Layers of Llama-3-8B, as vLLM merges them.
LAYERS = {
    "qkv": (4096, [4096, 1024, 1024], [0.7, 0.5, KEEP_ALL]),
    "gate+up": (4096, [28672], [0.67]),
    "down": (14336, [4096], [0.8]),
}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_captured_product_follows_its_inputs(name: str, dtype: torch.dtype) -> None:
    inputs, parts, bounds = LAYERS[name]
    torch.manual_seed(0)
    weights = [input_major(torch.randn(sum(parts), inputs, device="cuda").to(dtype)) for _ in range(2)]
    bias, thresholds = torch.randn(sum(parts), device="cuda").to(dtype), torch.tensor(bounds, device="cuda")
    x = torch.randn(1, inputs, device="cuda").to(dtype)
    for weight in weights:
        prepare(weight, parts, 0.5)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):  # two layers of the same sizes, which share scratch memory
        ys = [product(x, weight, bias, thresholds, parts, 0.5) for weight in weights]
    for _ in range(3):
        x.copy_(torch.randn(1, inputs, device="cuda"))
        graph.replay()
        for weight, y in zip(weights, ys, strict=True):
            found, each = [], zip(weight.split(parts), bounds, strict=True)
            for part, bound in each:
                kept = masked_input(x, torch.tensor(bound, device="cuda")).double()
                found.append(F.linear(kept, part.double()))
            expected = torch.cat(found, dim=-1) + bias.double()
            assert float((y.double() - expected).norm() / expected.norm()) < LIMITS[dtype]
    rows = x.repeat(3, 1)
    assert torch.equal(product(rows, weights[0], bias, thresholds, parts, 0.5), F.linear(rows, weights[0], bias))


def test_noted_rows_are_captured() -> None:
    thresholds = torch.zeros(1, device="cuda")
    graphs = {}
    for rows in (1, 4):
        graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rows]):
            note_rows(torch.zeros(rows, 8, device="cuda"), thresholds, 0.25)
    for rows, wanted in ((4, KEEP_ALL), (1, 0.25), (4, KEEP_ALL)):
        graphs[rows].replay()
        assert thresholds.tolist() == [wanted]
