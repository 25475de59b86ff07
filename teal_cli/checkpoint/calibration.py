"""The calibration artefact: RUN/calibration.safetensors and RUN/calibration.json."""

from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal_cli.atomic import atomic_path, check_seal, file_digest, sealed, write_json
from teal_cli.calibration import histogram, sensitivity
from teal_cli.checkpoint.fields import Amount, Content, Count, Digest, Moment, Name, Size, Versions, Whole, checked
from teal_cli.errors import ArtefactError, reading, shown
from teal_cli.models.architectures import Projection
from teal_cli.models.weights import fingerprint_of
from teal_cli.reading import read_json
from teal_cli.versions import now

FORMAT_VERSION = 2
_TENSORS = "calibration.safetensors"
_NEXT = ".calibration.next.safetensors"
"""What the tensors are called until the JSON, which has their digest, is written."""
_META = "calibration.json"
_SENSITIVITY = "sensitivity/"
_PATH = "greedy/"
"""In front of a projection's or a block's name, as the key of its tensor."""
_TEXT = "text"
_QUANTISED = "quantised.safetensors"
KEPT_TOKENS = 8192
"""Tokens that later passes over the calibration's text read."""
_ADVICE = "calibrate again"
_MOST_POINTS = 100_000
"""Of a greedy path: even one input at a time has fewer."""
_MOST_COUNTED = 2.0**62
_ROUNDING = 1e-5


@dataclass
class CalibrationInfo:
    """What made a calibration."""

    model: Name
    weights: Name
    """Fingerprint of the dense weights (`checkpoint.weights.fingerprint`)."""
    dataset: Name
    tokens: Count
    """Tokens read; the sink tokens among them were not counted."""
    seq_len: Count
    sink_tokens: Count
    seed: Whole
    dtype: Name
    device: Name
    seconds: Amount
    sensitivity_tokens: Count = 0
    """Tokens, the first of those read, that went through a backward pass too."""
    sensitivity_seconds: Amount = 0.0
    greedy_tokens: Count = 0
    """Tokens, the first of those read, on which the greedy paths were walked."""
    greedy_inputs: Name = "dense"
    """What each block read on them: `dense` or `sparse` hidden states."""
    greedy_seconds: Amount = 0.0
    greedy_forwards: Count = 0
    """Runs of a block, in whole or in part."""
    greedy_naive_forwards: Count = 0
    """Runs of a block that trying every projection at every plain step would take."""
    versions: Versions = field(default_factory=dict)
    quantization: Name = ""
    """How the weights were quantised while this was measured; empty where they were not."""
    quantize_tokens: Count = 0
    """Tokens, the first of those read, that GPTQ chose the codes on; 0 for the nearest codes."""
    quantize_seconds: Amount = 0.0
    quantised_weights: Name = ""
    """Fingerprint of the quantised weights."""
    imported: Name = ""
    """Whose files this was read from (`teal import`); empty where it was measured."""
    configuration: Name = ""
    """Of the model (`checkpoint.digests.configuration_digest`); empty in files of older versions."""


@dataclass
class Calibration:
    """Histograms of every site, who reads them, and what dropping inputs costs them."""

    info: CalibrationInfo
    projections: list[Projection]
    histograms: dict[str, Tensor]
    """Site name -> (histogram.BINS,) int64."""
    sensitivities: dict[str, Tensor] = field(default_factory=dict)
    """Projection name -> (sensitivity.BINS,) float64; empty where none were measured."""
    paths: dict[str, Tensor] = field(default_factory=dict)
    """Block -> (points, projections) float32, sparsities; empty where greedy did not walk."""
    text: Tensor | None = None
    """(sequences, tokens) int64, up to KEPT_TOKENS, of text that cannot be read again: what the model wrote itself."""
    quantised: Path | None = None
    """The weights that this was measured with, where they are quantised (`quantised_file`)."""

    def threshold(self, projection: Projection, sparsity: float) -> float:
        """The threshold at which a projection drops this fraction of its inputs.

        Raises:
            ArtefactError: the site's histogram cannot give one.
        """
        try:
            return histogram.threshold_for(self.histograms[projection.site], sparsity)
        except ValueError as error:
            raise ArtefactError(f"{projection.site}: {error}") from error

    def merged(self, other: "Calibration") -> "Calibration":
        """This and another calibration of the same weights as one, exactly; greedy paths cannot be added up, and go.

        Raises:
            ArtefactError: other weights, projections, dtype or sink tokens.
        """
        for key in ("weights", "quantised_weights", "dtype", "sink_tokens"):
            if getattr(self.info, key) != getattr(other.info, key):
                raise ArtefactError(f"calibrations with different {key} cannot be merged")
        if self.projections != other.projections:
            raise ArtefactError("calibrations of different projections cannot be merged")
        same_text = self.info.dataset == other.info.dataset
        info = CalibrationInfo(
            **asdict(self.info)
            | {
                "tokens": self.info.tokens + other.info.tokens,
                "seconds": self.info.seconds + other.info.seconds,
                "sensitivity_tokens": self.info.sensitivity_tokens + other.info.sensitivity_tokens,
                "sensitivity_seconds": self.info.sensitivity_seconds + other.info.sensitivity_seconds,
                "dataset": self.info.dataset if same_text else f"{self.info.dataset} + {other.info.dataset}",
                **{f.name: f.default for f in fields(CalibrationInfo) if f.name.startswith("greedy_")},
            }
        )
        histograms = {site: counts + other.histograms[site] for site, counts in self.histograms.items()}
        sensitivities = dict(self.sensitivities)
        for name, squares in other.sensitivities.items():
            sensitivities[name] = sensitivities[name] + squares if name in sensitivities else squares
        return Calibration(info, self.projections, histograms, sensitivities, text=self.text, quantised=self.quantised)


def exists(run: Path) -> bool:
    """Whether a RUN folder holds a calibration (the JSON is written last)."""
    return (run / _META).is_file()


def quantised_file(run: Path) -> Path:
    """Where a calibration of quantised weights has these: a file as checkpoints have it."""
    return run / _QUANTISED


def check_quantised(calibration: Calibration) -> None:
    """Refuse weights that are not those which a calibration was made with, such as of an interrupted newer one.

    Raises:
        ArtefactError: they are missing, another calibration's, or nobody knows whose.
    """
    file = calibration.quantised
    if file is None:
        return
    if not file.is_file():
        raise ArtefactError(f"the quantised weights {file} are missing: run `teal calibrate` again")
    if not calibration.info.quantised_weights:
        raise ArtefactError(f"the quantised weights {file} were made by an older teal: run `teal calibrate` again")
    if fingerprint_of([file]) != calibration.info.quantised_weights:
        raise ArtefactError(f"the quantised weights {file} are not their calibration's: run `teal calibrate` again")


def save(calibration: Calibration, run: Path) -> None:
    """Write RUN/calibration.safetensors and RUN/calibration.json, which holds its digest.

    Whenever this process is killed, the earlier calibration is there, or the new one.

    Raises:
        ArtefactError: figures that no plan can be made of, such as those of hidden states that are not finite.
    """
    try:
        _check_figures(calibration)
    except ValueError as error:
        raise ArtefactError(
            f"nothing was written to {run}: {error}; where hidden states overflow, calibrate with --dtype float32"
        ) from error
    tensors = {site: counts.to(torch.int64).contiguous() for site, counts in calibration.histograms.items()}
    for name, squares in calibration.sensitivities.items():
        tensors[_SENSITIVITY + name] = squares.to(torch.float64).contiguous()
    for block, path in calibration.paths.items():
        tensors[_PATH + block] = path.to(torch.float32).contiguous()
    if calibration.text is not None:
        tensors[_TEXT] = calibration.text.to(torch.int64).contiguous()
    _settle(run)
    with atomic_path(run / _NEXT) as temporary:
        save_file(tensors, temporary)
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "finished": now(),
        **asdict(calibration.info),
        "projections": [asdict(projection) for projection in calibration.projections],
        "tensors_sha256": file_digest(run / _NEXT),
    }
    write_json(run / _META, sealed(meta))
    with suppress(FileNotFoundError):  # another process, which saves the same, was quicker
        (run / _NEXT).replace(run / _TENSORS)


def _settle(run: Path) -> None:
    """Finish what a process did that was killed before the tensors had their name."""
    with suppress(ArtefactError):
        left = run / _NEXT
        if left.is_file() and read_json(run / _META, "calibration").get("tensors_sha256") == file_digest(left):
            left.replace(run / _TENSORS)


class _Projection(Content):
    name: Name
    site: Name
    in_features: Size
    out_features: Size
    copies: Size = 1
    chosen: Size | None = None


class _Meta(Content):
    """calibration.json beside what `CalibrationInfo` has."""

    finished: Moment | None = None
    projections: Annotated[list[_Projection], Field(min_length=1)]
    tensors_sha256: Digest


def load(run: Path) -> Calibration:
    """Read and check a calibration, but for its quantised weights (`check_quantised`).

    Raises:
        ArtefactError: missing, of another format version, truncated, altered, or with values that cannot be.
    """
    path = run / _META
    if not path.is_file():
        raise ArtefactError(f"no calibration in {run}: run `teal calibrate` first")
    content = read_json(path, "calibration")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtefactError(
            f"calibration {path} has format version {shown(version)}, this teal reads {FORMAT_VERSION}: calibrate again"
        )
    meta = checked(_Meta, content, "calibration", path, _ADVICE)
    info = checked(CalibrationInfo, content, "calibration", path, _ADVICE)
    check_seal(content, "calibration", path, _ADVICE)
    projections = [Projection(**entry.model_dump()) for entry in meta.projections]
    tensors = run / _TENSORS
    if not _has_digest(tensors, meta.tensors_sha256, projections):
        if not tensors.exists() and not (run / _NEXT).exists():
            raise ArtefactError(f"calibration {tensors} is missing: calibrate again")
        if not _has_digest(run / _NEXT, meta.tensors_sha256, projections):
            raise ArtefactError(f"calibration {tensors} is truncated or was altered: calibrate again")
        tensors = run / _NEXT
    histograms, sensitivities, paths = {}, {}, {}
    with reading("calibration", tensors, OSError, safetensors.SafetensorError):
        found = load_file(tensors)
    text = found.pop(_TEXT, None)
    for key, tensor in found.items():
        if key.startswith(_SENSITIVITY):
            sensitivities[key.removeprefix(_SENSITIVITY)] = tensor
        elif key.startswith(_PATH):
            paths[key.removeprefix(_PATH)] = tensor
        else:
            histograms[key] = tensor
    quantised = quantised_file(run) if info.quantization else None
    calibration = Calibration(info, projections, histograms, sensitivities, paths, text, quantised)
    with reading("calibration", tensors, ValueError):
        _check_figures(calibration)
    return calibration


def _has_digest(file: Path, digest: str, projections: list[Projection]) -> bool:
    """Whether this is the file with a digest; one larger than tensors of a calibration ever are is not read."""
    most = (64 << 20) + len(projections) * 8 * (histogram.BINS + sensitivity.BINS + _MOST_POINTS)
    return file.is_file() and file.stat().st_size <= most and file_digest(file) == digest


def _check_figures(calibration: Calibration) -> None:
    """Refuse tensors that do not belong together, or hold what was never measured.

    Raises:
        ValueError: says which.
    """
    projections, text = calibration.projections, calibration.text
    names = Counter(projection.name for projection in projections)
    sides: dict[str, set[int]] = {}
    for projection in projections:
        sides.setdefault(projection.site, set()).add(projection.in_features)
    if set(sides) != set(calibration.histograms):
        raise ValueError("its projections do not match its histograms")
    if names.most_common(1)[0][1] > 1 or any(len(widths) > 1 for widths in sides.values()):
        raise ValueError("a projection stands twice, or those of one site differ in their inputs")
    for site, counts in calibration.histograms.items():
        if counts.shape != (histogram.BINS,) or counts.dtype != torch.int64:
            raise ValueError("a histogram has the wrong size")
        if int(counts.min()) < 0 or not 0.0 < float(counts.sum(dtype=torch.float64)) < _MOST_COUNTED:
            raise ValueError(f"the histogram of {site} counts nothing, or less than nothing")
    if calibration.sensitivities and set(names) != set(calibration.sensitivities):
        raise ValueError("its projections do not match its sensitivities")
    for name, squares in calibration.sensitivities.items():
        if squares.shape != (sensitivity.BINS,) or squares.dtype != torch.float64:
            raise ValueError("a sensitivity has the wrong size")
        # Not always rising: the changes of inputs that are dropped together may cancel out.
        if not bool(torch.isfinite(squares).all()) or float(squares.min()) < 0.0:
            raise ValueError(f"the sensitivity of {name} is negative or not finite")
    blocks = Counter(p.site.rpartition(".")[0] for p in projections if not p.is_output)
    if calibration.paths and set(calibration.paths) != set(blocks):
        raise ValueError("its projections do not match its greedy paths")
    for block, path in calibration.paths.items():
        if path.dim() != 2 or not 0 < len(path) <= _MOST_POINTS or path.shape[1] != blocks[block]:
            raise ValueError("its projections do not match its greedy paths")
        # A NaN is not within any range.
        rises = not path[0].any() and bool((path.diff(dim=0) > -_ROUNDING).all())
        if not (rises and float(path.min()) >= 0.0 and float(path.max()) < 1.0):
            raise ValueError(f"the greedy path of {block} does not rise from 0 within [0, 1)")
    if text is not None and (text.dim() != 2 or text.dtype != torch.int64 or not text.numel() or int(text.min()) < 0):
        raise ValueError("its text is none")
