"""The GPU figures of one sequence that the README and docs quote, measured in one go.

    python benchmarks/gpu_decode.py --out benchmarks/results [--gpt-fast CLONE]

Random weights of the models' shapes, thresholds calibrated on them. First the main model dense and
sparse, product by product too; then longer contexts, peak memory, other models, prefill beside
transformers' and, given a clone of gpt-fast, its model in turn with ours (in a JSON of their own).
"""

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from teal_cli.atomic import write_json
from teal_cli.bench.decode import decode_seconds, random_prompt
from teal_cli.bench.timing import Spread
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.timing import seconds_of
from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import build_random_model
from teal_cli.steps.bench import measure
from teal_cli.steps.prepared import Prepared, prepare
from teal_cli.versions import device_description, library_versions

MODEL = "llama-3-8b"
SPARSITIES = [0.25, 0.4, 0.5, 0.65, 0.8]
CONTEXTS = (2048, 8000)
OTHER_MODELS = ("llama-2-7b", "mistral-7b", "llama-3.2-1b", "llama-3.2-3b")
PROMPT, NEW_TOKENS = 128, 128


def config_for(model: str, sparsity: list[float], *, repeats: int, kernels: bool = False) -> BenchConfig:
    """What `teal bench --random-weights` would be told."""
    return BenchConfig(
        model=model,
        random_weights=True,
        sparsity=sparsity,
        prompt_tokens=PROMPT,
        new_tokens=NEW_TOKENS,
        repeats=repeats,
        kernels=kernels,
        dtype="bfloat16",
        device="cuda",
    )


@torch.no_grad()
def prefill(prepared: Prepared, tokens: int, repeats: int) -> dict[str, Any]:
    """Our prefill beside transformers' on the same weights row by row, in turn."""
    plain = build_random_model(require_alias(MODEL), device="cuda", dtype="bfloat16", seed=0)
    engine = Engine(prepared.model)
    ids = random_prompt(int(plain.config.vocab_size), tokens, 0).cuda()

    def ours() -> None:
        engine.prefill(ids, engine.new_cache(tokens + 8))

    def theirs() -> None:
        plain(input_ids=ids, use_cache=True, logits_to_keep=1)

    pairs = [(seconds_of(ours, ids.device) * 1e3, seconds_of(theirs, ids.device) * 1e3) for _ in range(repeats + 3)][3:]
    return {
        "tokens": tokens,
        "milliseconds": asdict(Spread.of([a for a, _ in pairs])),
        "transformers_milliseconds": asdict(Spread.of([b for _, b in pairs])),
        "ratio": statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs),
    }


def peak_memory(prepared: Prepared) -> dict[str, int]:
    """Bytes while a reply of 128 tokens to 128 is generated, the model on the GPU already."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = Engine(prepared.model)
    list(engine.generate(prepared.prompt, max_new_tokens=NEW_TOKENS, sampling=SamplingConfig()))
    shape = prepared.model.config
    per_position = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return {
        "weights": sum(p.nbytes for p in prepared.model.parameters()),
        "cache": per_position * (prepared.prompt.shape[1] + NEW_TOKENS),
        "peak": torch.cuda.max_memory_allocated(),
    }


class GptFast:
    """gpt-fast's model with random weights, its step compiled as gpt-fast compiles it (greedy)."""

    def __init__(self, clone: Path) -> None:
        spec = importlib.util.spec_from_file_location("gpt_fast_model", clone / "model.py")
        if spec is None or spec.loader is None:
            raise SystemExit(f"{clone} has no model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        torch._inductor.config.coordinate_descent_tuning = True
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            self.model = module.Transformer.from_name(MODEL).eval()
            torch.set_default_dtype(torch.float32)
            self.model.setup_caches(1, PROMPT + 2 * NEW_TOKENS)

        def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(token, position)
            return logits[:, -1].argmax(-1, keepdim=True)

        self.step = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def speed(self) -> float:
        """Tokens a second."""
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        position = torch.tensor([PROMPT], device="cuda")

        def decode(steps: int) -> None:
            current = token
            for _ in range(steps):
                current = self.step(current, position).clone()
                position.add_(1)

        decode(8)
        return NEW_TOKENS / seconds_of(lambda: decode(NEW_TOKENS), token.device)


def beside_gpt_fast(prepared: Prepared, clone: Path, repeats: int) -> dict[str, Any]:
    """gpt-fast, ours dense and ours at 50 %, in turn."""
    engine = Engine(prepared.model)
    half = next(plan for plan in prepared.plans if plan.target_sparsity == 0.5)

    def ours(plan: SparsityPlan | None) -> float:
        return NEW_TOKENS / decode_seconds(engine, plan, prepared.prompt, NEW_TOKENS)

    theirs = GptFast(clone)
    theirs.speed()
    rows = [(theirs.speed(), ours(None), ours(half)) for _ in range(repeats)]
    names = ("gpt_fast", "ours_dense", "ours_50")
    return {name: asdict(Spread.of(list(column))) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def main() -> None:
    """Measure, and write one JSON after each part, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpt-fast", type=Path, help="a clone of gpt-fast")
    arguments = parser.parse_args()
    quieten_libraries()
    reporter, repeats = Reporter(), arguments.repeats
    device = device_description(torch.device("cuda"))
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device,
        "versions": library_versions(),
        "runs": [],
    }

    def keep() -> None:
        write_json(arguments.out / "decode-gpu.json", result)

    def run(config: BenchConfig, prepared: Prepared) -> None:
        measured = measure(config, prepared, reporter).to_json()
        result["runs"].append(measured)
        for entry in measured["runs"]:
            speed = entry["tokens_per_second"]
            reporter.say(
                f"{measured['model']} batch {measured['batch']} after {measured['prompt_tokens']}: "
                f"sparsity {entry['realised_sparsity']:.3f} "
                f"{speed['median']:.1f} ({speed['min']:.1f}-{speed['max']:.1f}) tokens/s"
            )
        for entry in measured["kernels"]:
            reporter.say(
                f"  {entry['out_features']} x {entry['in_features']} {entry['backend']} {entry['sparsity']} "
                f"{entry['microseconds']['median']:.2f} us {entry['gb_s']:.0f} GB/s"
            )
        keep()

    main_config = config_for(MODEL, SPARSITIES, repeats=repeats, kernels=True)
    prepared = prepare(main_config, reporter)
    run(main_config, prepared)
    half = [plan for plan in prepared.plans if plan.target_sparsity == 0.5]
    vocabulary = int(prepared.model.config.vocab_size)
    half_config = config_for(MODEL, [0.5], repeats=repeats)
    for tokens in CONTEXTS:
        run(half_config, replace(prepared, plans=half, prompt=random_prompt(vocabulary, tokens, 0)))
    result["peak_memory_bytes"] = peak_memory(prepared)
    reporter.say(json.dumps(result["peak_memory_bytes"]))
    keep()
    for name in OTHER_MODELS:
        torch.cuda.empty_cache()
        config = config_for(name, [0.5], repeats=repeats)
        run(config, prepare(config, reporter))
    torch.cuda.empty_cache()
    result["prefill"] = prefill(prepared, 2048, 2 * repeats)
    reporter.say(json.dumps(result["prefill"]))
    keep()
    if arguments.gpt_fast:
        beside = beside_gpt_fast(prepared, arguments.gpt_fast, repeats)
        reporter.say(json.dumps(beside))
        about = {name: result[name] for name in ("command", "device", "versions")}
        write_json(arguments.out / "decode-gpu-beside-gpt-fast.json", {**about, **beside})


if __name__ == "__main__":
    main()
