"""A GGUF file of an alias's shape with random weights, for llama.cpp to be timed on.

    python benchmarks/random_gguf.py --model llama-3.2-1b --out llama-3.2-1b.BF16.gguf

bfloat16, the seed of `teal bench --random-weights`; llama.cpp's llama-quantize makes the other widths of it
(`llama-quantize FILE OTHER Q8_0`). It is for timing alone: there is no tokenizer in it, the rows of q and k are not
in the order in which llama.cpp rotates them, and rotations are not scaled for long contexts.
"""

import argparse
from pathlib import Path
from typing import Any

import gguf
import torch

from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import build_random_model

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(model: Any, file: Path) -> None:
    """Write a model of type llama or qwen2; matrices in bfloat16, norms and biases in float32.

    Args:
        model: with its weights.
        file: to write.

    Raises:
        KeyError: a model of another type.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        its_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if its_name is None:
            raise KeyError(f"GGUF has no name for {name}")
        values = tensor.float().contiguous().numpy()
        if values.ndim == 1:
            writer.add_tensor(its_name, values)
            continue
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(its_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    alias = require_alias(arguments.model)
    with torch.no_grad():
        model = build_random_model(alias, device="cpu", dtype="bfloat16", seed=arguments.seed)
        write_gguf(model, arguments.out)


if __name__ == "__main__":
    main()
