"""Which linear layers of which model types are made sparse: a table, not code (architectures.yaml).

A *site* is one hidden state; the *projections* that read it share one histogram. Adding a family
whose blocks look like one of these is a row there and a line in tests (docs/add-a-model-family.md).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.layers import is_stacked, linear_shape
from teal_cli.models.programs import Program
from teal_cli.reading import read_yaml

Kind = Literal["causal", "encoder", "seq2seq"]
_OLD_KEYS = ("flattened", "compact")
_Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Architecture(BaseModel):
    """Where the blocks are and what is sparsified in each: a row of the table, whose head explains the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "causal"
    blocks: Annotated[_Paths, Field(min_length=1)]
    sites: Annotated[dict[Annotated[str, Field(pattern=r"^\w+$")], _Paths], Field(min_length=1)]
    optional: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    program: Program | None = None
    variants: tuple[Program, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_old_keys(cls, row: Any) -> Any:
        """Rows in checkpoints and files of before: nothing depends on these any more."""
        return {key: row[key] for key in row if key not in _OLD_KEYS} if isinstance(row, dict) else row

    @model_validator(mode="after")
    def _program_names_sites(self) -> "Architecture":
        if self.variants and self.program is None:
            raise ValueError("variants stand beside program")
        if self.variants and not all(program.requires for program in self.programs):
            raise ValueError("program and variants must say what they require of the configuration")
        for step in (step for program in self.programs for step in program.products):
            if step.product not in self.sites:
                raise ValueError(f"program: product {step.product} is no site; the sites are {', '.join(self.sites)}")
            layers = self.sites[step.product]
            if any("*" in layer for layer in layers):
                raise ValueError(f"program: the layers of site {step.product} must be names, without *")
            if step.epilogue == "gated" and len(layers) != (1 if step.joined else 2):
                raise ValueError(f"program: site {step.product} is gated, so its layers are gate and up, or one joined")
        return self

    @property
    def programs(self) -> tuple[Program, ...]:
        """`program` and its variants; the first whose requirements a configuration meets is the model's."""
        return () if self.program is None else (self.program, *self.variants)

    def epilogue_of(self, site: str) -> str:
        """What follows the product of a site on the fused path, as `teal_kernels` names it."""
        steps = self.program.products if self.program is not None and self.program.fused else []
        step = next((step for step in steps if step.product == site), None)
        # Of these the epilogue is of no weight beside the product, or not of one launch with it.
        if step is None or step.epilogue == "activated" or (step.joined and not step.experts):
            return "plain"
        return step.epilogue

    @property
    def is_one_decoder(self) -> bool:
        """Whether it is one row of decoder blocks, which can be run one by one."""
        return self.kind == "causal" and len(self.blocks) == 1

    def row(self) -> dict[str, Any]:
        """As it is written into files: what is not the default."""
        return self.model_dump(mode="json", exclude_defaults=True)


def read_table(path: Path) -> dict[str, Architecture]:
    """A file of rows: model type -> architecture.

    Raises:
        UsageError: no such file, or a row that cannot be.
    """
    rows = read_yaml(path, "architecture file")
    found = {}
    for model_type, row in rows.items():
        where = f"architecture file {path}: {model_type}"
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a row is a mapping with blocks and sites")
        other = row.get("like")
        if other is not None and not isinstance(rows.get(other), dict):
            raise UsageError(f"{where}: there is no row {other!r} to be like")
        content = {**({} if other is None else rows[other]), **row}
        content.pop("like", None)
        if content.get("compact"):
            raise UsageError(
                f"{where}: compact is not a key: leave it out; the fused decode path takes blocks that have a program "
                "(docs/add-a-model-family.md)"
            )
        try:
            found[model_type] = Architecture.model_validate(content)
        except ValidationError as error:
            raise UsageError(f"{where}: {_what_is_wrong(error)}") from error
    return found


def _what_is_wrong(error: ValidationError) -> str:
    """The first thing that is, in one line."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    known = f"the keys are {', '.join(Architecture.model_fields)}" if len(first["loc"]) == 1 else "no such key"
    return f"{key} is not a key: {known}"


@cache
def table() -> Mapping[str, Architecture]:
    """The packaged table: transformers' `config.model_type` -> architecture."""
    return read_table(Path(__file__).with_suffix(".yaml"))


def architecture_of(model_type: str) -> Architecture:
    """The row of a model type.

    Raises:
        ArtefactError: a type that the table does not have.
    """
    try:
        return table()[model_type]
    except KeyError:
        raise ArtefactError(
            f"model type {model_type!r} is not in the table of architectures, which has {', '.join(sorted(table()))}; "
            "give its layers with --architecture FILE (docs/add-a-model-family.md)"
        ) from None


def architecture_in(file: Path | None, model_type: str) -> Architecture | None:
    """The row of a model type in a user's file; None where there is no file.

    Raises:
        UsageError: no such row.
    """
    if file is None:
        return None
    rows = read_table(file)
    if model_type not in rows:
        raise UsageError(f"architecture file {file} has no row {model_type!r}, which is the type of this model")
    return rows[model_type]


def architecture_for(model: Any) -> Architecture:
    """The architecture of a model: the one that it carries, else its type's row.

    Raises:
        ArtefactError: it carries none and the table has no such type.
    """
    own = getattr(model, "teal_architecture", None)
    return own if isinstance(own, Architecture) else architecture_of(str(model.config.model_type))


def program_for(model: Any) -> Program | None:
    """The block program of a model; None where its architecture has none.

    Raises:
        ArtefactError: as `architecture_for`.
    """
    architecture, config = architecture_for(model), model.config.get_text_config()
    met = (program for program in architecture.programs if program.unmet(config) is None)
    return next(met, architecture.program)


def kind_for(model: Any) -> Kind:
    """Of a model of any type, one that teal does not know too."""
    try:
        return architecture_for(model).kind
    except ArtefactError:
        return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"


@dataclass(frozen=True)
class Projection:
    """One sparsified linear layer of a model, or one layer of all experts of a block."""

    name: str
    """Full module path, e.g. model.layers.0.self_attn.q_proj."""
    site: str
    """Full name of the hidden state it reads, e.g. model.layers.0.attention_input."""
    in_features: int
    out_features: int
    copies: int = 1
    """Experts that have one each."""
    chosen: int | None = None
    """How many of these a token is sent to; None for all."""

    @property
    def parameters(self) -> int:
        """Weights of the projection; the bias is not counted, being read whatever the sparsity."""
        return self.in_features * self.out_features * self.copies

    @property
    def weights_read(self) -> int:
        """Weights that a token reads where no input is dropped: of experts those of the chosen ones."""
        return self.in_features * self.out_features * (self.copies if self.chosen is None else self.chosen)

    @property
    def is_output(self) -> bool:
        """Whether it is the layer of the logits, and so in no block."""
        return self.site == OUTPUT_SITE


OUTPUT_SITE = "output_input"
"""The hidden state that the output layer reads."""


def block_weights(projections: Iterable[Projection]) -> int:
    """Weights that a token reads of the projections that lie in blocks: what model-wide sparsity is a share of.

    The output layer may drop inputs too. What it then does not read counts as saved, but it is not part of
    what the share is of: the same sparsity is the same bytes a token, whether it takes part or not.
    """
    return sum(projection.weights_read for projection in projections if not projection.is_output)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a transformers model by their paths, in the order in which a token meets them.

    Raises:
        ArtefactError: unsupported model type, or no blocks where its row has them.
    """
    found: dict[str, nn.Module] = {}
    for stack in architecture_for(model).blocks:
        try:
            blocks = model.get_submodule(stack)
        except AttributeError as error:
            raise ArtefactError(f"this model has no blocks at {stack}, where its architecture has them") from error
        found |= {f"{stack}.{index}": block for index, block in enumerate(blocks.children())}
    return found


def find_projections(model: nn.Module, *, output_layer: bool | None = False) -> list[Projection]:
    """Every projection of a transformers model, in the order in which a token meets them.

    Args:
        model: as `models.loading.load_model` gives it.
        output_layer: count the layer of the logits among them; None does where there is one that can.

    Raises:
        ArtefactError: unsupported model type, or linear layers that are not those that the row says.
    """
    architecture = architecture_for(model)
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)  # type: ignore[union-attr, operator]
    found = []
    for path, block in blocks_of(model).items():
        found += list(_of_block(architecture, block, path, chosen))
    if output_layer:
        found.append(output_projection(model, "--output-layer"))
    elif output_layer is None and (output := _find_output(model)) is not None:
        found.append(output)
    return found


def output_projection(model: nn.Module, flag: str) -> Projection:
    """The layer of the logits.

    Args:
        model: as for `find_projections`.
        flag: what asks for it, for the message.

    Raises:
        ArtefactError: it is not a linear layer, or the model not a decoder alone.
    """
    found = _find_output(model)
    if found is None:
        raise ArtefactError(f"this model's output layer is not a linear layer of a decoder: leave {flag} out")
    return found


def _find_output(model: nn.Module) -> Projection | None:
    """The layer of the logits; None where it is not a linear layer of a decoder alone."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is output), None)
    if name is None or not isinstance(output, nn.Linear) or architecture_for(model).kind != "causal":
        return None
    return Projection(name, OUTPUT_SITE, output.in_features, output.out_features)


def _of_block(architecture: Architecture, block: nn.Module, prefix: str, chosen: int | None) -> Iterator[Projection]:
    """The projections of one block: what the row promises must be there, and what is there the row must name."""
    modules = dict(block.named_modules())
    shapes = {name: shape for name, module in modules.items() if (shape := linear_shape(module)) is not None}
    stacked = [name for name, module in modules.items() if is_stacked(module)]
    unnamed = {
        name for name in [*shapes, *stacked] if not any(fnmatchcase(name, pattern) for pattern in architecture.dense)
    }
    for site, patterns in architecture.sites.items():
        for pattern in patterns:
            names = [name for name in shapes if fnmatchcase(name, pattern)]
            if not names and site not in architecture.optional:
                raise ArtefactError(f"{prefix}.{pattern} is not a linear layer of this model; its family needs a row")
            for name in names:
                shape = shapes[name]
                unnamed.discard(name)
                yield Projection(
                    f"{prefix}.{name}",
                    f"{prefix}.{site}",
                    shape.in_features,
                    shape.out_features,
                    shape.copies,
                    chosen if shape.copies > 1 else None,
                )
    if unnamed:
        raise ArtefactError(
            f"{prefix}.{min(unnamed)} is in no site of this architecture and not among its dense layers: "
            "describe the model with --architecture FILE (docs/add-a-model-family.md)"
        )
