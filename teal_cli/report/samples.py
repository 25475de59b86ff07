"""What dense and sparse wrote, laid out so that their differences can be seen token by token."""

from dataclasses import dataclass
from typing import Any

from teal_cli.report.inputs import Material


@dataclass(frozen=True)
class Token:
    """One token of a continuation."""

    text: str
    other: str | None
    """What the dense model would have written in its place, after the same text; None where it agrees."""
    parts: bool = False
    """Whether dense and sparse continuations differ from here on."""

    @property
    def space(self) -> str:
        """The blanks that the token begins with; they stay outside of a frame, so that a line can end there."""
        return self.text[: len(self.text) - len(self.text.lstrip(" "))] if self.text.strip() else ""


@dataclass(frozen=True)
class Passage:
    """One prompt and its two continuations."""

    prompt: str
    sparse: list[Token]
    dense: list[Token]
    agreeing: int
    """Sparse tokens that the dense model would have written too."""
    together: int
    """Tokens before the continuations part."""


@dataclass(frozen=True)
class Passages:
    """The samples of one plan."""

    plan: str
    file: str
    passages: list[Passage]


def passages(material: Material) -> list[Passages]:
    """The samples of every plan that has some, the one in focus first."""
    focus = material.focus
    own = [] if focus is None else [run for _, run, _ in material.evals_of(focus)]
    found: dict[tuple[str, str, float], tuple[bool, Passages]] = {}
    for result, run in material.evaluated():
        samples = (run["generation"] or {}).get("samples") or []
        sparse = run["sparse"]
        name = result.name_of(result.weights_of(run))
        key = (name, sparse["allocation"], sparse["target_sparsity"])
        if samples and key not in found:
            plan = ", ".join(filter(None, (result.weights_of(run), str(sparse["allocation"]))))
            if sparse.get("neuron_sparsity") is None:
                plan += f", target {sparse['target_sparsity']:.2f}"
            shown = Passages(plan, result.file.name, [_passage(sample) for sample in samples])
            found[key] = (run not in own, shown)
    return [each for _, each in sorted(found.values(), key=lambda item: item[0])]


def _passage(sample: dict[str, Any]) -> Passage:
    sparse, dense = sample["sparse"], sample["dense"]
    pairs = zip(sparse, dense, strict=False)
    together = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(sparse), len(dense)))
    judged = zip(sparse, sample["dense_choices"], sample["agrees"], strict=True)
    return Passage(
        prompt=sample["prompt"],
        sparse=[
            Token(text, None if agrees else choice, index == together)
            for index, (text, choice, agrees) in enumerate(judged)
        ],
        dense=[Token(text, None, index == together) for index, text in enumerate(dense)],
        agreeing=sum(sample["agrees"]),
        together=together,
    )
