"""What 4 bits cost here and in llama.cpp: perplexity of SmolLM2-135M on one text, and the bytes that a token reads.

    python benchmarks/quality_llama_cpp.py --llama-quantize PATH --out benchmarks/results/quality-4bit-llama.json

llama.cpp's files are dequantised into float32 weights and evaluated by the same code as ours, so only weights differ
(llama.cpp besides rounds activations to 8 bits, which is not in these figures). Its files are made as it does by
default, without an importance matrix. Ours are GPTQ, with the text and the tokens that `teal calibrate` takes.

The packaged weights are themselves 4-bit codes in groups of 32 inputs. A scheme with such groups finds 16 values in
each of them and can keep them all, one with other steps cannot. So everything is measured on the same network with its
channels in another order (`permute`): its function and the set of its weights stay, and no group of 32 has 16 values
any more. What groups of 32 reach on the packaged order is in the result as well.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from quantised_quality import MODEL, evaluation_blocks, losses, made_how, ratio_of

from teal_cli.atomic import write_json
from teal_cli.cli.output import quieten_libraries
from teal_cli.config import CalibrateConfig, EvalConfig
from teal_cli.console import Reporter
from teal_cli.data import token_blocks
from teal_cli.evaluation.results import EvalResult
from teal_cli.model_loading import load_model
from teal_cli.models.aliases import require_alias
from teal_cli.models.gguf import converted
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.quantise.model import quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.steps.calibrate import calibrate
from teal_cli.steps.evaluate import evaluate

LLAMA_KINDS = ("Q8_0", "Q4_K_M", "Q4_0")
SCHEMES = ("int8", "int4:32", "int4:64", "int4:128")
ON_PACKAGED = ("Q4_0", "int4:32")
"""What is also measured with the channels in the order of the package."""
SPARSE = "int4:32"
"""The scheme that is also measured at a sparsity."""


def permute(file: Path, seed: int = 0) -> None:
    """Put the channels of a Llama in a float32 GGUF file in another order, in place.

    The channels of the residual stream, of each MLP, and within each head of v: those are inputs of all projections.

    Args:
        file: to change.
        seed: of the order.
    """
    generator = np.random.default_rng(seed)
    reader = GGUFReader(file, "r+")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    stream = generator.permutation(tensors["token_embd.weight"].shape[1])
    heads = int(reader.fields["llama.attention.head_count"].contents())
    of_kv = int(reader.fields["llama.attention.head_count_kv"].contents())
    for name in ("token_embd.weight", "output_norm.weight"):
        tensors[name][:] = tensors[name][..., stream]
    for block in range(int(reader.fields["llama.block_count"].contents())):
        part = {kind: tensors[f"blk.{block}.{kind}.weight"] for kind in PARTS}
        for kind in ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            part[kind][:] = part[kind][..., stream]
        neurons = generator.permutation(part["ffn_down"].shape[1])
        for kind in ("ffn_gate", "ffn_up"):
            part[kind][:] = part[kind][neurons]
        size = part["attn_v"].shape[0] // of_kv
        within = [generator.permutation(size) for _ in range(of_kv)]
        of_v = np.concatenate([head * size + order for head, order in enumerate(within)])
        of_o = np.concatenate([head * size + within[head * of_kv // heads] for head in range(heads)])
        part["attn_v"][:] = part["attn_v"][of_v]
        part["attn_output"][:] = part["attn_output"][stream][:, of_o]
        part["ffn_down"][:] = part["ffn_down"][stream][:, neurons]


PARTS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)


def types_of(file: Path) -> dict[str, dict[str, int]]:
    """Of a GGUF file, what its matrices are stored in: kind of matrix -> type -> how many."""
    found: dict[str, dict[str, int]] = {}
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else tensor.name.split(".")[0]
            types = found.setdefault(kind, {})
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return found


def _parameters(model: Any) -> int:
    """Weights of a model whose output layer is its embedding."""
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(size: int, parameters: int) -> dict[str, Any]:
    return {"bytes_per_token": size, "bytes_per_weight": size / parameters}


class Trial:
    """One order of the channels: its float32 file, its folder, and what every kind of weights costs there."""

    def __init__(self, program: Path, packaged: Path, folder: Path, *, permuted: bool) -> None:
        self.program, self.folder, self.permuted = program, folder, permuted
        self.float_file = self._llama_file(packaged, "F32")
        if permuted:
            permute(self.float_file)
        self.source = converted(self.float_file)
        self.tokenizer = load_tokenizer(self.source)

    def _llama_file(self, file: Path, kind: str) -> Path:
        made = self.folder / f"{'permuted' if self.permuted else 'packaged'}.{kind}.gguf"
        command: list[str | Path] = [self.program, "--allow-requantize", file, made, kind]
        said = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 (the user's own program)
        lines = (said.stdout + said.stderr).splitlines()
        self.version = next((line for line in lines if line.startswith("version")), "unknown version")
        return made

    def dense(self, blocks: torch.Tensor) -> tuple[list[float], dict[str, Any]]:
        """Losses of the float32 weights, and their bytes."""
        model = load_model(self.source, device="cpu", dtype="float32")
        return losses(model, blocks), {
            "weights": "float32",
            **_sizes(weight_bytes_per_token(model, {}), _parameters(model)),
        }

    def of_llama(self, kind: str, blocks: torch.Tensor) -> tuple[list[float], dict[str, Any]]:
        """Losses of weights that llama.cpp quantised, and their bytes."""
        file = self._llama_file(self.float_file, kind)
        model = load_model(converted(file), device="cpu", dtype="float32")
        size = sum(tensor.n_bytes for tensor in GGUFReader(file).tensors)
        return losses(model, blocks), {"weights": kind, "types": types_of(file), **_sizes(size, _parameters(model))}

    @torch.no_grad()
    def of_ours(self, text: str, blocks: torch.Tensor) -> tuple[list[float], dict[str, Any]]:
        """Losses of weights that we quantise, output layer in 8 bits, and their bytes."""
        model = load_model(self.source, device="cpu", dtype="float32")
        parameters = _parameters(model)
        defaults = CalibrateConfig()
        calibrated_on = token_blocks(
            defaults.dataset,
            self.tokenizer,
            tokens=defaults.tokens,
            seq_len=defaults.seq_len,
            seed=defaults.seed,
            half="calibration",
        )[: defaults.quantise_tokens // defaults.seq_len]
        packs = quantise_(model, Scheme.parse(text), output_layer=True, batches=calibrated_on.split(1))
        size = weight_bytes_per_token(model, {}, packs)
        return losses(model, blocks), {"weights": text, **_sizes(size, parameters)}

    def sparse(self, text: str, sparsity: float, tokens: int) -> dict[str, Any]:
        """The perplexity at a sparsity over that of the same quantised weights, as the verbs do it."""
        shared = {
            **{"model": str(self.source), "quantise": text, "quantise_output": True},
            **{"runs": self.folder / "runs", "device": "cpu", "dtype": "float32"},
        }
        reporter = Reporter(quiet=True)
        calibrate(CalibrateConfig(**shared), reporter)
        result = evaluate(EvalConfig(**shared, sparsity=[sparsity], tokens=tokens), reporter)
        if not isinstance(result, EvalResult):
            raise TypeError(f"{MODEL} was evaluated as an encoder")
        comparison = result.runs[0].comparison
        return {
            "target_sparsity": sparsity,
            "realised_sparsity": comparison.realised_sparsity,
            "over_its_dense": comparison.ratio,
            "over_its_dense_stderr": comparison.ratio_stderr,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", type=Path, required=True, help="program of llama.cpp")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    quieten_libraries()
    packaged = require_alias(MODEL).packaged_file()
    if packaged is None:
        raise SystemExit(f"the weights of {MODEL} are not installed")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEAL_HOME"] = folder  # each float32 folder takes 540 MB, and none is needed again
        program = arguments.llama_quantize.resolve()
        measure(program, packaged, Path(folder), arguments)


def measure(program: Path, packaged: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure and write all that the file does not have yet, the permuted order first; it is written after each."""
    permuted = Trial(program, packaged, folder, permuted=True)
    blocks = evaluation_blocks(permuted.tokenizer, arguments.sequences)
    dense, of_float = permuted.dense(blocks)
    how = made_how(MODEL, blocks, torch.device("cpu"))
    perplexity = math.exp(statistics.mean(dense))
    result = {
        **how,
        "command": how["command"].replace(str(arguments.llama_quantize), program.name),
        "llama_cpp": permuted.version,
        "dense_perplexity": perplexity,
        "dense_perplexity_stderr": perplexity * statistics.stdev(dense) / len(dense) ** 0.5,
        "sparsity": arguments.sparsity,
        "runs": _had(arguments.out, len(blocks), perplexity),
    }
    runs: list[dict[str, Any]] = result["runs"]

    def keep(trial: Trial, weights: str, found: Callable[[], tuple[list[float], dict[str, Any]]]) -> None:
        channels = "permuted" if trial.permuted else "packaged"
        if any((run["channels"], run["weights"]) == (channels, weights) for run in runs):
            return
        its_losses, entry = found()
        ratio, error = ratio_of(its_losses, dense)
        runs.append({"channels": channels, **entry, "perplexity_ratio": ratio, "stderr": error, "sparse": None})
        print({key: value for key, value in runs[-1].items() if key != "types"}, flush=True)
        write_json(arguments.out, result)

    def keep_all(trial: Trial, names: tuple[str, ...]) -> None:
        for name in names:
            measured = trial.of_llama if name in LLAMA_KINDS else trial.of_ours
            keep(trial, name, partial(measured, name, blocks))

    keep(permuted, "float32", lambda: (dense, of_float))
    keep_all(permuted, (*LLAMA_KINDS, *SCHEMES))
    as_packaged = Trial(program, packaged, folder, permuted=False)
    before = as_packaged.dense(blocks[:2])[0]
    result["permuted_differs_by"] = max(abs(own - other) for own, other in zip(dense, before, strict=False))
    keep_all(as_packaged, ON_PACKAGED)
    of_sparse = next(run for run in runs if run["weights"] == SPARSE)
    if of_sparse["sparse"] is None:
        found = permuted.sparse(SPARSE, arguments.sparsity, blocks.numel())
        of_sparse["sparse"] = {**found, "perplexity_ratio": of_sparse["perplexity_ratio"] * found["over_its_dense"]}
        print(of_sparse["sparse"], flush=True)
    write_json(arguments.out, result)


def _had(file: Path, sequences: int, perplexity: float) -> list[dict[str, Any]]:
    """What a file has of the same text and dense network: a run that was interrupted goes on."""
    if not file.is_file():
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    same = before["sequences"] == sequences and math.isclose(before["dense_perplexity"], perplexity, rel_tol=1e-4)
    return list(before["runs"]) if same else []


if __name__ == "__main__":
    main()
