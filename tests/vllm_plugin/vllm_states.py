"""What vLLM computes for given tokens, as a process of its own: `python vllm_states.py < REQUEST`.

The request is JSON: `model`, `file`, and `batches`, each a list of replies that run together: `prompt` and `tokens`,
as many in each, which are chosen whatever their logits are. `file` (safetensors) gets, of batch B and step S, where
prompts are step 0, `B.S.logits` (rows, vocabulary), and where a pass has one row, of the Nth layer that skips,
`B.S.N.LAYER` (in,): what it reads.
"""

import json
import sys
from itertools import count
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn


class Recorder:
    """Notes what layers read, and chooses tokens."""

    def __init__(self) -> None:
        self.noted: dict[str, Tensor] = {}
        self.begin("", [])

    def begin(self, batch: str, tokens: list[list[int]]) -> None:
        """Before a batch runs."""
        self.batch, self.tokens = batch, tokens
        self.step, self.layer = count(), count()
        self.read: dict[str, Tensor] = {}

    def multiply(self, layer: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        """In the place of the plugin's."""
        if x.numel() == x.shape[-1]:
            self.read[f"{next(self.layer)}.{getattr(layer, 'prefix', 'lm_head')}"] = x.flatten().clone()
        return self._multiply(layer, x, *rest)

    def compute_logits(self, *given: Any) -> Tensor:
        """In the place of the model's."""
        logits = self._compute_logits(*given)
        step = next(self.step)
        of_step = {"logits": logits, **self.read}
        self.noted |= {f"{self.batch}.{step}.{name}": table.clone() for name, table in of_step.items()}
        self.read, self.layer = {}, count()
        for row, tokens in zip(logits, self.tokens, strict=True):
            row[tokens[step]] = float("inf")
        return logits

    def into(self, model: nn.Module) -> None:
        """Stand between vLLM and a model."""
        from teal_cli.vllm_plugin import method

        self._multiply, method._multiply = method._multiply, self.multiply
        self._compute_logits, model.compute_logits = model.compute_logits, self.compute_logits


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(model=request["model"], dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True)
    recorder = Recorder()
    llm.apply_model(recorder.into)
    for number, replies in enumerate(request["batches"]):
        tokens = [reply["tokens"] for reply in replies]
        recorder.begin(str(number), tokens)
        sampling = SamplingParams(temperature=0, max_tokens=len(tokens[0]), ignore_eos=True)
        prompts = [{"prompt_token_ids": reply["prompt"]} for reply in replies]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        assert [list(reply.outputs[0].token_ids) for reply in found] == tokens
    save_file(recorder.noted, request["file"])


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
