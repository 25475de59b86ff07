"""Scales along inputs or along outputs: what either costs SmolLM2-135M by itself, nearest codes, 4 bits.

    python benchmarks/quantised_groups.py --out benchmarks/results/quantised-groups-smollm2-135m.json

Along inputs, a group of inputs of one output shares a scale and a zero point, as in GPTQ and AWQ checkpoints; along
outputs, a group of outputs of one input, which lies in the row of weights that is skipped with that input.
"""

import argparse
import statistics
from pathlib import Path

import torch
from quantised_quality import MODEL, evaluation_blocks, losses, made_how, ratio_of

from teal_cli.atomic import write_json
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.architectures import find_projections
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import Scheme
from teal_kernels.packing import dequantised

GROUPS = (128, 64)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = find_model(MODEL)
    blocks = evaluation_blocks(load_tokenizer(source.folder), arguments.sequences)
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
            ratio, error = ratio_of(losses(model, blocks), dense)
            run = {
                "group": group,
                "along": along,
                "perplexity_ratio": ratio,
                "stderr": error,
                "weight_error": statistics.mean(errors),
            }
            runs.append(run)
            print(run, flush=True)
    write_json(arguments.out, {**made_how(source.name, blocks, torch.device("cpu")), "runs": runs})


if __name__ == "__main__":
    main()
