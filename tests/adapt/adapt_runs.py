"""Small runs of `teal adapt`'s loop on tiny models, for the tests of this folder."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import build_model
from tiny_configs import VOCABULARY

from teal_cli.adapt.loop import Run, Trained, run
from teal_cli.adapt.recipe import Setting
from teal_cli.adapt.recipes import recipe_class
from teal_cli.adapt.training import Plan
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.config.recipes import options_of
from teal_cli.models.architectures import find_projections

STEPS, BATCH, TOKENS = 4, 4, 24


class Rows(torch.utils.data.Dataset):
    """Random sequences, each with a dense prefix of its own; so many `distinct` ones, again and again."""

    def __init__(self, count: int, seed: int, distinct: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, VOCABULARY, (distinct or count, TOKENS), generator=generator)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = index % len(self.ids)
        return {"input_ids": self.ids[row], "dense_prefix": torch.tensor(row % (TOKENS // 2))}


def plan_of(model: Any, threshold: float = 0.3) -> SparsityPlan:
    """One threshold for every projection."""
    rules = {projection.name: Threshold(threshold, 0.5) for projection in find_projections(model)}
    return SparsityPlan("uniform", 0.5, rules)


def training_plan(folder: Path, rate: float, patience: int = 0, save_seconds: float = 0.0) -> Plan:
    """How a tiny model is trained: every step is logged, every second one kept."""
    return Plan(
        folder=folder,
        batch_size=BATCH,
        processes=1,
        accumulate=1,
        learning_rate=rate,
        warmup=0.2,
        schedule="cosine",
        clip=1.0,
        bf16=False,
        on_cpu=True,
        log_every=1,
        evaluate_every=2,
        save_seconds=save_seconds,
        patience=patience,
        seed=0,
    )


def tiny_run(
    folder: Path,
    *,
    lora: int = 0,
    recompute: bool = False,
    hidden_weight: float = 0.0,
    on_step: Callable[[int], None] = lambda step: None,
    steps: int = STEPS,
    key: str = "the run",
    rate: float = 2e-3,
    patience: int = 0,
    save_seconds: float = 0.0,
    distinct: int | None = None,
    recipe: str = "recover",
    **options: object,
) -> tuple[Any, Trained]:
    """Adapt a tiny Llama; the model afterwards, and what came out."""
    model = build_model("llama")
    dense = copy.deepcopy(model)
    setting = Setting(options_of(recipe)(**options), 0, 0.5, lora, plan_of(model))
    text = Rows(STEPS * BATCH, 1, distinct)
    return model, run(
        Run(
            model=model,
            recipe=recipe_class(recipe)(setting),
            plan=training_plan(folder, rate, patience, save_seconds),
            steps=steps,
            text=text,
            held_out=Rows(BATCH, 2 if distinct is None else 1),
            sequences=text.ids[:2],
            key=key,
            teacher=lambda: dense,
            hidden_weight=hidden_weight,
            recompute=recompute,
            on_step=on_step,
        )
    )
