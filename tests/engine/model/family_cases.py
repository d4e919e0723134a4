"""Tiny configs of every family, and of what differs within one."""

from __future__ import annotations

from typing import Any

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
}

VARIANTS = [
    *({"rope_parameters": rope} for rope in ROPE.values()),
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "head_dim": 8},
]


def ropes(**full: Any) -> dict[str, Any]:
    """Gemma 3's two: of its full and its sliding layers."""
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6, **full},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 384,
}

OLMO3 = ropes(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.2)

MINISTRAL3 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}

# Windows are shorter than the prompts, and one is shorter than a branch of the tree is deep.
FAMILIES = [
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 19}),
    ("mistral", {"sliding_window": 3, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    ("qwen3", {}),
    (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    ("gemma3_text", {"num_hidden_layers": 3, "sliding_window": 21, "sliding_window_pattern": 3}),
    (
        "gemma3_text",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 300,
            "query_pre_attn_scalar": 9,
            "rope_parameters": ropes(rope_type="linear", factor=8.0),
            "tie_word_embeddings": True,
        },
    ),
    ("phi3", {"sliding_window": 30, "hidden_size": 64}),
    ("phi3", {"hidden_size": 64, "rope_parameters": LONGROPE}),
    (
        "phi3",
        {"hidden_size": 64, "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 0.5}},
    ),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4, "rope_parameters": ROPE["llama3"]}),
    ("olmo3", {"num_hidden_layers": 4, "sliding_window": 21, "rope_parameters": OLMO3}),
    ("olmo3", {"num_hidden_layers": 2, "sliding_window": 300, "num_key_value_heads": 4}),
    ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    (
        "smollm3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 30, "attention_bias": True},
    ),
    ("exaone4", {"num_hidden_layers": 5, "sliding_window": 21}),
    (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": ROPE["llama3"]},
    ),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": False, "mlp_bias": True}),
    ("ministral3", {"rope_parameters": MINISTRAL3}),
    (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.5,
            "logits_scaling": 4.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    ("ernie4_5", {"head_dim": 12, "num_key_value_heads": 4}),
    ("glm", {"attention_bias": True}),
    ("glm", {"attention_bias": False, "rope_parameters": {**ROPE["yarn"], "partial_rotary_factor": 0.25}}),
    ("glm4", {"attention_bias": True, "head_dim": 24}),
    ("hunyuan_v1_dense", {"attention_bias": True}),
    (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 100.0, "factor": 1.0}},
    ),
    ("granite", {"attention_multiplier": 0.25, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 5, "sliding_window": 30}),
    (
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    (
        "qwen3_moe",
        {
            "decoder_sparse_step": 2,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 40,
            "attention_bias": True,
        },
    ),
    ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "hidden_size": 64}),
    (
        "gpt_oss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 30,
            "swiglu_limit": 1.5,
            "rope_parameters": GPT_OSS,
        },
    ),
    ("granitemoe", {"num_local_experts": 5, "residual_multiplier": 0.22, "logits_scaling": 4.0}),
    (
        "ernie4_5_moe",
        {
            "num_hidden_layers": 4,
            "moe_layer_end_index": 2,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 20,
            "moe_norm_min": 0.5,
        },
    ),
    (
        "ernie4_5_moe",
        {
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "moe_intermediate_size": 24,
        },
    ),
    (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    (
        "glm4_moe",
        {
            "first_k_dense_replace": 0,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 1.0},
        },
    ),
    (
        "qwen2_moe",
        {
            "mlp_only_layers": [0],
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 30,
            "max_window_layers": 2,
        },
    ),
    (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    (
        "dots1",
        {
            "first_k_dense_replace": 1,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "sliding_window": 30,
            "max_window_layers": 1,
        },
    ),
    ("hunyuan_v1_moe", {"num_experts": 5, "moe_topk": [3, 3], "attention_bias": True}),
    (
        "hunyuan_v1_moe",
        {
            "num_experts": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 100.0, "factor": 1.0},
        },
    ),
    (
        "solar_open",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "rope_parameters": {**ROPE["default"], "partial_rotary_factor": 1.0},
        },
    ),
    ("flex_olmo", {"num_experts": 5, "num_experts_per_tok": 3, "attention_bias": True}),
]
