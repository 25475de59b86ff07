"""llama.cpp for `teal bench --compare-llama-cpp`: refused where it would be another comparison than it says."""

from pathlib import Path

import torch

from teal_cli.bench.llama_cpp import LlamaBench, LlamaFile
from teal_cli.config import BenchConfig
from teal_cli.errors import UsageError
from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import outline, pick_device
from teal_cli.workspace import Workspace


def llama_bench(config: BenchConfig, workspace: Workspace | None) -> LlamaBench | None:
    """llama-bench as a configuration names it, checked before any weights are loaded; None where it names none.

    Args:
        config: of bench.
        workspace: of a model with weights; None for random ones.

    Raises:
        UsageError: a GPU, or a file of another model or width.
        ArtefactError: no GGUF file.
        MachineError: no llama-bench.
    """
    if config.compare_llama_cpp is None or config.llama_model is None:
        return None
    if pick_device(config.device).type != "cpu":
        raise UsageError("compare_llama_cpp (flag --compare-llama-cpp) is for a CPU: give --device cpu")
    file = LlamaFile.read(config.llama_model)
    if workspace is None:
        name, model = config.model, outline(require_alias(config.model))
    else:
        name, folder = workspace.source.name, workspace.source.folder
        model = outline(folder, workspace.architecture(config))
    file.require_shape(name, model.config)
    known = config.quantisation or (config.dtype if config.dtype != "auto" else None)
    if known is not None:
        file.require_width(known)
    return LlamaBench(
        Path(config.compare_llama_cpp),
        file,
        threads=torch.get_num_threads(),
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
    )
