"""From what `--speculate` says to what drafts for a loaded model."""

from typing import Any

from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.quantise.copies import check_copy, quantised_copy
from teal_cli.sparse import control_of, use_backend
from teal_cli.speculation import Speculation

Copies = dict[str, tuple[Any, int]]
"""Scheme -> a quantised copy, and the bytes that it takes beside the model."""


def speculator_for(
    engine: Engine, drafts: Speculation, count: int | None, reporter: Reporter, copies: Copies
) -> tuple[Speculator, int]:
    """What decodes with these drafts, and the bytes that they take beside the model.

    Args:
        engine: of the model that verifies, whose layers have the rules that sparse drafts skip inputs by.
        drafts: as asked for.
        count: tokens of a draft; None for as many as pay.
        reporter: told what takes a while.
        copies: that were made before; those that are made are added.

    Raises:
        UsageError: a model that cannot be decoded speculatively, or a copy of it.
        ArtefactError: layers that cannot be quantised.
    """

    def made(draft: Any) -> Speculator:
        return Speculator(engine, draft, sparse=drafts.sparse, lookup=drafts.lookup, count=count)

    plain = made(engine.model if drafts.has_model else None)  # refuses before the work
    if drafts.scheme is None:
        return plain, 0
    if engine.path.own_kernels:
        check_copy(engine.model, sparse=drafts.sparse)
    if drafts.scheme.text not in copies:
        reporter.say(f"quantising a copy to {drafts.scheme} that drafts")
        copies[drafts.scheme.text] = quantised_copy(engine.model, drafts.scheme)
    model, taken = copies[drafts.scheme.text]
    if engine.control is not None:
        use_backend(control_of(model), engine.control.backend, engine.device, model.dtype)
    return made(model), taken
