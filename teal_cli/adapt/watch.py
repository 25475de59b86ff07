"""What a person sees of a run: a bar with loss, sparsity and time left; without a terminal, a line now and then."""

from collections.abc import Iterator
from contextlib import contextmanager

from teal_cli.adapt.training import Figures
from teal_cli.console import Reporter


class Watch:
    """Shows how a run goes on.

    Args:
        reporter: shows it.
        steps: of the whole run.
        tokens_a_step: of one optimiser step.
    """

    def __init__(self, reporter: Reporter, steps: int, tokens_a_step: int) -> None:
        self._reporter, self._steps, self._tokens = reporter, steps, tokens_a_step
        self._done: int | None = None
        self._figures: Figures = {}

    @contextmanager
    def bar(self, name: str) -> Iterator[None]:
        """The bar, as long as the block runs."""
        with self._reporter.progress(name, self._steps * self._tokens) as self._advance:
            yield

    def tell(self, figures: Figures) -> None:
        """Figures were logged; a line of them where there is no terminal and something was evaluated."""
        self._figures |= figures
        if "held_out_loss" in figures and not self._reporter.err.is_terminal:
            self._reporter.say(f"step {figures['step']:,.0f} of {self._steps:,}: {self._text()}")

    def step(self, number: int) -> None:
        """A step is done; a resumed run begins after those that were done before."""
        new = number if self._done is None else number - self._done
        self._done = number
        self._advance(new * self._tokens, self._text())

    def _text(self) -> str:
        found = self._figures
        parts = [f"loss {found['loss']:.4f}"] if "loss" in found else []
        if "held_out_loss" in found:
            parts.append(f"held out {found['held_out_loss']:.4f}")
        if "sparsity" in found:
            parts.append(f"sparsity {found['sparsity']:.1%}")
        return ", ".join(parts) or "training"
