"""Tiny models for the native path, and what it must give: transformers' forward in float64, with inputs dropped."""

import copy
from math import inf
from typing import Any

import pytest
import torch
from conftest import FAMILIES as ALL_FAMILIES
from conftest import TINY_CONFIGS
from fused_pair import THRESHOLDS, error_of, random_tokens
from tiny_configs import ALL_MIXTURES as ALL_MIXTURES
from tiny_configs import OTHERS as OTHERS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Rule, Threshold
from teal_cli.decode.cache import FixedCache, FixedLayer
from teal_cli.decode.engine import Engine
from teal_cli.decode.native_cache import NativeLayer
from teal_cli.decode.paths import native_session
from teal_cli.models.architectures import architecture_of, find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import SparseLinear, control_of, sparsify_
from teal_kernels.native.library import unavailable_reason

LIMIT = {torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 1e-3}
"""Relative. float32 sums of tiny models give 1e-6. A key or value that lies between two numbers of 16 bits may become
either by rounding: at most 1e-4 was seen."""
LIMIT_OF_4_BITS = 1.2e-4
"""Of one row: its inputs are rounded to 16 bits (`src/whole.h`). At most 9e-5 was seen."""
LIMIT_OF_FUSED = {torch.float32: 2e-5, torch.bfloat16: 0.08}
"""There what a launch leaves to the next is rounded to the model's dtype."""
NO_LIBRARY = unavailable_reason()
FAMILIES = [*TINY_CONFIGS, "qwen2-window", "gpt2", "opt"]


def use_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Of the native library."""
    monkeypatch.setattr(native_session, "default_threads", lambda: threads)


def tiny(family: str, **more: object) -> Any:
    """Of FAMILIES, and of conftest's. The weights of biases and norms are random too; `more`: of the configuration."""
    changes: dict[str, object] = {}
    if family == "qwen2-window":  # layers with and without a window, shorter than the prompts
        family, changes = "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    elif family == "opt":
        changes = {"word_embed_proj_dim": 64}  # conftest's has another width
    shape = {**ALL_FAMILIES[family], **changes, **more}
    model_type = shape.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).eval()
    unstack_experts_(model)
    program = architecture_of(model_type).program
    one = 1.0 if program is not None and program.norms.endswith("plus_one") else 0.0  # which is added to the weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5 - one, 1.5 - one)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # which is 1 before it is trained
                buffer.fill_(0.7)
    return model


def plan_for(model: Any, kind: str) -> SparsityPlan:
    """`alike`: one threshold a site. `apart`: one for each projection, and some are dense. `output`: its layer too."""
    rules: dict[str, Rule] = {}
    for index, projection in enumerate(find_projections(model, output_layer=kind == "output")):
        threshold = THRESHOLDS.get(projection.site.rpartition(".")[2], 0.4)
        rules[projection.name] = Threshold(threshold, 0.5)
        if kind == "apart":
            rules[projection.name] = Dense() if index % 4 == 1 else Threshold(threshold * (0.6 + 0.1 * index), 0.4)
    return SparsityPlan("uniform", 0.5, rules)


def sparse(model: Any, plan: str = "alike", scheme: str | None = None, *, output: bool = False) -> Any:
    """The model with a plan, and with quantised weights where a scheme is given; `output`: its output layer too."""
    packs = {} if scheme is None else quantise_(model, Scheme.parse(scheme), output_layer=output)
    sparsify_(model, plan_for(model, plan))
    pack_(model, packs)
    return model


class _Rounded(FixedLayer):
    """A cache in float64 of states that were rounded as the model's own cache rounds them."""

    rounded_to = torch.float32

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*(states.to(self.rounded_to).double() for states in (key_states, value_states)))


class Exact:
    """A copy of a sparse model in float64, which takes a step from what a cache of the native or fused path holds."""

    def __init__(self, model: Any) -> None:
        self.dtype: torch.dtype = model.dtype
        self.model = copy.deepcopy(model).double()
        self.control = control_of(self.model)
        self.control.backend = "reference"
        self.nearest = inf
        """To its threshold, of all inputs of decoded tokens so far: by which share it is apart from it."""
        for layer in self.model.modules():
            if isinstance(layer, SparseLinear):
                layer.register_forward_pre_hook(self._seen)

    def _seen(self, layer: SparseLinear, args: tuple[Tensor, ...]) -> None:
        tokens = args[1].states if len(args) > 1 else args[0].shape[-2]  # type: ignore[attr-defined]
        if tokens == 1 and layer.rule.threshold > 0:
            self.nearest = min(self.nearest, float((args[0].abs() / layer.rule.threshold - 1).abs().min()))

    def step(self, token: Tensor, cache: FixedCache) -> Tensor:
        """(rows, 1) int64 -> (rows, vocabulary) float64; the cache stays as it is."""
        logits = []
        for row, length in enumerate(cache.row_lengths()):
            known = FixedCache(len(cache.layers), length + 1, _Rounded)
            for layer, own in zip(cache.layers, known.layers, strict=True):
                own.rounded_to = self.dtype  # type: ignore[attr-defined]
                keys = layer.keys[row : row + 1]
                if isinstance(layer, NativeLayer):
                    keys = keys.transpose(-1, -2).flatten(2, 3)
                states = (state[:, :, :length].double() for state in (keys, layer.values[row : row + 1]))
                own.update(*(state.repeat_interleave(layer.copies, dim=1) for state in states))
            output = self.model(input_ids=token[row : row + 1], past_key_values=known, use_cache=True)
            logits.append(output.logits[:, -1])
        return torch.cat(logits)


def exact_prompt(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Logits behind dense prompts, padded on the right: (rows, tokens) int64 -> (rows, vocabulary) float64."""
    exact, logits = Exact(model), []
    for row, length in zip(ids, lengths, strict=True):
        layers = len(Engine(model, path="native").new_cache(1).layers)
        known = FixedCache(layers, length, _Rounded)
        for layer in known.layers:
            layer.rounded_to = exact.dtype  # type: ignore[attr-defined]
        with exact.control.dense():
            output = exact.model(input_ids=row[None, :length], past_key_values=known, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.cat(logits)


def _bits(model: Any) -> set[int]:
    packs = (layer.packed for layer in model.modules() if isinstance(layer, SparseLinear))
    return {packed.bits for packed in packs if packed is not None}


def check_decided_steps(model: Any, lengths: list[int]) -> None:
    """As `check_steps`, of tokens among whose inputs none is so near to its threshold that rounding decides.

    CPUs add in different orders, and with 4 bits errors are of another size (`LIMIT_OF_4_BITS`).
    """
    least = 3e-4 if 4 in _bits(model) else 1e-5
    assert any(check_steps(model, lengths, seed=seed, least=least) for seed in range(1, 41))


def check_steps(
    model: Any, lengths: list[int], steps: int = 3, *, seed: int = 1, least: float = 0.0, path: str = "native"
) -> bool:
    """Logits of steps after prompts, and the inputs that they dropped, against the exact model's.

    False where an input came nearer to its threshold than `least`: from there on nothing is compared.
    """
    engine, exact = Engine(model, path=path), Exact(model)
    bits = _bits(model)
    limit = max(LIMIT[exact.dtype], LIMIT_OF_4_BITS if 4 in bits else 0.0)
    if path == "fused":
        limit = 1e-4 if bits else LIMIT_OF_FUSED[exact.dtype]
    cache = engine.new_cache(max(lengths) + steps)
    engine.prefill(random_tokens(len(lengths), max(lengths)), cache, torch.tensor(lengths))
    tokens = random_tokens(len(lengths), steps, seed=seed)
    with control_of(model).counting() as counter, exact.control.counting() as expected_counter:
        for step in range(steps):
            token = tokens[:, step : step + 1]
            expected = exact.step(token, cache)
            if exact.nearest < least:
                return False
            got = engine.step(token, cache)
            assert path == "fused" or got.dtype == torch.float32
            for row in range(len(lengths)):
                assert (error := error_of(got[row], expected[row])) < limit, (step, row, error)
    assert counter.by_projection() == expected_counter.by_projection()
    wide = expected_counter.model_wide()  # sums of another order; none of a dense model
    assert counter.model_wide() == (None if wide is None else pytest.approx(wide, rel=1e-12))
    return True
