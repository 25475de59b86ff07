"""Every family that writes, on a real GPU: the text that the definition gives on the CPU, by kernels and graphs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, export_tiny, save_tiny
from transformers import CONFIG_MAPPING

from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import architecture_of
from teal_cli.sparse import control_of, sparse_layers
from teal_kernels.tuning import UNTUNED, trying
from teal_kernels.tuning_entries import Entry

_KNOWN = [name for name in FAMILIES if FAMILIES[name]["model_type"] in CONFIG_MAPPING]  # to this transformers
WRITING = [name for name in _KNOWN if architecture_of(FAMILIES[name]["model_type"]).kind != "encoder"]

# What a table of such small products would say if skipping paid at any sparsity. By those of real models, `auto` reads
# whole what fisher drops less of than pays, as it should; then the text is another one.
ALWAYS_SKIP = [
    Entry(64, (64,), "float32", 1, "plain", 0.0, 2.0, replace(UNTUNED, dense=True)),
    *(Entry(64, (64,), "float32", 1, "plain", sparsity, 0.5, UNTUNED) for sparsity in (0.01, 0.5)),
]


class _Nearest:
    """How near an input of a decode step came to its threshold: within rounding, two right kernels part there."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._least = torch.tensor(torch.inf)
        for layer in sparse_layers(model).values():
            layer.register_forward_pre_hook(self._look)

    def _look(self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        if x[..., 0].numel() == 1 and float(layer.threshold) > 0.0:
            self._least = torch.minimum(self._least, (x.abs() / layer.threshold - 1.0).abs().min().cpu())

    @property
    def decided(self) -> bool:
        return float(self._least) > 1e-5


def _written(folder: Path, device: str, backend: str, seed: int) -> tuple[list[int], list[bool], float | None]:
    """Tokens after a random prompt, whether rounding had no say in each, and the realised sparsity."""
    model = load_model(folder, device=device, dtype="float32")
    control = control_of(model)
    control.backend = backend
    prompt = torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(seed))
    nearest = _Nearest(model)
    tokens, decided = [], []
    with control.counting() as counter:
        for token in Engine(model).generate(prompt, max_new_tokens=16, sampling=SamplingConfig()):
            tokens.append(token)
            decided.append(nearest.decided)
    return tokens, decided, counter.model_wide()


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
@pytest.mark.parametrize("family", WRITING)
def test_text_is_that_of_the_definition(family: str, allocation: str, tmp_path: Path) -> None:
    """With fisher, the output layer drops inputs too."""
    dense = save_tiny(tmp_path / "dense", family)
    folder, _ = export_tiny(dense, tmp_path / "sparse", allocation=allocation, output_layer=None)
    for seed in range(4):  # of the prompt; some have an input on its threshold at the first step
        expected, decided, realised = _written(folder, "cpu", "reference", seed)
        compared = sum(decided)
        if compared >= 8:
            break
    with trying(ALWAYS_SKIP):
        tokens, _, on_gpu = _written(folder, "cuda", "auto", seed)
    assert compared >= 8
    assert tokens[:compared] == expected[:compared]
    assert on_gpu == pytest.approx(realised, abs=0.02)
