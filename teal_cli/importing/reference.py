"""The files of the method's reference implementation (FasterDecoding/TEAL): histograms and greedy lookups.

    FOLDER/histograms/layer-N/self_attn/histograms.pt   h1: attention input, h2: attention output
    FOLDER/histograms/layer-N/mlp/histograms.pt         h1: MLP input, h2: MLP intermediate
    FOLDER/lookup/layer-N/results.csv                   a row a step: error and each projection's sparsity

They name no model. What they were measured on shows in how much they count: a site is read once a
token, so over its width every site must have seen the same number of tokens. The published
histograms of Llama-3-8B fail this: they are Llama-2-7B's.
"""

import csv
import io
import zipfile
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.config_values import MOST_SPARSITY
from teal_cli.errors import ArtefactError, blame
from teal_cli.importing.rebin import SignedHistogram
from teal_cli.models.architectures import Projection
from teal_cli.reading import read_bytes

_SITES = {
    "attention_input": ("self_attn", "h1"),
    "attention_output": ("self_attn", "h2"),
    "mlp_input": ("mlp", "h1"),
    "mlp_intermediate": ("mlp", "h2"),
}
"""Our name of a site -> the folder and key of its histogram."""
_LOST = 1e-6
"""Share of values that float32 counts may have lost."""
_MOST_BYTES = 64 << 20
"""Of a file; the published ones have less than one MB."""


def histogram_folder(folder: Path) -> Path:
    """Where the histograms of a published folder lie; the folder itself where it holds them.

    Raises:
        ArtefactError: nowhere.
    """
    for candidate in (folder / "histograms", folder):
        if (candidate / "layer-0").is_dir():
            return candidate
    raise ArtefactError(f"{folder} holds neither histograms/layer-0 nor layer-0: name a folder of TEAL's histograms")


def read_histograms(folder: Path, projections: list[Projection]) -> dict[str, SignedHistogram]:
    """The histogram of every site of a model.

    Args:
        folder: with layer-0, layer-1, ..
        projections: of the model, without its output layer.

    Raises:
        ArtefactError: damaged files, or those of another model.
    """
    sites = {projection.site: projection.in_features for projection in projections}
    blocks = list(dict.fromkeys(site.rpartition(".")[0] for site in sites))
    layers = sum(1 for _ in folder.glob("layer-*"))
    if layers != len(blocks):
        raise ArtefactError(f"{folder} has {layers} layers and the model {len(blocks)}: they are another model's")
    found = {}
    for number, block in enumerate(blocks):
        for name, (part, key) in _SITES.items():
            if f"{block}.{name}" not in sites:
                raise ArtefactError(f"the reference knows no model whose blocks lack {name}, as {block} does")
            path = folder / f"layer-{number}" / part / "histograms.pt"
            found[f"{block}.{name}"] = _read_histogram(path, key)
    if len(found) != len(sites):
        extra = next(site for site in sites if site not in found)
        raise ArtefactError(f"the reference measures nothing like {extra}: calibrate this model instead")
    return found


def _read_histogram(path: Path, key: str) -> SignedHistogram:
    stored = io.BytesIO(read_bytes(path, "histogram", most=_MOST_BYTES))
    if zipfile.is_zipfile(stored):
        with blame(f"histogram {path} cannot be read"), zipfile.ZipFile(stored) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
        if whole > _MOST_BYTES:  # torch compresses nothing: a few bytes that stand for many are somebody's trap
            raise ArtefactError(f"histogram {path} unpacks to {whole:,} bytes; more than {_MOST_BYTES:,} are not read")
    stored.seek(0)
    with blame(f"histogram {path} cannot be read"):  # by torch, which raises whatever its zip and pickle parts do
        content = torch.load(stored, map_location="cpu", weights_only=True)
        centers, counts = content[f"{key}_centers"], content[key]
        if not (isinstance(centers, Tensor) and isinstance(counts, Tensor)):
            raise ValueError(f"{key} is not a tensor")
        return SignedHistogram.from_centers(centers, counts)


def tokens_counted(histograms: dict[str, SignedHistogram], projections: list[Projection]) -> int:
    """Tokens that every site has seen, each of them as many values wide as it is in this model.

    Raises:
        ArtefactError: sites that disagree, so that the histograms are of other widths.
    """
    sites = {projection.site: projection.in_features for projection in projections}
    first = next(iter(sites))
    tokens = round(histograms[first].total / sites[first])
    for site, width in sites.items():
        total = histograms[site].total
        if tokens == 0 or abs(total - tokens * width) > max(1.0, _LOST * total):
            raise ArtefactError(
                f"the histograms do not fit this model: {first} counts {tokens:,} tokens of {sites[first]:,} values, "
                f"so {site} would be {total / max(tokens, 1):,.0f} wide, and is {width:,}"
            )
    return tokens


def read_lookup(folder: Path, projections: list[Projection]) -> dict[str, Tensor]:
    """Greedy paths: block -> (points, projections of the block) float32, from dense on.

    The errors and the effective sparsity of the rows are left out: the latter by weights that are not the model's.

    Args:
        folder: with layer-0/results.csv, ..
        projections: of the model, in order.

    Raises:
        ArtefactError: damaged files, or those of another model.
    """
    paths = {}
    grouped = groupby(projections, key=lambda projection: projection.site.rpartition(".")[0])
    for number, (block, members) in enumerate(grouped):
        columns = [member.name.rpartition(".")[2].removesuffix("_proj") for member in members]
        path = folder / f"layer-{number}" / "results.csv"
        stored = read_bytes(path, "lookup", most=_MOST_BYTES)
        with blame(f"lookup {path} cannot be read"):
            rows = list(csv.DictReader(io.StringIO(stored.decode("utf-8-sig"), newline="")))
            missing = [column for column in columns if not rows or column not in rows[0]]
            if missing:
                raise ValueError(f"no column {missing[0]!r}")
            points = [[0.0] * len(columns), *([float(row[column]) for column in columns] for row in rows)]
            steps = torch.tensor(points, dtype=torch.float64)
            if not bool(torch.isfinite(steps).all()) or bool((steps.diff(dim=0) < -1e-9).any()):
                raise ValueError("its sparsities are not those of a path that rises from 0")
        # Its steps run past 1, where nothing is left to drop.
        paths[block] = steps.clamp(max=MOST_SPARSITY).float()
    if (folder / f"layer-{len(paths)}").exists():
        raise ArtefactError(f"{folder} has more layers than the model's {len(paths)}: it is another model's")
    return paths
