"""What calibrating and adapting take of a model that no single GPU holds, its blocks spread over all of them.

    python benchmarks/spread_gpus.py --model llama-3-70b --out benchmarks/results/spread-gpus.json

Random weights, made where they lie. Calibrated as `teal calibrate --device-map auto` does it, then adapted by recipe
recover as `teal adapt --device-map auto --lora 16 --recompute` does it, for a few steps: seconds and memory count, the
loss of random weights says nothing.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from calibrate_gpu import Steps, calibrated_
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from teal_cli.adapt.loop import Run, run
from teal_cli.adapt.recipe import Setting
from teal_cli.adapt.recipes import recipe_class
from teal_cli.adapt.training import Plan
from teal_cli.atomic import write_json
from teal_cli.bench.decode import random_prompt
from teal_cli.config.recipes import options_of
from teal_cli.models.aliases import Alias, require_alias
from teal_cli.models.loading import outline
from teal_cli.models.offload import places_of, spread_
from teal_cli.models.random_weights import shrink_residual_
from teal_cli.versions import device_description, library_versions

SPARSITY = 0.5


class Rows(Dataset[dict[str, Tensor]]):
    """Random sequences, half of each dense."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._ids[index]
        return {"input_ids": row, "dense_prefix": torch.tensor(len(row) // 2)}


def build(alias: Alias) -> Any:
    """The alias's shape with random weights, spread over all GPUs."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(outline(alias).config, dtype=torch.bfloat16)
    places = places_of(model, to_train=True)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        device = next(places[path] for path in _paths(name) if path in places)
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        parent, _, own = name.rpartition(".")
        made = value.normal_(0, 0.02) if parameter.dim() > 1 else value.fill_(1.0)
        setattr(model.get_submodule(parent), own, torch.nn.Parameter(made, requires_grad=False))
    shrink_residual_(model)
    spread_(model, places)
    return model.eval()


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def adapted(model: Any, plan: Any, options: argparse.Namespace, vocabulary: int) -> Any:
    """A few steps of recover with adapters."""
    ids = random_prompt(vocabulary, options.train_len, 2, options.batch_size * (options.steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        how = Plan(
            folder=Path(folder),
            batch_size=options.batch_size,
            processes=1,
            accumulate=1,
            learning_rate=1e-4,
            warmup=0.0,
            schedule="cosine",
            clip=1.0,
            bf16=model.device.type == "cuda",
            on_cpu=model.device.type == "cpu",
            log_every=1,
            evaluate_every=options.steps,
            save_seconds=3600.0,
            patience=0,
            seed=0,
        )
        setting = Setting(options_of("recover")(), 0, SPARSITY, options.lora, plan)
        return run(
            Run(
                model=model,
                recipe=recipe_class("recover")(setting),
                plan=how,
                steps=options.steps,
                text=Rows(ids[options.batch_size :]),
                held_out=Rows(ids[: options.batch_size]),
                sequences=ids[:1].to(model.device),
                key="",
                teacher=lambda: None,  # adapters: the student is its own
                recompute=True,
                dtype=torch.bfloat16,
                on_step=lambda step: print("step", step, time.perf_counter(), flush=True),
            )
        )


def main() -> None:
    """Time each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--lora", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    alias, steps = require_alias(options.model), Steps()
    vocabulary = int(alias.shape["vocab_size"])
    model = steps.timed("building", lambda: build(alias))
    plan, _ = calibrated_(model, alias, steps, tokens=options.tokens, seq_len=options.seq_len, sparsity=SPARSITY)
    trained = steps.timed("recover", lambda: adapted(model, plan, options, vocabulary))
    losses = [point["loss"] for point in trained.curve if "loss" in point]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "model": alias.name,
        "gigabytes": 2 * sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        "gpus": torch.cuda.device_count(),
        "trained_tokens": options.steps * options.batch_size * options.train_len,
        "lora": options.lora,
        "losses": losses,
        "sparsity": SPARSITY,
        "steps": steps.found,
        "device": device_description(model.device),
        "versions": library_versions(),
    }
    write_json(options.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
