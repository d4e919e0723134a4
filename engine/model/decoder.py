"""The decoder-only transformer all families share; a family is a set of flags in `ModelConfig`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import AttentionBackend
from engine.model.config import ModelConfig
from engine.model.layers import Linear, RMSNorm, RotaryTable, apply_rotary

__all__ = ["Decoder"]


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, with q, k, v in one matrix and gate, up in another."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        hidden, width = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype)
        self.qkv_proj = Linear(hidden, q_size + 2 * kv_size, bias=attention_bias, dtype=dtype)
        self.o_proj = Linear(q_size, hidden, bias=attention_bias, dtype=dtype)
        self.post_attention_norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype)
        self.gate_up_proj = Linear(hidden, 2 * width, bias=mlp_bias, dtype=dtype)
        self.down_proj = Linear(width, hidden, bias=mlp_bias, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        """x [tokens, hidden] in and out."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(self.input_norm(x)).view(-1, heads + 2 * kv_heads, self.head_dim)
        qk = apply_rotary(qkv[:, : heads + kv_heads], cos, sin)
        mixed = attention.attend(self.index, qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :])
        x = self.o_proj(mixed, x)
        gate, up = self.gate_up_proj(self.post_attention_norm(x)).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate).mul_(up), x)
        return y


class Decoder(nn.Module):
    """Token ids to final hidden states to logits.

    Args:
        config: the model.
        dtype: of weights and activations.
        max_position: positions of the rotary table.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_position: int) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed
        self.rotary = RotaryTable(config.rope, max_position, dtype)

    def forward(self, tokens: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [T] int64.
            positions: [T] int64.
            attention: a backend whose `plan` was called for these rows.

        Returns:
            [T, hidden].
        """
        cos, sin = self.rotary(positions)
        x = F.embedding(tokens, self.embed)
        for layer in self.layers:
            x = layer(x, cos, sin, attention)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab] in float32."""
        logits: Tensor = self.lm_head(hidden).float()
        return logits

    def quantize(self) -> None:
        """All linear layers to int8, once, after the weights are loaded; embeddings and norms stay float.

        Raises:
            ConfigError: see `Linear.quantize`.
        """
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                # Attention's output is an average over many tokens, which has no outliers to spread.
                module.quantize(rotate=not name.endswith("o_proj"))

    def pack(self) -> None:
        """Reorder the weights for this device, once, after they are loaded."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def weight_map(self) -> dict[str, tuple[str, ...]]:
        """For each parameter, the Hugging Face tensors it concatenates along dimension 0."""
        names: dict[str, tuple[str, ...]] = {
            "embed": ("model.embed_tokens.weight",),
            "norm.weight": ("model.norm.weight",),
        }
        if not self.config.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight",)
        fused = {
            "input_norm": ("input_layernorm",),
            "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o_proj": ("self_attn.o_proj",),
            "post_attention_norm": ("post_attention_layernorm",),
            "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "down_proj": ("mlp.down_proj",),
        }
        for name, _ in self.named_parameters():
            if name.startswith("layers."):
                _, index, module, kind = name.split(".")
                names[name] = tuple(f"model.layers.{index}.{source}.{kind}" for source in fused[module])
        return names
