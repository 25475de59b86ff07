"""From what `--speculate` says to what drafts for a loaded model."""

from teal_cli.console import Reporter
from teal_cli.decode.engine import Engine
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.quantise.copies import quantised_copy
from teal_cli.sparse import control_of, use_backend
from teal_cli.speculation import Speculation


def speculator_for(
    engine: Engine, drafts: Speculation, count: int | None, reporter: Reporter
) -> tuple[Speculator, int]:
    """What decodes with these drafts, and the bytes that they take beside the model.

    Args:
        engine: of the model that verifies, whose layers have the rules that sparse drafts skip inputs by.
        drafts: as asked for.
        count: tokens of a draft; None for as many as pay.
        reporter: told what takes a while.

    Raises:
        UsageError: a model that cannot be decoded speculatively.
        ArtefactError: layers that cannot be quantised.
    """
    model, taken = engine.model if drafts.has_model else None, 0
    options = {"sparse": drafts.sparse, "lookup": drafts.lookup, "count": count}
    made = Speculator(engine, model, **options)  # refuses before the work
    if drafts.scheme is None:
        return made, taken
    reporter.say(f"quantising a copy to {drafts.scheme} that drafts")
    model, taken = quantised_copy(engine.model, drafts.scheme)
    if engine.control is not None:
        use_backend(control_of(model), engine.control.backend, engine.device, model.dtype)
    return Speculator(engine, model, **options), taken
