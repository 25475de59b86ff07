"""Configurations of tiny models of every supported family."""

VOCABULARY = 300
_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TINY_CONFIGS = {
    "llama": {"model_type": "llama", **_TINY},
    "llama-bias": {"model_type": "llama", **_TINY, "attention_bias": True, "tie_word_embeddings": True},
    "llama-rope-scaling": {
        "model_type": "llama",
        **_TINY,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", **_TINY, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **_TINY},
    "qwen3": {"model_type": "qwen3", **_TINY, "head_dim": 16},
}
"""What the fused path knows: tests of kernels and of quantised weights run on these."""

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 100,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 1,
    "pad_token_id": 1,
    "eos_token_id": 1,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    **TINY_CONFIGS,
    "sparsellama": {"model_type": "sparsellama", **_TINY, "hidden_act": "fatrelu", "hidden_act_param": 0.01},
    "bamboo": {"model_type": "bamboo", **_TINY, "hidden_act": "relu"},
    "gemma": {"model_type": "gemma", **_TINY, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **_TINY, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"model_type": "gemma3_text", **_TINY, "head_dim": 16, "sliding_window": 16},
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {**_TINY, "head_dim": 16, "sliding_window": 16},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "phi3": {"model_type": "phi3", **_TINY, "sliding_window": 16},
    "phi3-long": {
        "model_type": "phi3",
        **_TINY,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
            "long_factor": [1.0, 1.5, 3.0, 8.0, 20.0, 40.0],
        },
    },
    "stablelm": {"model_type": "stablelm", **_TINY, "use_qkv_bias": True},
    "seed_oss": {"model_type": "seed_oss", **_TINY, "head_dim": 16},
    "smollm3": {"model_type": "smollm3", **_TINY, "no_rope_layers": [1, 0]},
    "arcee": {"model_type": "arcee", **_TINY},
    "nemotron": {"model_type": "nemotron", **_TINY, "head_dim": 16},
    "granite": {
        "model_type": "granite",
        **_TINY,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
        "logits_scaling": 5.0,
    },
    "ministral3": {
        "model_type": "ministral3",
        **_TINY,
        "head_dim": 16,
        "sliding_window": 24,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.4,
            "original_max_position_embeddings": 8,
        },
    },
    "helium": {"model_type": "helium", **_TINY, "head_dim": 16},
    "ernie4_5": {"model_type": "ernie4_5", **_TINY, "head_dim": 16, "use_bias": True},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", **_TINY, "head_dim": 16},
    "glm": {"model_type": "glm", **_TINY, "head_dim": 16},
    "glm4": {"model_type": "glm4", **_TINY, "head_dim": 16},
    "phi": {"model_type": "phi", **_TINY},
    "cohere": {"model_type": "cohere", **_TINY, "logit_scale": 0.3},
    "starcoder2": {"model_type": "starcoder2", **_TINY, "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", **_TINY, "n_inner": 100},
    "gpt_neox": {"model_type": "gpt_neox", **_TINY},
    "gpt_neox-sequential": {"model_type": "gpt_neox", **_TINY, "use_parallel_residual": False},
    "opt": {"model_type": "opt", **_TINY, "ffn_dim": 100, "word_embed_proj_dim": 48},
    "falcon": {"model_type": "falcon", **_TINY, "ffn_hidden_size": 100},
    "falcon-bias": {
        "model_type": "falcon",
        **_TINY,
        "ffn_hidden_size": 100,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "alibi": True,
    },
    "falcon-new": {"model_type": "falcon", **_TINY, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": {"model_type": "mixtral", **_TINY, "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_TINY,
        **_EXPERTS,
        "head_dim": 16,
        "num_experts": 5,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "bert": {"model_type": "bert", **_TINY},
    "t5": {"model_type": "t5", **_T5},
    "t5-gated": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
"""One line a family: a new one is tested by adding it here (tests/models/test_families.py)."""
OTHERS = [
    *("phi3", "phi3-long", "seed_oss", "smollm3", "gemma", "stablelm", "arcee", "nemotron", "starcoder2"),
    *("granite", "ministral3", "helium", "ernie4_5", "hunyuan_v1_dense", "glm", "glm4", "gemma2", "phi", "cohere"),
]
"""What the native path takes besides TINY_CONFIGS, gpt2, opt and what is sparse by training. Their tests have
a matrix of their own, so that a new one leaves the cases of those before it alone."""
