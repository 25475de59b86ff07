"""What a killed run resumes from: parameters, moments of the optimiser and the recipe's state, as safetensors and JSON.

transformers' Trainer keeps the optimiser, the schedule and the random numbers in pickles. It reads them with
`weights_only=True`, so nothing in them is run, but this project writes and reads no pickle: a checkpoint of ours is a
folder with `state.safetensors`, `trainer_state.json` (Trainer's own, which is JSON) and `run.json`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teal_cli.atomic import check_seal, file_digest, sealed, write_json
from teal_cli.errors import ArtefactError
from teal_cli.reading import read_json

_TENSORS, RUN, TRAINER = "state.safetensors", "run.json", "trainer_state.json"
CHECKPOINT = "checkpoint"


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, with all its shards where it is spread over processes (each of them must ask)."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu().contiguous()


@torch.no_grad()
def fill_(tensor: Tensor, value: Tensor) -> None:
    """Take on a value, or this process's shard of it."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), mesh, tensor.placements)  # type: ignore[attr-defined]
    tensor.copy_(value)


def moments_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser holds, by `PARAMETER|KEY`: moments, and how many steps they are of."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": whole(value)
        for parameter, entries in optimiser.state.items()
        for key, value in entries.items()
    }


def put_moments_(model: nn.Module, optimiser: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Give an optimiser what `moments_of` had."""
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        name, _, entry = key.rpartition("|")
        parameter = parameters[name]
        own = torch.empty_like(parameter) if value.shape == parameter.shape and value.dim() else value.clone()
        if own.dim():
            fill_(own, value)
        optimiser.state[parameter][entry] = own


def write(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], run: Mapping[str, Any]) -> None:
    """Write tensors in named groups, and JSON, into a folder that exists."""
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage().data_ptr()
            flat[f"{group}/{name}"] = tensor.clone() if storage in seen else tensor  # the file holds each by itself
            seen.add(storage)
    save_file(flat, folder / _TENSORS)
    write_json(folder / RUN, sealed({**run, "tensors_sha256": file_digest(folder / _TENSORS)}))


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `write` wrote.

    Raises:
        ArtefactError: missing or damaged.
    """
    path, advice = folder / RUN, f"remove {folder.parent}, and the run begins anew"
    run = read_json(path, "state of a run")
    check_seal(run, "state of a run", path, advice)
    if file_digest(folder / _TENSORS) != run.get("tensors_sha256"):
        raise ArtefactError(f"{folder / _TENSORS} is damaged: {advice}")
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        flat = load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise ArtefactError(f"{folder / _TENSORS} is damaged ({error}): {advice}") from error
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, run


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of parameters on the CPU, by name."""
    wanted = dict(model.named_parameters())
    return {name: whole(wanted[name]).clone() for name in names}


def put_parameters_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters values."""
    own = dict(model.named_parameters())
    for name, value in values.items():
        fill_(own[name], value)


def folder_for(out: Path) -> Path:
    """Where a run keeps its state: beside the folder that it is going to write."""
    return out.with_name(f"{out.name}.run")


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint of a run that was cut short; None where there is none."""
    found = folder / CHECKPOINT
    return found if (found / TRAINER).is_file() else None
