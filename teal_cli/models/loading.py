"""Loading models as transformers has them: onto which device, in which dtype, and whether they fit.

`teal_cli.model_loading` is the door for the rest of teal: it loads TEAL checkpoints too.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from teal_cli.errors import ArtefactError, MachineError, blame
from teal_cli.models import trained_sparse  # noqa: F401  (transformers learns model types and activations)
from teal_cli.models.activations import check_activation
from teal_cli.models.aliases import Alias
from teal_cli.models.architectures import Architecture, Kind, table
from teal_cli.models.config_checks import QUANT_METHOD, check_config, method_of, named_dtype, quantisation_of
from teal_cli.models.layers import unstack_experts_
from teal_cli.models.likeness import adopt_likeness_
from teal_cli.models.random_weights import shrink_residual_
from teal_cli.models.weights import floating_dtype, tensor_header, weight_files
from teal_cli.models.wide_products import widen_products_
from teal_cli.reading import read_json

_ITEMSIZES = {"I32": 4, "U8": 1}
_CODES_A_VALUE = {"I32": 8}
"""Weights that a stored value can hold."""
_MOST_MADE_UP = 2
_SMALL = 1 << 24
"""Parameters and buffers that a model may have beyond what its weight files explain: tables of positions, masks."""
_NUMBER = re.compile(r"\.\d+\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLER = "use a smaller model or --dtype bfloat16; to calibrate what a GPU cannot hold, --offload"


def pick_device(name: str) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`.

    Raises:
        MachineError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise MachineError("no GPU: torch sees no CUDA device here; use --device cpu or auto (`teal info` says more)")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def use_threads(count: int | None) -> None:
    """Compute with so many CPU threads from now on, in the whole process; None changes nothing."""
    if count is not None:
        torch.set_num_threads(count)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Whatever number of threads is set within, the one from before comes back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_dtype(name: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype to run in.

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`.
        stored: the dtype of the model's weights (`stored_dtype`), if it is known.
        device: float32 weights run as bfloat16 on a GPU under `auto`.
    """
    if name != "auto":
        return DTYPES[name]
    dtype = DTYPES.get(stored or "", torch.float32)
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype


def stored_dtype(folder: Path, config: dict[str, Any]) -> str | None:
    """The dtype of a model's weights: what its configuration names, else what most of the stored values have.

    Args:
        folder: the model's; it may hold a configuration alone.
        config: its config.json.
    """
    files = (file for file in folder.glob("*.safetensors") if file.is_file())
    return named_dtype(config) or floating_dtype(entry for file in files for entry in tensor_header(file).values())


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None where the system does not tell."""
    if device.type == "cuda":
        # What torch's allocator holds and nobody uses is free too: a model that was just let go, for one.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def check_memory(needed: int, where: torch.device | Sequence[torch.device], what: str, instead: str = _SMALLER) -> None:
    """Refuse a load that cannot fit, before the system starts to swap or kill.

    Args:
        needed: bytes.
        where: one device, or several of a kind that share it.
        what: needs them.
        instead: what else can be done.

    Raises:
        MachineError: more bytes needed than the devices have free.
    """
    devices = [where] if isinstance(where, torch.device) else list(where)
    known = [available_bytes(device) for device in devices]
    free = sum(size for size in known if size is not None)
    if None not in known and needed > free:
        who = f"{devices[0].type} has" if len(devices) == 1 else f"{len(devices)} of {devices[0].type} have"
        raise MachineError(
            f"out of memory: {what} needs {needed / 2**30:.1f} GiB and {who} {free / 2**30:.1f} GiB free; {instead}"
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar of transformers, whose are not ours to show: the reporter is who talks to the user."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def auto_class(kind: Kind) -> Any:
    """transformers' class that loads a model of a kind."""
    import transformers

    name = {"causal": "ForCausalLM", "seq2seq": "ForSeq2SeqLM", "encoder": ""}[kind]
    return getattr(transformers, f"AutoModel{name}")


def kind_of(config: dict[str, Any], architecture: Architecture | None) -> Kind:
    """What kind of model a folder holds.

    Args:
        config: its config.json.
        architecture: where it is not that of the table or of the checkpoint.
    """
    if architecture is not None:
        return architecture.kind
    own = quantisation_of(config).get("architecture")
    model_type = str(config.get("model_type"))
    row = table().get(model_type)
    named = own.get("kind") if isinstance(own, dict) else None
    kind: Kind = named or (row.kind if row is not None else _loadable_kind(model_type))
    return kind


def _loadable_kind(model_type: str) -> Kind:
    """What transformers can load a model of a type as."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if model_type not in CONFIG_MAPPING:
        return "causal"
    config = CONFIG_MAPPING[model_type]
    if config in AutoModelForSeq2SeqLM._model_mapping:
        return "seq2seq"
    return "causal" if config in AutoModelForCausalLM._model_mapping else "encoder"


def load_from_folder(folder: Path, *, device: str, dtype: str, architecture: Architecture | None = None) -> Any:
    """A transformers model in eval mode, in the form that the rest of teal expects (experts as lists of layers).

    Args:
        folder: the model's.
        device: see `pick_device`.
        dtype: see `pick_dtype`.
        architecture: the model's, where it is not that of the table or of the checkpoint.

    Raises:
        ArtefactError: transformers cannot load the folder.
        MachineError: no such device, or out of memory.
    """
    target = pick_device(device)
    config = read_json(folder / "config.json", "model configuration")
    entries = [entry for file in weight_files(folder) for entry in tensor_header(file).values()]
    empty = outline(folder, architecture)
    stored = sum(math.prod(e["shape"]) * _CODES_A_VALUE.get(e["dtype"], 1) for e in entries)
    check_size(empty, stored, f"config.json of {folder}")
    chosen = pick_dtype(dtype, stored_dtype(folder, config), target)
    # Codes keep their dtype, whatever the model's.
    size = sum(math.prod(e["shape"]) * _ITEMSIZES.get(e["dtype"], chosen.itemsize) for e in entries)
    check_memory(size, target, str(folder))
    kind = kind_of(config, architecture)
    with blame(f"{folder} cannot be loaded"), without_bars():
        loaded: Any = auto_class(kind).from_pretrained(
            folder, dtype=chosen, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    model, report = loaded
    # transformers only warns of tensors that it did not find, and fills them with random numbers.
    absent = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if kind == "encoder":  # what pools the hidden states is not used, and not every checkpoint has it
        absent = [name for name in absent if not name.startswith("pooler.")]
    if absent:
        raise ArtefactError(f"the weights of {folder} lack {len(absent)} tensors of the right shape, {absent[0]} first")
    _check_blocks(empty, report["unexpected_keys"], folder)
    if architecture is not None and method_of(config) != QUANT_METHOD:  # a TEAL checkpoint brings its own
        model.teal_architecture = architecture
    unstack_experts_(model)
    adopt_likeness_(model)
    model.to(target)
    widen_products_(model)
    return model.eval()


def check_size(empty: Any, stored: int, what: str) -> None:
    """Refuse a configuration that describes a far larger model than is stored: transformers would make up the rest.

    Args:
        empty: the outline of what the configuration describes.
        stored: weights in the model's files.
        what: the configuration, for the message.

    Raises:
        ArtefactError: see above.
    """
    described = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    if described > _MOST_MADE_UP * stored + _SMALL:
        raise ArtefactError(
            f"{what} describes a model of {described:,} parameters, but its weight files hold {stored:,}: "
            "they do not belong together, or one is damaged; download the model again"
        )


def _check_blocks(empty: Any, unexpected: Iterable[str], folder: Path) -> None:
    """Refuse weights with more blocks than the configuration has: transformers leaves those out without a word."""
    known = {_NUMBER.sub(".0.", name) for name in empty.state_dict()}
    further = sorted(name for name in unexpected if _NUMBER.search(name) and _NUMBER.sub(".0.", name) in known)
    if further:
        raise ArtefactError(
            f"the weights of {folder} have {further[0]}, which config.json has no layer for: "
            "one of the two is damaged; download the model again"
        )


def build_random_model(alias: Alias, *, device: str, dtype: str, seed: int) -> Any:
    """A model of the alias's shape with random weights, made on the device; nothing is downloaded."""
    from transformers import AutoModelForCausalLM

    target = pick_device(device)
    empty = outline(alias)
    chosen = pick_dtype(dtype, "bfloat16" if target.type == "cuda" else None, target)
    elements = sum(parameter.numel() for parameter in empty.parameters())
    check_memory(elements * chosen.itemsize, target, f"{alias.name} in {chosen}")
    torch.manual_seed(seed)
    with target:
        model = AutoModelForCausalLM.from_config(empty.config, dtype=chosen, trust_remote_code=False)
    unstack_experts_(model)
    shrink_residual_(model)
    widen_products_(model)
    return model.eval()


def configuration(model: Path | Alias) -> Any:
    """What transformers makes of the configuration of a folder, or of an alias's shape.

    Raises:
        ArtefactError: it cannot make sense of it.
    """
    from transformers import AutoConfig

    if isinstance(model, Alias):
        check_config(model.shape, f"the shape of {_named(model)}")
    else:
        check_config(read_json(model / "config.json", "model configuration"), f"config.json of {model}")
    with blame(f"{_named(model)} cannot be understood"):
        if isinstance(model, Alias):
            return AutoConfig.for_model(**model.shape)
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)


def _named(model: Path | Alias) -> str:
    return f"alias {model.name}" if isinstance(model, Alias) else str(model)


def outline(model: Path | Alias, architecture: Architecture | None = None) -> Any:
    """The model of a folder or of an alias's shape without weights: every module, on the meta device.

    Args:
        model: a folder or an alias.
        architecture: the model's, where it is not that of the table.

    Raises:
        ArtefactError: a configuration that transformers cannot make sense of.
    """
    name, config = _named(model), configuration(model)
    with blame(f"{name} cannot be understood"):
        check_activation(config.to_dict(), name)
        with torch.device("meta"):
            found = auto_class(kind_of(config.to_dict(), architecture)).from_config(config, trust_remote_code=False)
            unstack_experts_(found)
    if architecture is not None:
        found.teal_architecture = architecture
    adopt_likeness_(found)
    return found
