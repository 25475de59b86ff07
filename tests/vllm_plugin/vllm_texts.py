"""Greedy texts by vLLM, as a process of its own: `python vllm_texts.py < REQUEST`.

The request is JSON: `models`, `prompts`, `tokens`, and `options` of `vllm.LLM`. Prompts are asked for one at a time.
The last line is JSON too: the texts of each model.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"])
    texts = []
    for model in request["models"]:
        llm = LLM(model=model, dtype="float32", max_model_len=128, max_num_seqs=4, **request["options"])
        texts.append([llm.generate([p], sampling, use_tqdm=False)[0].outputs[0].text for p in request["prompts"]])
        del llm
    print(json.dumps(texts))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
