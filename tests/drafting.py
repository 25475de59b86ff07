"""Speculators of tiny models, and requests that a scheduler decodes to their ends."""

from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.quantise.copies import quantised_copy
from teal_cli.speculation import Speculation


def speculator(engine: Engine, kind: str, count: int | None = None) -> Speculator:
    drafts = Speculation.parse(kind)
    draft = engine.model if drafts.has_model else None
    if drafts.scheme is not None:
        draft, _ = quantised_copy(engine.model, drafts.scheme)
    return Speculator(engine, draft, sparse=drafts.sparse, lookup=drafts.lookup, count=count)


def run_all(scheduler: Scheduler, requests: list[Request]) -> list[list[Emitted]]:
    heard: list[list[Emitted]] = [[] for _ in requests]
    for request, own in zip(requests, heard, strict=True):
        scheduler.submit(request, own.append)
    scheduler.stop()
    scheduler.run()
    return heard
