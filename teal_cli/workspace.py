"""RUNS/<model>: a model and where its artefacts lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import DecodingConfig, ModelConfig, SharedConfig
from teal_cli.console import Reporter
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_loading import load_model
from teal_cli.model_source import ModelSource, find_model
from teal_cli.models.architectures import Architecture, Kind, architecture_in
from teal_cli.models.forward import position_limit
from teal_cli.models.loading import configuration, kind_of
from teal_cli.quantise.published import published_codes
from teal_cli.sparse import make_intrinsic_


@dataclass(frozen=True)
class Workspace:
    """A model and its folder of results."""

    source: ModelSource
    runs: Path
    quantisation: str = ""
    """How the model is quantised (`ModelConfig.quantisation`)."""

    @classmethod
    def of(cls, config: SharedConfig, reporter: Reporter) -> "Workspace":
        """Find (or convert, or download) the model that a configuration names."""
        quantisation = config.quantisation if isinstance(config, ModelConfig) else ""
        found = cls(find_model(config.model, reporter.say), config.runs, quantisation)
        if quantisation and found.source.is_teal_checkpoint:
            raise UsageError(
                f"{found.source.folder} is exported already: quantise (flag --quantise) needs the dense model"
            )
        if isinstance(config, ModelConfig) and config.quantise is not None:
            published_codes(found.source.folder, config.quantise)
        return found

    @property
    def run(self) -> Path:
        """RUNS/<model>, or RUNS/<model>-<quantisation>."""
        return self.runs / "-".join(filter(None, (self.source.name, self.quantisation)))

    def export_folder(self, allocation: str, sparsity: float) -> Path:
        """Where `teal export` writes by default."""
        return self.run / f"{allocation}-{digits_of(sparsity)}"

    def architecture(self, config: ModelConfig) -> Architecture | None:
        """The model's row in the architecture file that a configuration names; None where it names none."""
        return architecture_in(config.architecture, str(self.source.config.get("model_type")))

    def row(self, config: ModelConfig) -> dict[str, Any] | None:
        """The same, for a checkpoint to carry."""
        found = self.architecture(config)
        return None if found is None else found.row()

    def kind(self, config: ModelConfig) -> Kind:
        """What kind of model it is."""
        return kind_of(self.source.config, self.architecture(config))

    def require_decoder(self, config: ModelConfig, verb: str) -> None:
        """Refuse an encoder where text is written.

        Raises:
            UsageError: the model is an encoder.
        """
        if self.kind(config) == "encoder":
            raise UsageError(f"{self.source.name} is an encoder and writes no text: teal {verb} needs a decoder")

    def require_positions(self, config: ModelConfig, positions: int, flags: str) -> None:
        """Refuse texts that do not fit a decoder's context, before anything is measured for them.

        Args:
            config: of the verb.
            positions: of a text, its reply included.
            flags: that ask for so many.

        Raises:
            ArtefactError: the context is shorter.
        """
        if self.kind(config) != "causal":  # an encoder and its decoder have positions of their own
            return
        limit = position_limit(configuration(self.source.folder))
        if limit is not None and positions > limit:
            raise ArtefactError(f"{positions} positions ({flags}) exceed the model's context of {limit}")

    def load_intrinsic(self, config: DecodingConfig, verb: str) -> tuple[Any, SparsityPlan]:
        """The dense model, made to skip the zeros of its activation, and the plan that says so.

        Raises:
            TealError: a TEAL checkpoint, an activation that makes no zeros, or what `load_model` raises.
        """
        self.require_dense(f"{verb} --mode intrinsic")
        architecture = self.architecture(config)
        model = load_model(self.source.folder, device=config.device, dtype=config.dtype, architecture=architecture)
        return model, make_intrinsic_(model)

    def require_dense(self, verb: str) -> None:
        """Refuse a TEAL checkpoint where the dense model is needed.

        Raises:
            UsageError: the model is a TEAL checkpoint.
        """
        if self.source.is_teal_checkpoint:
            raise UsageError(
                f"{self.source.folder} is a TEAL checkpoint: teal {verb} needs the dense model it came from"
            )


def digits_of(sparsity: float) -> str:
    """A target as file names have it: two decimals, or as many as it takes for targets not to collide."""
    return f"{sparsity:.2f}" if round(sparsity, 2) == sparsity else repr(sparsity)
