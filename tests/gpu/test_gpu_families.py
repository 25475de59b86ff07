"""Every family that writes, on a real GPU: the text that the definition gives on the CPU, by kernels and graphs."""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, export_tiny, save_tiny

from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.seq2seq import engine_for
from teal_cli.models.architectures import architecture_of
from teal_cli.models.loading import load_model
from teal_cli.sparse import control_of

WRITING = [name for name in FAMILIES if architecture_of(FAMILIES[name]["model_type"]).kind != "encoder"]


def _written(folder: Path, device: str, backend: str) -> tuple[list[int], float | None]:
    model = load_model(folder, device=device, dtype="float32")
    control = control_of(model)
    control.backend = backend
    prompt = torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    with control.counting() as counter:
        tokens = list(engine_for(model).generate(prompt, max_new_tokens=16, sampling=SamplingConfig()))
    return tokens, counter.model_wide()


@pytest.mark.parametrize("family", WRITING)
def test_text_is_that_of_the_definition(family: str, tmp_path: Path) -> None:
    folder, _ = export_tiny(save_tiny(tmp_path / "dense", family), tmp_path / "sparse")
    expected, realised = _written(folder, "cpu", "reference")
    tokens, on_gpu = _written(folder, "cuda", "auto")
    assert tokens == expected
    assert on_gpu == pytest.approx(realised, abs=0.02)
