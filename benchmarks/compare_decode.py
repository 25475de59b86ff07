"""Our dense and sparse decoding beside transformers' `generate`, in one process, in turn.

    python benchmarks/compare_decode.py --out benchmarks/results

transformers runs the unmodified model (row-major weights); ours runs the same weights made sparse in
memory. Prefill is not timed; for `generate`, its time for one new token is taken off that for all.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from teal_cli.atomic import write_json
from teal_cli.bench.decode import DecodeRun, bench_decode, text_prompt
from teal_cli.bench.timing import Spread
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.timing import seconds_of, synchronize
from teal_cli.model_loading import load_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import allocate, recalibrate
from teal_cli.sparse import sparsify_, use_backend
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.steps.artefacts import calibration_for
from teal_cli.versions import device_description, library_versions
from teal_cli.workspace import Workspace


def transformers_speed(model: Any, prompt: torch.Tensor, new_tokens: int) -> float:
    """Tokens a second of `generate`, greedy, without the first token."""

    def seconds(count: int) -> float:
        return seconds_of(
            lambda: model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count), prompt.device
        )

    return new_tokens / (seconds(new_tokens + 1) - seconds(1))


class CompiledStep:
    """The strongest dense decoding of plain transformers: static cache, compiled step (needs a C++ compiler)."""

    def __init__(self, model: PreTrainedModel, mode: str | None = None) -> None:
        self.model = model
        self._caches: dict[int, StaticCache] = {}  # another address would have graphs recorded anew, within the time

        def step(token: torch.Tensor, cache: StaticCache) -> torch.Tensor:
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            chosen: torch.Tensor = logits[:, -1:].argmax(-1)
            return chosen

        self.step = torch.compile(step, fullgraph=True, mode=mode)

    @torch.no_grad()
    def speed(self, prompt: torch.Tensor, new_tokens: int) -> float:
        """Tokens a second, without the prefill."""
        length = prompt.shape[1] + new_tokens
        if length not in self._caches:
            self._caches[length] = StaticCache(config=self.model.config, max_cache_len=length)
        cache = self._caches[length]
        cache.reset()
        token = self.model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        synchronize(prompt.device)
        started = time.perf_counter()
        for _ in range(new_tokens):
            token = self.step(token, cache).clone()  # a captured graph writes into the same memory at each step
        synchronize(prompt.device)
        return new_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sparsity", default="0.4,0.5,0.65")
    parser.add_argument("--allocation", default="fisher,fisher-site")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="also transformers with a static cache and torch.compile"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quieten_libraries()

    config = BenchConfig(model=options.model, device=options.device, dtype=options.dtype)
    targets = [float(value) for value in options.sparsity.split(",")]
    reporter = Reporter()
    workspace = Workspace.of(config, reporter)
    calibration = calibration_for(config, workspace, reporter)
    folder = workspace.source.folder
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(options.device).eval()
    model = load_model(folder, device=options.device, dtype=options.dtype)
    plans = [
        allocate(config, calibration, target, name) for name in options.allocation.split(",") for target in targets
    ]
    control = sparsify_(model, plans[0])
    plans = [recalibrate(config, plan, calibration, workspace.source, reporter, model)[0] for plan in plans]
    engine = Engine(model)
    use_backend(control, "auto", engine.device, model.dtype)
    prompt = text_prompt(load_tokenizer(folder), options.prompt_tokens, seed=0).to(options.device)

    peers = {"transformers generate": lambda: transformers_speed(plain, prompt, options.new_tokens)}
    if options.compile:
        compiled = CompiledStep(plain)
        peers["transformers, torch.compile"] = lambda: compiled.speed(prompt, options.new_tokens)
    for measure in peers.values():
        measure()
    rounds: list[list[DecodeRun]] = []
    others: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.repeats):  # one round: the peers, then ours dense and at each sparsity
        for name, measure in peers.items():
            others[name].append(measure())
        rounds.append(bench_decode(engine, plans, prompt, new_tokens=options.new_tokens, repeats=1))
    dense = Spread.of([runs[0].tokens_per_second.median for runs in rounds])
    results = []
    for index, first in enumerate(rounds[0]):
        speed = Spread.of([runs[index].tokens_per_second.median for runs in rounds])
        entry = asdict(first) | {
            "allocation": plans[index - 1].allocation if index else None,
            "tokens_per_second": asdict(speed),
            "bandwidth_gb_s": (first.bytes_per_token or 0) * speed.median / 1e9,
            "speedup": speed.median / dense.median,
            "speedup_by_round": [r[index].tokens_per_second.median / r[0].tokens_per_second.median for r in rounds],
        }
        results.append(entry)
    size = weight_bytes_per_token(plain, {})
    for name, speeds in others.items():
        other = Spread.of(speeds)
        results.append(
            {
                "backend": name,
                "allocation": None,
                "sparsity": 0.0,
                "realised_sparsity": 0.0,
                "tokens_per_second": asdict(other),
                "bytes_per_token": size,
                "bandwidth_gb_s": size * other.median / 1e9,
                "speedup": other.median / dense.median,
            }
        )
    result = {
        "command": shlex.join(["python", "benchmarks/compare_decode.py", *sys.argv[1:]]),
        "model": options.model,
        "device": device_description(engine.device),
        "dtype": options.dtype,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "versions": library_versions(),
        "runs": results,
        "kernels": [],
    }
    write_json(options.out / f"decode-{options.model}-{options.device}.json", result)
    print(
        json.dumps(
            [
                {k: r[k] for k in ("backend", "allocation", "realised_sparsity", "tokens_per_second", "speedup")}
                for r in results
            ],
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
