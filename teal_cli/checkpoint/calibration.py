"""The calibration artefact: RUN/calibration.safetensors and RUN/calibration.json."""

from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal_cli.calibration import histogram, sensitivity
from teal_cli.checkpoint.files import atomic_path, file_digest, write_json
from teal_cli.checkpoint.weights import fingerprint_of
from teal_cli.errors import ArtefactError, reading
from teal_cli.models.architectures import Projection
from teal_cli.reading import read_json
from teal_cli.versions import now

FORMAT_VERSION = 2
_TENSORS = "calibration.safetensors"
_META = "calibration.json"
_SENSITIVITY = "sensitivity/"
_PATH = "greedy/"
"""In front of a projection's or a block's name, as the key of its tensor."""
_TEXT = "text"
_QUANTISED = "quantised.safetensors"
KEPT_TOKENS = 8192
"""Tokens that later passes over the calibration's text read."""


@dataclass
class CalibrationInfo:
    """What made a calibration."""

    model: str
    weights: str
    """Fingerprint of the dense weights (`checkpoint.weights.fingerprint`)."""
    dataset: str
    tokens: int
    """Tokens read; the sink tokens among them were not counted."""
    seq_len: int
    sink_tokens: int
    seed: int
    dtype: str
    device: str
    seconds: float
    sensitivity_tokens: int = 0
    """Tokens, the first of those read, that went through a backward pass too."""
    sensitivity_seconds: float = 0.0
    greedy_tokens: int = 0
    """Tokens, the first of those read, on which the greedy paths were walked."""
    greedy_inputs: str = "dense"
    """What each block read on them: `dense` or `sparse` hidden states."""
    greedy_seconds: float = 0.0
    greedy_forwards: int = 0
    """Runs of a block, in whole or in part."""
    greedy_naive_forwards: int = 0
    """Runs of a block that trying every projection at every plain step would take."""
    versions: dict[str, str] = field(default_factory=dict)
    quantization: str = ""
    """How the weights were quantised while this was measured; empty where they were not."""
    quantize_tokens: int = 0
    """Tokens, the first of those read, that GPTQ chose the codes on; 0 for the nearest codes."""
    quantize_seconds: float = 0.0
    quantised_weights: str = ""
    """Fingerprint of the quantised weights."""
    imported: str = ""
    """Whose files this was read from (`teal import`); empty where it was measured."""


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
    """Write RUN/calibration.safetensors, then RUN/calibration.json with its digest."""
    tensors = {site: counts.to(torch.int64).contiguous() for site, counts in calibration.histograms.items()}
    for name, squares in calibration.sensitivities.items():
        tensors[_SENSITIVITY + name] = squares.to(torch.float64).contiguous()
    for block, path in calibration.paths.items():
        tensors[_PATH + block] = path.to(torch.float32).contiguous()
    if calibration.text is not None:
        tensors[_TEXT] = calibration.text.to(torch.int64).contiguous()
    with atomic_path(run / _TENSORS) as temporary:
        save_file(tensors, temporary)
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "finished": now(),
        **asdict(calibration.info),
        "projections": [asdict(projection) for projection in calibration.projections],
        "tensors_sha256": file_digest(run / _TENSORS),
    }
    write_json(run / _META, meta)


def load(run: Path) -> Calibration:
    """Read and check a calibration, but for its quantised weights (`check_quantised`).

    Raises:
        ArtefactError: missing, of another format version, truncated or altered.
    """
    path = run / _META
    if not path.is_file():
        raise ArtefactError(f"no calibration in {run}: run `teal calibrate` first")
    meta = read_json(path, "calibration")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtefactError(
            f"calibration {path} has format version {version!r}, this teal reads {FORMAT_VERSION}: calibrate again"
        )
    tensors = run / _TENSORS
    if not tensors.is_file():
        raise ArtefactError(f"calibration {tensors} is missing: calibrate again")
    if file_digest(tensors) != meta.get("tensors_sha256"):
        raise ArtefactError(f"calibration {tensors} is truncated or was altered: calibrate again")
    with reading("calibration", path, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        # What came after the format's first files has a default.
        wanted = [entry for entry in fields(CalibrationInfo) if entry.default is MISSING or entry.name in meta]
        info = CalibrationInfo(**{entry.name: meta[entry.name] for entry in wanted})
        projections = [Projection(**entry) for entry in meta["projections"]]
        histograms, sensitivities, paths = {}, {}, {}
        found = load_file(tensors)
        text = found.pop(_TEXT, None)
        for key, tensor in found.items():
            if key.startswith(_SENSITIVITY):
                sensitivities[key.removeprefix(_SENSITIVITY)] = tensor
            elif key.startswith(_PATH):
                paths[key.removeprefix(_PATH)] = tensor
            else:
                histograms[key] = tensor
        if not projections or {projection.site for projection in projections} != set(histograms):
            raise ValueError("its projections do not match its histograms")
        if any(counts.shape != (histogram.BINS,) for counts in histograms.values()):
            raise ValueError("a histogram has the wrong size")
        if sensitivities and {projection.name for projection in projections} != set(sensitivities):
            raise ValueError("its projections do not match its sensitivities")
        if any(squares.shape != (sensitivity.BINS,) for squares in sensitivities.values()):
            raise ValueError("a sensitivity has the wrong size")
        blocks = Counter(p.site.rpartition(".")[0] for p in projections if not p.is_output)
        if paths and {block: path.shape[1] for block, path in paths.items()} != blocks:
            raise ValueError("its projections do not match its greedy paths")
    quantised = quantised_file(run) if info.quantization else None
    return Calibration(info, projections, histograms, sensitivities, paths, text, quantised)
