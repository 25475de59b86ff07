"""A GGUF file of a shape with random weights, for llama.cpp to be timed on.

    python benchmarks/random_gguf.py --model llama-3.2-1b --llama-source FOLDER --out llama-3.2-1b.BF16.gguf

FOLDER is llama.cpp's source tree, whose own converter writes the file: names, order and metadata are then what its
programs expect of the family. Weights are bfloat16, with the seed of `teal bench --random-weights`; llama.cpp's
llama-quantize makes the other widths of it (`llama-quantize FILE OTHER Q8_0`). There is no tokenizer in it.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import build_random_model


def write_gguf(model: Any, source: Path, file: Path, older_keys: dict[str, Any] | None = None) -> None:
    """Write a model as llama.cpp's converter does, in bfloat16 but for norms and biases.

    Args:
        model: of transformers, with its weights in bfloat16.
        source: llama.cpp's source tree.
        file: to write.
        older_keys: of a configuration, which the converter knows and transformers writes no more.

    Raises:
        ModuleNotFoundError: no converter in the source tree.
        NotImplementedError: llama.cpp does not have the architecture.
    """
    sys.path[:0] = [str(source), str(source / "gguf-py")]  # the converter goes with the gguf beside it
    try:
        conversion: Any = importlib.import_module("conversion")
        gguf: Any = importlib.import_module("gguf")
    finally:
        del sys.path[:2]
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    vocabulary = model.config.vocab_size
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, torch.inference_mode():
        model.save_pretrained(folder)
        # Some count its tokens, and none needs to know them.
        tokenizer = {"model": {"vocab": [""] * vocabulary}, "added_tokens": []}
        Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        (name,) = (older_keys or {}).get("architectures", [type(model).__name__])
        made = conversion.get_model_class(name)(Path(folder), gguf.LlamaFileType.MOSTLY_BF16, file)
        converter = getattr(made, "impl", made)

        def set_vocab() -> None:
            converter.gguf_writer.add_tokenizer_model("none")
            converter.gguf_writer.add_vocab_size(vocabulary)

        converter.set_vocab = set_vocab
        converter.hparams.update(older_keys or {})
        made.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an alias")
    parser.add_argument("--llama-source", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = build_random_model(require_alias(arguments.model), device="cpu", dtype="bfloat16", seed=arguments.seed)
    write_gguf(model, arguments.llama_source, arguments.out)


if __name__ == "__main__":
    main()
