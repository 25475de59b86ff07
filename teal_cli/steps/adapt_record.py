"""What `teal adapt` says of a run: adapt.json, the quality before and after, and what an earlier run there was of."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.adapt.data import Pool, Text
from teal_cli.adapt.loop import Trained
from teal_cli.adapt.recipe import Recipe
from teal_cli.adapt.write import check_replaceable
from teal_cli.checkpoint.adapted import Quality, Record, Source, TextUsed, is_adapted, read_record
from teal_cli.checkpoint.calibration import CalibrationInfo
from teal_cli.checkpoint.digests import configuration_digest
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import AdaptConfig
from teal_cli.data import dataset_identity
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.evaluation.perplexity import compare
from teal_cli.models.weights import fingerprint
from teal_cli.sparse import make_intrinsic_, sparse_layers, sparsify_
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.version import __version__
from teal_cli.versions import device_description, library_versions, now
from teal_cli.workspace import Workspace

_OF_NO_WEIGHT = ("runs", "out", "model", "checkpoint_minutes", "device_map")
"""Keys that weights at the end do not depend on, and the model, of which there are digests."""
MEASURED_ON = 16384
"""Tokens of the training text that thresholds are set on, and recipes measure on."""


@dataclass(frozen=True)
class Reads:
    """The text of a run."""

    pools: dict[str, Pool]
    text: Text
    held_out: Tensor
    """(sequences, tokens) int64."""

    def used(self, config: AdaptConfig) -> list[TextUsed]:
        """For the record."""
        found = []
        for name, pool in self.pools.items():
            both = torch.cat([pool.sequences, pool.held_out])
            digest = hashlib.sha256(both.numpy().tobytes()).hexdigest()
            identity, weight = dataset_identity(name), config.dataset[name]
            found.append(TextUsed(dataset=identity, weight=weight, tokens=both.numel(), sha256=digest))
        return found


def settings_of(config: AdaptConfig) -> dict[str, Any]:
    """What the weights at the end depend on, of the configuration; as JSON gives it back."""
    settings = {key: value for key, value in config.settings().items() if key not in _OF_NO_WEIGHT}
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def check_place(config: AdaptConfig, workspace: Workspace, out: Path) -> None:
    """Refuse a place where something else lies, be it an adapted model that another run made.

    Raises:
        ArtefactError: no adapted model is there.
        UsageError: one of other settings, or of another model.
    """
    check_replaceable(out)
    if not is_adapted(out):
        return
    try:
        found = read_record(out)
    except ArtefactError:  # damaged: nothing is lost
        return
    before = {key: value for key, value in found.settings.items() if key not in _OF_NO_WEIGHT}
    mine = settings_of(config)
    differing = sorted(key for key in before.keys() | mine.keys() if before.get(key) != mine.get(key))
    source, trained = source_of(config, workspace), found.parent or found.source
    if (source.weights, source.configuration) != (trained.weights, trained.configuration):
        differing.append("the model's weights")
    if differing:
        raise UsageError(
            f"{out} holds the result of another run ({', '.join(differing)} differ): name another folder (out, flag "
            "--out), or remove that one"
        )


def source_of(config: AdaptConfig, workspace: Workspace) -> Source:
    """The model that is trained."""
    folder = workspace.source.folder
    return Source(
        model=config.model,
        name=workspace.source.name,
        folder=str(folder.resolve()),
        weights=fingerprint(folder),
        configuration=configuration_digest(folder),
    )


def quality(model: Any, dense: Any, plan: SparsityPlan | None, sequences: Tensor) -> Quality | None:
    """A model beside the dense one on the held-out slice; None of one whose sparsity nobody can count here."""
    if plan is None:
        try:
            plan = make_intrinsic_(model)
        except ArtefactError:
            return None
    elif not sparse_layers(model):
        sparsify_(model, plan)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype != dense.dtype):
        ((found,),) = compare(model, [plan], sequences, dense_prefixes=[sequences.shape[1] // 2], dense=dense)
    return Quality(
        perplexity_ratio=found.ratio,
        kl=found.kl,
        realised_sparsity=found.realised_sparsity,
        bytes_per_token=weight_bytes_per_token(model, found.realised_by_projection),
        dense_bytes_per_token=weight_bytes_per_token(dense, {}),
    )


def measured_on(
    config: AdaptConfig, workspace: Workspace, reads: Reads, trained: Trained, model: Any
) -> CalibrationInfo:
    """What the thresholds were set on, as a checkpoint says it."""
    sequences = reads.text.first(max(1, MEASURED_ON // config.seq_len))
    return CalibrationInfo(
        model=workspace.source.name,
        weights="",
        dataset=" + ".join(dataset_identity(name) for name in config.dataset),
        tokens=sequences.numel(),
        seq_len=config.seq_len,
        sink_tokens=0,
        seed=config.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        seconds=trained.seconds,
        versions=library_versions(),
    )


def record(
    config: AdaptConfig,
    recipe: Recipe,
    workspace: Workspace,
    reads: Reads,
    trained: Trained,
    before_and_after: tuple[Quality | None, Quality | None],
    model: Any,
) -> Record:
    """adapt.json."""
    trained_one = source_of(config, workspace)
    again = is_adapted(workspace.source.folder)
    last: dict[float, float] = {}  # of each stage
    for point in trained.curve:
        last[point["stage"]] = max(point["step"], last.get(point["stage"], 0.0))
    steps = round(sum(last.values()))
    return Record(
        teal_version=__version__,
        finished=now(),
        recipe=recipe.name,
        options=config.recipe_options.model_dump(mode="json"),
        settings=config.settings(),
        source=read_record(workspace.source.folder).source if again else trained_one,
        parent=trained_one if again else None,
        text=reads.used(config),
        repeats=reads.text.repeats(),
        tokens=steps * config.tokens_a_step,
        steps=steps,
        stopped_early=trained.stopped,
        best=trained.best,
        parameters=trained.parameters,
        seconds=trained.seconds,
        device=device_description(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=library_versions(),
        curve=trained.curve,
        before=before_and_after[0],
        after=before_and_after[1],
        notes=dict(trained.outcome.notes),
    )
