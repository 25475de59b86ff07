"""Loading what one rank holds of a model: its slices of the weight files, and no more."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from teal_cli.errors import ArtefactError, UsageError, blame
from teal_cli.models.aliases import Alias
from teal_cli.models.architectures import Architecture, Kind
from teal_cli.models.cuts import Cut, taken
from teal_cli.models.layers import StackedLinear, unstack_experts_
from teal_cli.models.loading import auto_class, check_memory, kind_of, outline, pick_dtype, stored_dtype, without_bars
from teal_cli.models.random_weights import shrink_residual_
from teal_cli.models.shards import ShardPlan, check_shard, narrow_config, plan_shards, shard_output_, tie_output_
from teal_cli.models.stored_names import Place, in_order, places
from teal_cli.models.weights import weight_files
from teal_cli.models.wide_products import widen_products_
from teal_cli.quantise.storage import model_keys
from teal_cli.ranks.group import Ranks, gathering, summing
from teal_cli.reading import read_json
from teal_cli.schemes import Scheme
from teal_kernels.packing import Packed

_CODES = ("qweight", "scales", "zeros")


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model."""

    model: Any
    """Dense, in eval mode, with hooks that sum and gather over ranks. Where the files hold codes, weights are on the
    meta device."""
    plan: ShardPlan
    packs: dict[str, Packed]
    """Module path -> codes that the files hold."""


def load_shard(
    folder: Path,
    ranks: Ranks,
    *,
    dtype: str,
    architecture: Architecture | None = None,
    group: int = 0,
    schemes: dict[str, Scheme] | None = None,
) -> Shard:
    """Read what this rank holds of the model of a folder.

    Args:
        folder: dense, or with codes.
        ranks: that share it.
        dtype: as for `load_model`.
        architecture: the model's, where it is not that of the table.
        group: neurons that share scales, of a model that will be quantised; 0 for none.
        schemes: module path -> scheme, where the files hold codes.

    Raises:
        UsageError: a model that cannot be divided by so many.
        ArtefactError: a folder that cannot be read.
        MachineError: more than this rank's device has room for.
    """
    config = read_json(folder / "config.json", "model configuration")
    whole = outline(folder, architecture)
    files = weight_files(folder)
    plan = plan_shards(whole, ranks.rank, ranks.count, group=group)
    chosen = pick_dtype(dtype, stored_dtype(folder, config), ranks.device)
    model = _empty_shard(whole, plan, chosen, auto_class(kind_of(config, architecture)))
    held = sum(parameter.numel() for parameter in model.parameters()) * chosen.itemsize
    if schemes is None:
        check_memory(held, ranks.device, f"a shard of {folder}")
    packs = _Fill(model, plan, chosen, ranks.device, schemes or {}).from_files(files, whole)
    if whole.config.tie_word_embeddings and not any(name.startswith("lm_head") for name in packs):
        tie_output_(model, plan)
    known = set(packs)
    absent = [name for name, p in model.named_parameters() if p.is_meta and name.rpartition(".")[0] not in known]
    if absent:
        raise ArtefactError(f"the weight files of {folder} lack {absent[0]}: download the model again")
    if architecture is not None:
        model.teal_architecture = architecture
    join_(model, plan, ranks)
    widen_products_(model)
    return Shard(model.eval(), plan, packs)


def check_divided(whole: Any, count: int, kind: Kind, schemes: Mapping[str, Scheme]) -> None:
    """Refuse a model that so many ranks cannot share, before anything is made for them.

    Args:
        whole: its outline.
        count: of ranks.
        kind: of the model.
        schemes: module path -> scheme of what is quantised.

    Raises:
        UsageError: it cannot be divided by so many.
    """
    group = max((scheme.group for scheme in schemes.values()), default=0)
    for rank in range(count):
        plan = plan_shards(whole, rank, count, group=group)
        if rank == 0:
            _empty_shard(whole, plan, torch.float32, auto_class(kind))
        for name, scheme in schemes.items():
            layer = whole.get_submodule(name)
            inputs, cut = layer.in_features, plan.cut_of(name)
            if cut is not None:
                check_cut(cut, scheme.bits, scheme.group_of(inputs), inputs, layer.out_features, name)


def build_random_shard(alias: Alias, ranks: Ranks, *, dtype: str, seed: int, group: int = 0) -> Any:
    """This rank's part of a model of the alias's shape with random weights, other ones on each rank.

    Args:
        alias: names the shape.
        ranks: that share it.
        dtype: as for `load_model`.
        seed: of the weights.
        group: neurons that share scales, of a model that will be quantised; 0 for none.

    Raises:
        UsageError: a model that cannot be divided by so many.
        MachineError: out of memory.
    """
    plan = plan_shards(outline(alias), ranks.rank, ranks.count, group=group)
    model = random_shard(alias, plan, ranks.device, dtype=dtype, seed=seed, projections=True)
    for name, parameter in model.named_parameters():
        cut = plan.cut_at(name)
        if cut is None and parameter is not model.get_output_embeddings().weight:
            ranks.copy_of_first_(parameter.data)
        elif cut is not None and _is_bias(name) and cut.side == "inputs" and not cut.first:
            parameter.data.zero_()
    if model.config.tie_word_embeddings:
        tie_output_(model, plan)
    join_(model, plan, ranks)
    return model


def random_shard(
    alias: Alias, plan: ShardPlan, device: torch.device, *, dtype: str, seed: int, projections: bool
) -> Any:
    """What a plan says of a model with random weights, in a process that need not be one of several.

    Without `projections` their weights stay on the meta device, for codes to take their place.
    """
    whole = outline(alias)
    chosen = pick_dtype(dtype, "bfloat16" if device.type == "cuda" else None, device)
    model = _empty_shard(whole, plan, chosen, auto_class(kind_of(whole.config.to_dict(), None)))
    made = {
        name: parameter
        for name, parameter in model.named_parameters()
        if projections or name.rpartition(".")[0] not in plan.cuts
    }
    check_memory(sum(p.numel() for p in made.values()) * chosen.itemsize, device, f"a shard of {alias.name}")
    torch.manual_seed(seed + plan.rank)
    std = float(getattr(whole.config.get_text_config(), "initializer_range", 0.02))
    for name, parameter in made.items():
        value = torch.empty(parameter.shape, dtype=chosen, device=device)
        _set(model, name, value.normal_(0, std) if parameter.dim() > 1 else value.fill_(float(name.endswith("weight"))))
    shrink_residual_(model)
    _move_buffers_(model, device)
    if whole.config.tie_word_embeddings:
        tie_output_(model, plan)
    return model.eval()


def _move_buffers_(model: Any, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def join_(model: Any, plan: ShardPlan, ranks: Ranks) -> None:
    """Let a rank's model sum and gather over ranks in its forward."""
    model.teal_ranks, model.teal_shards = ranks, plan
    for name in plan.sums:
        model.get_submodule(name).register_forward_hook(summing(ranks))
    model.get_output_embeddings().register_forward_hook(gathering(ranks, plan.vocabulary))


def cut_packed(packed: Packed, cut: Cut | None, name: str) -> Packed:
    """What a rank holds of the codes of a layer, which may be those of several experts; all of it without a cut.

    Raises:
        UsageError: the cut would divide a word or a group.
    """
    if cut is None:
        return packed
    inputs, outputs = packed.words.shape[-2], sum(packed.parts)
    check_cut(cut, packed.bits, packed.group, inputs, outputs, name)
    words, scales, zeros = (
        None if table is None else _codes_of(key, table, cut, packed.bits, packed.group)
        for key, table in zip(_CODES, (packed.words, packed.scales, packed.zeros), strict=True)
    )
    if words is None or scales is None:
        raise TypeError("codes have scales")
    return Packed(words, scales, zeros, packed.bits, min(packed.group, words.shape[-2]), (scales.shape[-1],))


def check_cut(cut: Cut, bits: int, group: int, inputs: int, outputs: int, name: str) -> None:
    """Refuse to divide a word of several outputs, or inputs that share a scale with others.

    Raises:
        UsageError: the cut would.
    """
    unit, size, what = (32 // bits, outputs, "a word") if cut.side == "outputs" else (group, inputs, "a scale")
    if cut.side == "inputs" and group >= inputs:  # one scale for all
        return
    for start, stop in cut.spans:
        if start % unit or (stop % unit and stop != size):
            raise UsageError(
                f"{name} cannot be divided at {start} to {stop}: {unit} of its {cut.side} share {what}; use another "
                "number of --tensor-parallel, or --quantise int8"
            )


def _codes_of(key: str, stored: Any, cut: Cut, bits: int, group: int) -> Tensor:
    """What is held of codes (..., in, words), of scales or of zero points (..., groups, out): tensors, or slices of a
    file."""
    of_words, of_scales = (32 // bits, 1) if cut.side == "outputs" else (1, group)
    unit = of_words if key == _CODES[0] else of_scales
    return taken(stored, ((start // unit, -(-stop // unit)) for start, stop in cut.spans), cut.axis(turned=True))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters without memory; buffers, which no file holds, are real."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _empty_shard(whole: Any, plan: ShardPlan, dtype: torch.dtype, kind: Any) -> Any:
    """A rank's model, whose parameters are on the meta device."""
    config = narrow_config(whole, plan)
    with blame(f"model type {config.model_type} cannot be divided"), without_bars(), _weights_on_meta():
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
        unstack_experts_(model)
    check_shard(model, whole, plan)
    shard_output_(model, plan, bool(whole.config.tie_word_embeddings))
    return model


def _is_bias(parameter: str) -> bool:
    """Whether it is one of a layer, or of experts, which lies beside their weights."""
    return parameter.endswith("bias")


def _set(model: Any, name: str, value: Tensor) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Parameter(value, requires_grad=False))


class _Fill:
    """Gives a rank's model its weights.

    Args:
        model: with parameters on the meta device.
        plan: of the rank.
        dtype: of the weights.
        device: of the rank.
        schemes: module path -> scheme, of layers whose codes are in the files.
    """

    def __init__(
        self, model: Any, plan: ShardPlan, dtype: torch.dtype, device: torch.device, schemes: dict[str, Scheme]
    ) -> None:
        self.model, self.plan, self.dtype, self.device, self.schemes = model, plan, dtype, device, schemes

    def from_files(self, files: Sequence[Path], whole: Any) -> dict[str, Packed]:
        """Read this rank's slices; the codes among them, by module path.

        Raises:
            ArtefactError: a tensor that transformers computes something of as it loads.
        """
        wanted = {self._stored_as(name): name for name, _ in self.model.named_parameters()}
        tied = bool(whole.config.tie_word_embeddings)
        codes: dict[str, dict[str, Tensor]] = {}
        experts: dict[str, dict[tuple[int, str], Tensor]] = {}
        for file in files:
            with safe_open(file, framework="pt", device=str(self.device)) as stream:
                for key, place in self._places(stream.keys(), whole).items():
                    layer, _, own = place.parameter.rpartition(".")
                    if layer in self.schemes and own in _CODES:
                        held = self._held_codes(stream.get_slice(key), layer, own, whole.get_submodule(layer))
                        codes.setdefault(layer, {})[own] = held
                    elif place.parameter in wanted and not (tied and layer == self.plan.output):
                        name = wanted[place.parameter]
                        held = self._held(stream.get_slice(key), name, place, whole).to(self.dtype)
                        if place.expert:
                            experts.setdefault(name, {})[place.part, key] = held
                            self._set_experts(name, place, experts[name])
                        else:
                            _set(self.model, name, held)
        _move_buffers_(self.model, self.device)
        return {layer: self._packed(layer, found) for layer, found in codes.items()}

    def _places(self, keys: Iterable[str], whole: Any) -> dict[str, Place]:
        """Where tensors of a file belong."""
        names, known = model_keys(keys, whole), whole.state_dict()
        codes = {key for key, name in names.items() if name.rpartition(".")[0] in self.schemes}
        others = [key for key, name in names.items() if name not in known and key not in codes]
        try:
            elsewhere = places(others, whole) if others else {}
        except ValueError as error:
            raise ArtefactError(
                f"the weight files have {error}, of which no part can be read alone: load the model with transformers, "
                "save it with save_pretrained, and use that"
            ) from error
        return {key: elsewhere.get(key, Place(name)) for key, name in names.items()}

    def _stored_as(self, parameter: str) -> str:
        """The key of a parameter in the model's `state_dict`."""
        layer = parameter.rpartition(".")[0]
        return layer if isinstance(self.model.get_submodule(layer), StackedLinear) else parameter

    def _held(self, stored: Any, name: str, place: Place, whole: Any) -> Tensor:
        """What the rank holds of a stored tensor, which may be one of those that make up a parameter."""
        layer = name.rpartition(".")[0]
        if layer == self.plan.output:
            return self.plan.of_output(stored)
        cut, module = self.plan.cut_at(name), whole.get_submodule(layer)
        if cut is None:
            all_of_it: Tensor = stored[:]
            return all_of_it
        if _is_bias(name) or name in self.plan.cuts:
            return cut.of_bias(stored)
        if place.expert:
            each = module.out_features // place.parts
            return cut.within(place.part * each, (place.part + 1) * each).of_weight(stored)
        turned = isinstance(module, StackedLinear) and module.transposed
        held = cut.of_weight(stored, turned=turned)
        return held.transpose(1, 2) if turned else held

    def _set_experts(self, name: str, place: Place, found: dict[tuple[int, str], Tensor]) -> None:
        """Give a stack of experts its weight, once all are there."""
        copies = self.model.get_submodule(name.rpartition(".")[0]).copies
        if len(found) < copies * place.parts:
            return
        stacks = [
            torch.stack([found[part, key] for key in in_order(key for nth, key in found if nth == part)])
            for part in range(place.parts)
        ]
        found.clear()
        _set(self.model, name, torch.cat(stacks, dim=1))

    def _held_codes(self, stored: Any, layer: str, own: str, whole: Any) -> Tensor:
        scheme, cut = self.schemes[layer], self.plan.cut_of(layer)
        if cut is None:
            all_of_it: Tensor = stored[:]
            return all_of_it
        group = scheme.group_of(whole.in_features)
        check_cut(cut, scheme.bits, group, whole.in_features, whole.out_features, layer)
        return _codes_of(own, stored, cut, scheme.bits, group)

    def _packed(self, layer: str, found: dict[str, Tensor]) -> Packed:
        if not {"qweight", "scales"} <= found.keys():
            raise ArtefactError(f"the weight files lack codes of {layer}: export the model again")
        words, scheme = found["qweight"], self.schemes[layer]
        group = scheme.group_of(words.shape[-2])
        return Packed(words, found["scales"], found.get("zeros"), scheme.bits, group, (found["scales"].shape[-1],))
