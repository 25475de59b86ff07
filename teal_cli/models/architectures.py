"""Which linear layers of which model types are made sparse: a table, not code.

A *site* is one hidden state; the *projections* that read it share one histogram. Adding a family
whose blocks look like one of these is a row here and a line in tests (docs/add-a-model-family.md).
"""

from dataclasses import dataclass

from torch import nn

from teal_cli.errors import ArtefactError


@dataclass(frozen=True)
class Site:
    """A hidden state and the projections, by their path inside a block, that read it."""

    name: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Where the decoder blocks are and what is sparsified in each."""

    blocks: str
    sites: tuple[Site, ...]


_LLAMA = Architecture(
    blocks="model.layers",
    sites=(
        Site("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Site("attention_output", ("self_attn.o_proj",)),
        Site("mlp_input", ("mlp.gate_proj", "mlp.up_proj")),
        Site("mlp_intermediate", ("mlp.down_proj",)),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "sparsellama": _LLAMA,
    "bamboo": _LLAMA,
}
"""transformers' `config.model_type` -> architecture."""


@dataclass(frozen=True)
class Projection:
    """One sparsified linear layer of a model."""

    name: str
    """Full module path, e.g. model.layers.0.self_attn.q_proj."""
    site: str
    """Full name of the hidden state it reads, e.g. model.layers.0.attention_input."""
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Weights of the projection; the bias is not counted, being read whatever the sparsity."""
        return self.in_features * self.out_features


def architecture_of(model_type: str) -> Architecture:
    """The row of a model type.

    Raises:
        ArtefactError: a type that the table does not have.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise ArtefactError(
            f"model type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))} "
            "(docs/add-a-model-family.md)"
        ) from None


OUTPUT_SITE = "output_input"
"""The hidden state that the output layer reads."""


def find_projections(model: nn.Module, *, output_layer: bool = False) -> list[Projection]:
    """Every projection of a transformers model, in the order in which a token meets them.

    Args:
        model: a causal language model.
        output_layer: count the layer of the logits among them.

    Raises:
        ArtefactError: unsupported model type, or a module that the table promises and the model lacks.
    """
    architecture = architecture_of(str(getattr(model.config, "model_type", None)))
    blocks = model.get_submodule(architecture.blocks)
    found = []
    for index, block in enumerate(blocks.children()):
        prefix = f"{architecture.blocks}.{index}"
        for site in architecture.sites:
            for path in site.projections:
                try:
                    module = block.get_submodule(path)
                except AttributeError:
                    module = None
                if not isinstance(module, nn.Linear):
                    raise ArtefactError(f"{prefix}.{path} is not a linear layer of this model; its family needs a row")
                found.append(
                    Projection(f"{prefix}.{path}", f"{prefix}.{site.name}", module.in_features, module.out_features)
                )
    if output_layer:
        output = model.get_output_embeddings()  # type: ignore[operator]
        name = next((name for name, module in model.named_modules() if module is output), None)
        if name is None or not isinstance(output, nn.Linear):
            raise ArtefactError("this model's output layer is not a linear layer: leave --output-layer out")
        found.append(Projection(name, OUTPUT_SITE, output.in_features, output.out_features))
    return found
