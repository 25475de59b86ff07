"""The general path on a GPU, as it is and compiled, beside transformers compiled, in one process, in turn.

    python benchmarks/general_gpu.py --out benchmarks/results/general-gpu.json [--models A,B] [--products]

Random weights, few blocks (compiling takes a minute a form for a whole model), one sequence, bfloat16. Models that have
a path of our own are decoded by the general path all the same. With --products first the products that dense steps are
made of, each in a graph of its own: how weights lie, and how experts are looked up.
"""

import argparse
import gc
import inspect
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare_decode import CompiledStep
from families_gpu import _with_layers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from teal_cli.atomic import write_json
from teal_cli.bench.decode import random_prompt
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.compiling import Compiling
from teal_cli.decode.deadline import OutOfTimeError, deadline
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.timing import seconds_of
from teal_cli.models import aliases
from teal_cli.models.layers import Experts, _Stacks, gathered_experts, unstack_experts_
from teal_cli.models.loading import build_random_model
from teal_cli.sparse import apply_plan_
from teal_cli.steps.prepared import prepare
from teal_cli.versions import device_description, library_versions
from teal_kernels import KEEP_ALL, input_major, sparse_linear

PROMPT, NEW_TOKENS = 64, 64
PEER_SECONDS = 100.0
ALIASES = {"gemma-3-4b": 6, "qwen3-30b-a3b": 4, "mixtral-8x7b": 2}
"""With plans at 50 %, of so many blocks."""
DENSE: dict[str, dict[str, Any]] = {
    "jamba": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
    },
    "mamba2": {"hidden_size": 2560, "num_hidden_layers": 8, "num_heads": 80, "head_dim": 64, "vocab_size": 50288},
    "gpt_bigcode": {"n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 4, "vocab_size": 49152},
    "gpt_neo": {"hidden_size": 2048, "num_layers": 6, "num_heads": 16, "attention_types": [[["global", "local"], 3]]},
}
"""Model types without a program, decoded dense."""


def in_a_graph(work: Callable[[], Any], repeats: int = 20) -> float:
    """Microseconds of work that is replayed."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times = [seconds_of(graph.replay, torch.device("cuda")) for _ in range(7)]
    return statistics.median(times) / repeats * 1e6


@torch.no_grad()
def products() -> list[dict[str, Any]]:
    """Dense products of one row, by how the weights lie; weights of 1 GB in turn, so that no cache holds them."""
    found = []
    for n_out, n_in in ((4096, 4096), (28672, 4096), (4096, 14336)):
        size = n_out * n_in * 2
        rows = [torch.randn(n_out, n_in, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, (1 << 30) // size))]
        turned = [input_major(weight) for weight in rows]
        x, keep = torch.randn(1, n_in, dtype=torch.bfloat16, device="cuda"), torch.tensor(KEEP_ALL, device="cuda")

        def all_of(weights: list[Tensor], product: Callable[[Tensor], Tensor]) -> float:
            return in_a_graph(lambda: [product(weight) for weight in weights], 2) / len(weights)

        times = {
            "row-major": all_of(rows, lambda weight: F.linear(x, weight)),  # noqa: B023
            "input-major": all_of(turned, lambda weight: F.linear(x, weight)),  # noqa: B023
            "ours, nothing dropped": all_of(turned, lambda w: sparse_linear(x, w, None, keep, "triton")),  # noqa: B023
        }
        found.append({"out": n_out, "in": n_in, "microseconds": times})
    return found


@torch.no_grad()
def experts() -> list[dict[str, Any]]:
    """Experts of one block and one row, compiled, by function and by how the weights lie."""
    found = []
    for name, count, k, hidden, size in (("qwen3-30b-a3b", 128, 8, 2048, 768), ("mixtral-8x7b", 8, 2, 4096, 14336)):
        config = AutoConfig.for_model(
            "mixtral", hidden_size=hidden, intermediate_size=size, num_local_experts=count, num_hidden_layers=1
        )
        with torch.device("cuda"):
            block = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.layers[0]
        unstack_experts_(block)
        module = block.mlp.experts
        x, weights = torch.randn(1, hidden, dtype=torch.bfloat16, device="cuda"), torch.full((1, k), 1 / k).cuda()
        chosen = [torch.randperm(count)[None, :k].cuda() for _ in range(8)]
        for lie in ("row-major", "input-major"):
            if lie == "input-major":
                for layer in (module.gate_up_proj, module.down_proj):
                    layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
            times = {}
            for function in ("grouped_mm", "batched_mm", "gathered"):
                compute = gathered_experts if function == "gathered" else ALL_EXPERTS_FUNCTIONS[function]
                torch._dynamo.reset()

                def run(module: Experts, index: Tensor, compute: Any = compute) -> Tensor:
                    result: Tensor = compute(_Stacks(module), x, index, weights)  # noqa: B023
                    return result

                compiled = torch.compile(run, fullgraph=True, dynamic=False)
                times[function] = in_a_graph(lambda: [compiled(module, i) for i in chosen], 1) / len(chosen)  # noqa: B023
            found.append({"experts": name, "weights": lie, "microseconds": times})
    return found


@torch.no_grad()
def speed(engine: Engine, prompt: Tensor, *, sparse: bool, compiled: bool) -> float:
    """Tokens a second."""
    control = engine.control
    with control.switched_off() if control is not None and not sparse else nullcontext():
        cache = engine.new_cache(PROMPT + NEW_TOKENS + 8, compiled)
        sampler = Sampler(SamplingConfig(), engine.device)
        loop = TokenLoop(engine, cache, sampler.next_token(engine.prefill(prompt, cache)), sampler)
        for _ in range(4):
            loop.advance()
        return NEW_TOKENS / seconds_of(lambda: [loop.advance() for _ in range(NEW_TOKENS)], engine.device)


def build(name: str) -> Any:
    """A random model without a program."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = AutoConfig.for_model(name, **DENSE[name])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def peers(plain: Any, prompt: Tensor) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """transformers' compiled steps that work, and why others do not; with experts, by two functions."""
    found: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    if "past_key_values" not in inspect.signature(type(plain).forward).parameters:
        return found, {"transformers": "a state under another name: CompiledStep does not know it"}
    has_experts = any(hasattr(module, "gate_up_proj") and hasattr(module, "num_experts") for module in plain.modules())
    for kind in ("grouped_mm", "batched_mm") if has_experts else ("",):
        step = CompiledStep(plain, mode="reduce-overhead")

        def speed_of(tokens: int = NEW_TOKENS, step: CompiledStep = step, kind: str = kind) -> float:
            if kind:
                plain.set_experts_implementation(kind)
            return step.speed(prompt, tokens)

        try:
            with deadline(PEER_SECONDS):
                for _ in range(3):
                    speed_of()  # with as many positions as later
            found[f"transformers compiled{kind and f', {kind}'}"] = speed_of
        except OutOfTimeError as error:
            failed[f"transformers {kind}"] = str(error)
        except Exception as error:
            failed[f"transformers {kind}"] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, failed


def compare(name: str, repeats: int, reporter: Reporter) -> dict[str, Any]:
    """One model: theirs and ours, in turn."""
    config = BenchConfig(
        model=name, random_weights=True, sparsity=[0.5], prompt_tokens=PROMPT, dtype="bfloat16", device="cuda"
    )
    with _with_layers(name, ALIASES[name]) if name in ALIASES else nullcontext():
        if name in ALIASES:
            plain = build_random_model(aliases.require_alias(name), device="cuda", dtype="bfloat16", seed=0)
            prepared = prepare(config, reporter)
            model = prepared.model
            apply_plan_(model, prepared.plans[0])
        else:
            plain, model = build(name), build(name)
            unstack_experts_(model)
    prompt = random_prompt(int(plain.config.get_text_config().vocab_size), PROMPT, 0).cuda()
    theirs, failed = peers(plain, prompt)
    engine = Engine(model, path="general", never_worse=True, compiling=Compiling("auto"))
    choices = [engine.choose(prompt, PROMPT + NEW_TOKENS + 8)]
    for line in choices[0].lines:
        reporter.say(f"{name}: {line}")
    ways = dict(theirs)
    for form in choices[0].forms:
        for compiled in (False, True)[: 1 + (form.compiled_seconds is not None)]:

            def our_speed(sparse: bool = form.kind == "sparse", compiled: bool = compiled) -> float:
                return speed(engine, prompt, sparse=sparse, compiled=compiled)

            ways[f"ours {form.kind}{', compiled' if compiled else ''}"] = our_speed
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, measure in ways.items():
            speeds[way].append(measure())
    medians = {way: statistics.median(found) for way, found in speeds.items()}
    return {
        "model": name,
        "layers": plain.config.get_text_config().num_hidden_layers,
        "decodes": choices[0].decodes,
        "compiled": choices[0].compiled,
        "tokens_per_second": medians,
        "failed": failed | {form.kind: form.because for form in choices[0].forms if form.because},
    }


def main() -> None:
    """Measure, and write after each model, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join([*ALIASES, *DENSE]))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--products", action="store_true")
    options = parser.parse_args()
    quieten_libraries()
    reporter = Reporter()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_description(torch.device("cuda")),
        "versions": library_versions(),
        "products": [],
        "experts": [],
        "models": [],
    }
    if options.products:
        result["products"], result["experts"] = products(), experts()
        for entry in (*result["products"], *result["experts"]):
            reporter.say(str(entry))
        write_json(options.out, result)
    for name in filter(None, options.models.split(",")):
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        found = compare(name, options.repeats, reporter)
        result["models"].append(found)
        reporter.say(str(found))
        write_json(options.out, result)


if __name__ == "__main__":
    main()
