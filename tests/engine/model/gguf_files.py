"""Tiny models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from engine.model.config import ModelConfig
from tests.engine.model.gguf_cases import ARCHITECTURES, NAMES, OTHER_NAMES, PERMUTED
from tests.support import tiny_model

RENAMED = {
    "block_sparse_moe": "mlp",
    "mlp.router": "mlp.gate",
    "mlp.gate.wg": "mlp.gate",
    "gate.moe_statics": "gate",
    "mlp.shared_expert.": "mlp.shared_experts.",
    "mlp.shared_mlp.": "mlp.shared_experts.",
}
"""Of what transformers calls parts of a mixture, what `Checkpoint` does."""

FURTHER = ("attn_norm.weight", "ffn_up_exps.weight", "nextn.eh_proj.weight")
"""Tensors of a layer that guesses further ahead, which nobody reads."""

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}


def q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32: a float16 scale and 32 bytes. Returns the bytes and what they stand for."""
    rows, restored = [], np.zeros_like(values)
    for number, row in enumerate(values):
        packed = b""
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            scale = np.float16(np.abs(block).max() / 127)
            q = np.round(block / np.float32(scale)).clip(-127, 127).astype(np.int8)
            packed += scale.tobytes() + q.tobytes()
            restored[number, start : start + 32] = q.astype(np.float32) * np.float32(scale)
        rows.append(np.frombuffer(packed, dtype=np.uint8))
    return np.stack(rows), restored


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def sentencepiece(writer: gguf.GGUFWriter, size: int) -> None:
    pieces = ["\u2581", "a", "b", "c", "ab", "\u2581ab", "abc", "  "]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 1), 4]
    scores = [0.0] * 259 + [-9.0, -10.0, -11.0, -12.0, -3.0, -2.0, -1.0, -20.0]
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores + [-99.0] * (size - len(scores)))
    writer.add_token_types(kinds + [1] * (size - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def byte_level(writer: gguf.GGUFWriter, size: int, pre: str = "qwen2") -> None:
    tokens = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "\u0120ab",
        "12",
        "<|im_start|>",
        "<|im_end|>",
        "<|end_of_text|>",
        "<|observation|>",
        "<eos>",
    ]
    kinds = [1] * 259 + [3, 4, 3, 3] + [1] * (size - 263)
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "\u0120 ab", "1 2"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")


def describe(writer: gguf.GGUFWriter, model: Any) -> None:
    """The metadata of the architecture, and the tensors that stand for some of it."""
    config, arch = model.config, writer.arch
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + (arch == "glm4moe"))  # which has one that guesses
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch not in ("phi3", "granite", "granitemoe"):
        writer.add_key_length(config.head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    size = config.head_dim
    alpha = rope["alpha"] ** (size / (size - 2)) if rope["rope_type"] == "dynamic" else 1.0
    writer.add_rope_freq_base(rope["rope_theta"] * alpha)
    if alpha != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1)
    if arch in PERMUTED:
        writer.add_rope_dimension_count(config.head_dim)
    if rope["rope_type"] == "llama3":
        scaled = ModelConfig.from_hf(config_of(model)).rope.inv_freq
        plain = rope["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    elif arch == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(int(16 * rope["partial_rotary_factor"]))
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            ratio = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
            for kind in ("long", "short"):
                factors = np.array(rope[f"{kind}_factor"], dtype=np.float32)
                writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    elif arch in ("granite", "granitemoe"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif arch == "glm4":
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    elif config.model_type in ("olmo3", "exaone4") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if config.model_type == "olmo3":
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])

    if count := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        describe_mixture(writer, config)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_sliding_window(config.sliding_window)


def describe_mixture(writer: gguf.GGUFWriter, config: Any) -> None:
    """What is beside experts, and how these are chosen."""
    arch = writer.arch
    if arch in ("ernie4_5-moe", "glm4moe", "qwen2moe", "dots1"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(config.moe_layer_interval)
        writer.add_leading_dense_block_count(config.moe_layer_start_index)
        writer.add_expert_shared_count(config.moe_num_shared_experts)
        # As the converter reckons it, which is right of the published ones alone.
        writer.add_expert_shared_feed_forward_length(config.intermediate_size // config.num_key_value_heads)
    elif arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    elif arch == "hunyuan-moe":
        writer.add_expert_shared_feed_forward_length(config.intermediate_size)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(1)
    elif arch in ("glm4moe", "dots1"):
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if arch == "glm4moe":
        writer.add_rope_dimension_count(
            int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
        )
        writer.add_nextn_predict_layers(1)


def published(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights by the names that `Checkpoint` has for them, to be read and written."""
    state = {}
    of_gpt_oss = model.config.model_type == "gpt_oss"
    for name, tensor in model.state_dict().items():
        if of_gpt_oss and ".mlp.experts." in name:
            state |= _in_turn(*name.split(".experts."), tensor)
            continue
        for own, known in RENAMED.items():
            name = name.replace(own, known)
        if name.endswith(("e_score_correction_bias", "shared_expert_gate.weight")):
            tensor = tensor.flatten()
        module, _, kind = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        if module.endswith("experts"):
            for number, expert in enumerate(tensor):
                for part, own in zip(parts, expert.chunk(len(parts)), strict=True):
                    state[f"{module}.{number}.{part}.weight"] = own
        else:
            state[name] = tensor
    return state


def _in_turn(module: str, own: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """gpt-oss's experts: inputs before outputs, gates and ups in turn."""
    projection, _, kind = own.partition("_proj")
    parts = ("gate", "up") if projection == "gate_up" else (projection,)
    stacked = tensor if kind else tensor.transpose(1, 2)
    return {
        f"{module}.experts.{number}.{part}_proj.{kind[1:] or 'weight'}": expert[place :: len(parts)]
        for number, expert in enumerate(stacked)
        for place, part in enumerate(parts)
    }


def write(path: Path, family: str, overrides: dict[str, Any], **changes: Any) -> Any:
    """A tiny model as a GGUF, its matrices in Q8_0 or F16; returns it with the weights it stands for.

    Args:
        path: the file.
        family: transformers' model type.
        overrides: of `tiny_model`'s config.
        changes: `arch`, another architecture; `stated`, entries of its metadata that are other ones, or None
            for none; `extra`, names of further tensors; `without`, a tensor that is left out; `split`, each
            expert in tensors of its own.
    """
    arch = changes.get("arch", ARCHITECTURES.get(family, family))
    model = tiny_model(family, **(SHAPE | overrides))
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    describe(writer, model)
    for key, value in changes.get("stated", {}).items():
        writer.kv_data[0].pop(f"{arch}.{key}", None)
        if value is not None:
            writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    (byte_level if family.startswith(("qwen", "gpt")) else sentencepiece)(writer, config.vocab_size)
    state = published(model)
    names = NAMES | OTHER_NAMES.get(arch, {})
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stacks: dict[str, list[tuple[np.ndarray, gguf.GGMLQuantizationType | None]]] = {}
    for name in state:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.replace("correction_bias", "correction.bias").rpartition(".")
        layer = module.split(".")[2] if module.startswith("model.layers.") else None
        part = module.split(".", 3)[3] if layer else module
        values = state[name].numpy().copy()
        if kind == "sinks":
            writer.add_tensor(f"blk.{layer}.attn_sinks.weight", values)
            continue
        if arch in PERMUTED and (count := heads.get(part.rpartition(".")[2])):
            values = permuted(values, count)
        if arch == "gemma3" and part.endswith("norm"):
            values += 1
        stored, restored, kind_of = values, values, None
        if arch == "gpt-oss" and part.startswith("mlp.experts.") and values.ndim > 1:
            kind_of = gguf.GGMLQuantizationType.MXFP4
            stored = gguf.quantize(values, kind_of)
            restored = gguf.dequantize(stored, kind_of)
        elif part.endswith(("v_proj", "down_proj")) and values.ndim > 1:
            stored = restored = values.astype(np.float16)
        elif values.ndim > 1 and part != "mlp.gate":
            stored, restored = q8_0(values)
            kind_of = gguf.GGMLQuantizationType.Q8_0
        if part.startswith("mlp.experts."):
            number, projection = part.split(".")[2:]
            target = f"blk.{layer}.{names[f'mlp.{projection}']}"
            target += f".{number}.{kind}" if changes.get("split") else f"_exps.{kind}"
            if target == changes.get("without"):
                continue
            stacks.setdefault(target, []).append((stored, kind_of))
        else:
            target = f"blk.{layer}.{names[part]}.{kind}" if layer else f"{names[part]}.{kind}"
            writer.add_tensor(target, stored, raw_dtype=kind_of)
        if values.ndim == 1:
            continue
        restored = torch.from_numpy(restored.astype(np.float32))
        if arch in PERMUTED and (count := heads.get(part.rpartition(".")[2])):
            dim = len(restored) // count // 2  # the other way round, row by row
            order = [h * 2 * dim + (i % dim) * 2 + i // dim for h in range(count) for i in range(2 * dim)]
            restored = restored[order]
        state[name].copy_(restored)
    for target, experts in stacks.items():
        stored = np.stack([values for values, _ in experts])
        writer.add_tensor(target, stored[0] if changes.get("split") else stored, raw_dtype=experts[0][1])
    further = [f"blk.{config.num_hidden_layers}.{part}" for part in FURTHER] if arch == "glm4moe" else []
    for name in (*changes.get("extra", ()), *further):
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    if arch == "gpt-oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def config_of(model: Any) -> Any:
    model.config.architectures = [type(model).__name__]
    return model.config
