"""How GPTQ and AWQ checkpoints say that their codes are stored, read as transformers' GPTQConfig and AwqConfig do."""

from dataclasses import dataclass
from typing import Any

from teal_cli.errors import ArtefactError, shown
from teal_cli.models.config_checks import method_of, quantisation_of
from teal_cli.schemes import Scheme

_READ = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_DEFAULT = {"gptq": "gptq", "awq": "gemm"}
_LEGACY = {"gptq": "checkpoint_format", "awq": "version"}
"""Where it is there, it counts, not `format`."""


@dataclass(frozen=True)
class Published:
    """What the numbers in the weight files mean."""

    method: str
    """gptq or awq."""
    scheme: Scheme
    is_less_one: bool
    """Whether each stored zero point is the real one less one, modulo 16: GPTQ's first format."""
    carries: bool
    """Whether that one was taken from whole words, so that a zero point of 0 took one from its neighbour too."""
    is_symmetric: bool
    """Whether the configuration says that every zero point is 8."""
    is_reordered: bool
    """Whether layers must say which group an input is of (`g_idx`)."""


def published_format(config: dict[str, Any], where: object) -> Published:
    """Read `quantization_config` of such a checkpoint.

    Args:
        config: config.json, parsed.
        where: the folder, for messages.

    Raises:
        ArtefactError: other than 4 bits, groups that kernels do not know, or a layout that is not read.
    """
    stored, method = quantisation_of(config), method_of(config)
    if method not in _READ:
        raise ArtefactError(f"{where} is quantised by {shown(method)}, neither by GPTQ nor by AWQ")
    bits, group = stored.get("bits", stored.get("w_bit")), stored.get("group_size", stored.get("q_group_size"))
    if type(bits) is not int or bits != 4:
        raise ArtefactError(
            f"{where} is quantised to {shown(bits)} bits; of GPTQ and AWQ models, those of 4 bits are read"
        )
    form = _form(stored, method, where)
    scheme = _scheme(group, where)
    _refuse_variants(stored, bits, group, where)
    meta = stored.get("meta")
    quantizer = str(meta.get("quantizer")) if isinstance(meta, dict) else ""
    return Published(
        method=method,
        scheme=scheme,
        is_less_one=form == "gptq",
        carries="gptqmodel" in quantizer.lower(),
        is_symmetric=method == "gptq" and stored.get("sym") is True,
        is_reordered=method == "gptq" and bool(stored.get("desc_act")),
    )


def _form(stored: dict[str, Any], method: str, where: object) -> str:
    legacy = stored.get(_LEGACY[method])
    form = stored.get("format", _DEFAULT[method]) if legacy is None else legacy
    if stored.get("backend") == "llm-awq":
        form = "llm-awq"
    if stored.get("is_marlin_format"):
        form = "marlin"
    if not isinstance(form, str) or form.lower() not in _READ[method]:
        raise ArtefactError(
            f"{where}: the format {shown(form)} of its codes is not read, only gptq, gptq_v2 and AWQ's gemm: take "
            "another quantised version of the model, or its unquantised weights"
        )
    return form.lower()


def _scheme(group: object, where: object) -> Scheme:
    if group == -1:
        raise ArtefactError(
            f"{where} has one scale for all inputs of an output (group_size -1), which is not read: take a version "
            "with groups of 32, 64 or 128, or the unquantised weights"
        )
    if type(group) is not int:
        raise ArtefactError(f"{where}: group_size is {shown(group)}, not a number of inputs")
    try:
        return Scheme.parse(f"int4:{group}")
    except ValueError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _refuse_variants(stored: dict[str, Any], bits: int, group: object, where: object) -> None:
    """Refuse what else changes the meaning of the stored numbers."""
    found = None
    if stored.get("zero_point") is False:
        found = "codes without zero points (zero_point false)"
    if stored.get("pack_dtype") not in (None, "int32"):
        found = f"codes packed into other words than int32 (pack_dtype {shown(stored['pack_dtype'])})"
    if stored.get("rotation"):
        found = f"rotated hidden states (rotation {shown(stored['rotation'])})"
    dynamic = stored.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        found = f"layers that differ in a way unknown here (dynamic is {shown(dynamic)})"
    else:
        for layers, own in dynamic.items():
            # A pattern that begins with a minus names layers that are not quantised; false does so too.
            if isinstance(own, dict) and (own.get("bits", bits) != bits or own.get("group_size", group) != group):
                found = f"layers of other bits or groups than the rest (dynamic, {shown(layers)})"
    if found is not None:
        raise ArtefactError(f"{where} has {found}: this is not read; take another version of the model")
