"""lm-evaluation-harness tasks, dense against sparse, by the decode rule.

A request's context runs dense, as a prompt would, and its continuation runs sparse, as decoding
would. The first token of a continuation is predicted by the last context position, so a
continuation of a single token is scored by the dense model alone: tasks of that kind (letters A to
D) cannot show a difference.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from teal_cli.errors import ArtefactError, MachineError, blame, nearest, shown
from teal_cli.models.tokenizing import check_ids
from teal_cli.sparse import SparsityControl


def _adapter(model: Any, tokenizer: Any, control: SparsityControl) -> Any:
    from lm_eval.models.huggingface import HFLM

    class DecodeRuleLM(HFLM):
        """HFLM that scores one request at a time, each with its own dense prefix."""

        @torch.no_grad()
        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            scores = []
            for key, context, continuation in requests:
                check_ids(tokenizer, context + continuation)
                ids = torch.tensor((context + continuation)[-(self.max_length + 1) :][:-1], device=self.device)
                count = len(continuation)
                prefix = len(ids) - count + 1
                if prefix < 1:
                    raise ArtefactError(
                        f"a continuation of {count} tokens does not fit the context of {self.max_length}"
                    )
                with control.masked(prefix):
                    logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=count).logits[0]
                logprobs = logits.float().log_softmax(-1)
                wanted = torch.tensor(continuation, device=self.device)
                score = float(logprobs.gather(1, wanted[:, None]).sum())
                scores.append((score, bool((logprobs.argmax(-1) == wanted).all())))
                self.cache_hook.add_partial("loglikelihood", key, scores[-1])
            return scores

    return DecodeRuleLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def open_tasks(tasks: Sequence[str], task_path: Path | None) -> Any:
    """The harness's `TaskManager`, which knows the tasks; nothing is downloaded.

    Args:
        tasks: names that the harness (or task_path) knows.
        task_path: folder of task YAML files; then only those are known.

    Raises:
        MachineError: lm-evaluation-harness is not installed.
        ArtefactError: an unknown task, or no such folder.
    """
    if task_path is not None and not task_path.is_dir():
        raise ArtefactError(f"task_path (flag --task-path): there is no folder {task_path}")
    missing = MachineError("--tasks needs lm-evaluation-harness: pip install 'teal-cli[eval]'")
    if find_spec("lm_eval") is None:
        raise missing
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing from error
    with blame("the tasks cannot be listed"):
        manager = TaskManager(
            include_path=None if task_path is None else str(task_path), include_defaults=task_path is None
        )
    for task in tasks:
        if task not in manager.all_tasks:
            raise ArtefactError(f"unknown task {shown(task)}{nearest(task, manager.all_tasks)}")
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    control: SparsityControl,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None,
    seed: int,
    dense: Any = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Score tasks dense, then sparse.

    Args:
        model: a causal language model with sparse layers.
        tokenizer: its tokenizer.
        control: its control.
        tasks: names that the manager knows.
        manager: of `open_tasks`.
        limit: examples a task, None for all.
        seed: of few-shot choice and bootstrap.
        dense: another model to compare with: what `model` was before it was adapted.

    Returns:
        task -> {"dense": {metric: value}, "sparse": {metric: value}}

    Raises:
        ArtefactError: the data of a task cannot be had, or the harness cannot score it.
    """
    from lm_eval import simple_evaluate

    adapters = {"sparse": _adapter(model, tokenizer, control)}
    adapters["dense"] = adapters["sparse"] if dense is None else _adapter(dense, tokenizer, SparsityControl())
    options = {f"{name}_random_seed": seed for name in ("numpy", "torch", "fewshot")} | {"random_seed": seed}
    results: dict[str, dict[str, dict[str, float]]] = {task: {} for task in tasks}
    for kind in ("dense", "sparse"):
        with (
            blame(f"the tasks {', '.join(tasks)} cannot be scored"),
            control.switched_off() if kind == "dense" else nullcontext(),
        ):
            try:
                scored = simple_evaluate(
                    adapters[kind], tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, **options
                )
            except (ConnectionError, FileNotFoundError) as error:
                reason = str(error).strip() or type(error).__name__
                raise ArtefactError(f"the data of the tasks cannot be had: {reason.splitlines()[0]}") from error
        for task in tasks:
            metrics = scored["results"].get(task, {})
            results[task][kind] = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return results
