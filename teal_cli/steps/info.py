"""Info: what this machine runs, what it does not, and why; and how a model would fit on it."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from teal_cli.config import InfoConfig
from teal_cli.decode.engine import expected_path
from teal_cli.model_source import find_outline
from teal_cli.models.aliases import Alias, alias_names, find_alias
from teal_cli.models.architectures import find_projections, table
from teal_cli.models.forward import position_limit
from teal_cli.models.loading import available_bytes, outline, pick_device, pick_dtype, stored_dtype
from teal_cli.reading import read_json
from teal_cli.resources import teal_home
from teal_cli.schemes import Scheme
from teal_cli.versions import device_description, library_versions
from teal_kernels import BACKENDS, BackendUnavailableError, backend_unavailable_reason, resolve_backend
from teal_kernels.native import library as native
from teal_kernels.tuning_files import has_table

_SCHEMES = ("int8", "int4")


def machine(device_name: str) -> dict[str, Any]:
    """Machine, libraries, backends and aliases, as data (docs/formats.md).

    Raises:
        MachineError: no such device.
    """
    device = pick_device(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    aliases = {}
    for name in alias_names():
        alias = find_alias(name)
        if alias is not None:
            packaged = alias.packaged_file()
            aliases[name] = {"hub_id": alias.hub_id, "packaged": None if packaged is None else str(packaged)}
    return {
        "device": device_description(device),
        "device_type": device.type,
        "memory_available_bytes": available_bytes(device),
        "main_memory_available_bytes": available_bytes(torch.device("cpu")),
        "gpu": _gpu(),
        "no_gpu_because": no_gpu_reason(),
        "c_compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        "versions": library_versions(),
        "backends": {
            name: backend_unavailable_reason(name, device, dtype) or "available" for name in BACKENDS if name != "auto"
        },
        "auto_backend": resolve_backend("auto", device, dtype),
        "native": _native(),
        "architectures": sorted(table()),
        "teal_home": str(teal_home()),
        "aliases": aliases,
    }


def _native() -> dict[str, Any]:
    try:
        library, reason = native.load(), native.unavailable_reason()
    except BackendUnavailableError as error:  # a variant that the environment asks for
        library, reason = None, str(error)
    return {
        "variant": None if library is None else library.variant,
        "variants": [] if library is None else list(library.variants),
        "threads": native.default_threads(),
        "unavailable_because": reason,
    }


def no_gpu_reason() -> str | None:
    """Why torch has no GPU; None where it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if _driver() is None:
        return "no NVIDIA driver"
    return f"the driver ({_driver()}) and torch's CUDA {torch.version.cuda} do not go together, or no GPU is visible"


def _driver() -> str | None:
    """The NVIDIA driver's version, as the kernel module tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    return {
        "name": name,
        "count": torch.cuda.device_count(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "memory_bytes": total,
        "memory_free_bytes": free,
        "tuned": has_table(name),
    }


def model_fit(config: InfoConfig) -> dict[str, Any]:
    """How large a model is, in which form it fits on the device, and how it would decode; no weights are read.

    Raises:
        TealError: no such model or device, or a configuration that transformers cannot make sense of.
    """
    device = pick_device(config.device)
    name, found = find_outline(config.model)
    model = outline(found)
    if isinstance(found, Alias):  # on a hub, 16 bits are the rule; GGUF files become float32
        stored: str | None = "bfloat16" if found.source is None else "float32"
    else:
        stored = stored_dtype(found, read_json(found / "config.json", "model configuration"))
    dtype = pick_dtype(config.dtype, stored, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = table().get(model.config.model_type) or getattr(model, "teal_architecture", None)
    projections = find_projections(model) if row is not None else []
    linear = all(p.copies == 1 and isinstance(model.get_submodule(p.name), nn.Linear) for p in projections)
    rest = parameters - sum(projection.parameters for projection in projections)
    of_16_bits = torch.bfloat16 if dtype == torch.float32 else dtype
    sizes = {_name(kind): parameters * kind.itemsize for kind in (torch.float32, of_16_bits)}
    for text in _SCHEMES if projections and linear else ():
        scheme = Scheme.parse(text)
        packed = sum(scheme.stored_bytes(p.in_features, p.out_features) for p in projections)
        sizes[text] = packed + rest * dtype.itemsize
    free, memory = available_bytes(device), available_bytes(torch.device("cpu"))
    weights = [
        {
            "weights": kind,
            "bytes": size,
            "fits_on_device": None if free is None else size <= free,
            "fits_in_main_memory": None if memory is None else size <= memory,
        }
        for kind, size in sizes.items()
    ]
    wanted = [_name(dtype), _name(of_16_bits), *_SCHEMES]
    order = sorted((entry for entry in weights if entry["weights"] in wanted), key=lambda e: wanted.index(e["weights"]))
    cached = _cache_values(model.config)
    path, because = expected_path(model, device, dtype)
    return {
        "name": name,
        "model_type": model.config.model_type,
        "supported": row is not None,
        "kind": None if row is None else row.kind,
        "parameters": parameters,
        "projection_parameters": parameters - rest,
        "max_length": position_limit(model.config),
        "dtype": _name(dtype),
        "weights": weights,
        "runs_as": next((entry["weights"] for entry in order if entry["fits_on_device"] is not False), None),
        "cache_bytes_per_token": None if cached is None else cached * dtype.itemsize,
        "path": path,
        "general_because": because,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cache_values(config: Any) -> int | None:
    """Values that the KV cache takes for one token; None of a model without attention."""
    config = config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return None
    of_layers = getattr(config, "per_layer_config", None)  # Gemma 4's differ
    values = 0
    for index in range(config.num_hidden_layers):
        layer = of_layers[index] if of_layers else config
        heads = getattr(layer, "num_key_value_heads", None) or queries
        values += 2 * heads * (getattr(layer, "head_dim", None) or config.hidden_size // queries)
    return int(values)
