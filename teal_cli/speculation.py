"""What drafts: the value of `--speculate`."""

from dataclasses import dataclass

from teal_cli.schemes import Scheme

MOST_DRAFTED = 7
"""Tokens of a draft at most: with the one before them they are the eight rows that kernels take."""
FORMS = "lookup, sparse, int8, int4 or int4:GROUP, or several with + between them, as lookup+int4+sparse"


@dataclass(frozen=True)
class Speculation:
    """Sources of drafted tokens."""

    lookup: bool
    """What followed the last tokens where they stood before in the text."""
    scheme: Scheme | None
    """Of a quantised copy of the model; None for the model's own weights."""
    sparse: bool
    """Whether the model that drafts skips inputs."""

    @classmethod
    def parse(cls, text: str) -> "Speculation":
        """Read words with + between them.

        Raises:
            ValueError: anything else than `FORMS`.
        """
        words = [word.strip() for word in text.split("+")]
        lookup, sparse = "lookup" in words, "sparse" in words
        schemes = [word for word in words if word not in ("lookup", "sparse")]
        if len(set(words)) < len(words) or len(schemes) > 1:
            raise ValueError(f"{text!r} is not {FORMS}")
        try:
            return cls(lookup, Scheme.parse(schemes[0]) if schemes else None, sparse)
        except ValueError as error:
            raise ValueError(f"{text!r} is not {FORMS}") from error

    @property
    def has_model(self) -> bool:
        """Whether a model drafts."""
        return self.sparse or self.scheme is not None

    @property
    def text(self) -> str:
        """What `parse` reads."""
        words = ["lookup"] if self.lookup else []
        words += [self.scheme.text] if self.scheme is not None else []
        return "+".join([*words, "sparse"] if self.sparse else words)

    def __str__(self) -> str:
        return self.text
