"""The decoder-only transformer all families share; a family is a set of flags in `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import AttentionBackend
from engine.model.config import ModelConfig
from engine.model.experts import Experts, SharedExpert
from engine.model.layers import (
    HeadNorm,
    Linear,
    OffsetNorm,
    ProjectionNorm,
    RMSNorm,
    RotaryTable,
    apply_partial_rotary,
    apply_rotary,
)
from engine.model.quantize import Int8Weight

if TYPE_CHECKING:
    from engine.model.fused_int8 import FusedInt8Layers
    from engine.model.fused_triton import FusedLayers

__all__ = ["Decoder"]


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, with q, k, v in one matrix and gate, up in another, or a mixture of experts.

    A norm that the family does not have is None, and so are the sinks, [heads], of one without. A layer with
    experts has no `gate_up_proj`, `down_proj`, but `shared` has them if there is an MLP beside the experts.
    """

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, *, mxfp4: bool = False) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        hidden, width = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def norm(present: bool) -> RMSNorm | None:
            return _norm(config, dtype) if present else None

        before, after = config.norms != "post", config.norms != "pre"
        self.input_norm = norm(before)
        self.qkv_proj = Linear(hidden, q_size + 2 * kv_size, bias=config.qkv_bias, dtype=dtype)
        self.qk_norm, self.qk_norm_last = _qk_norm(config, dtype), config.qk_norm_last
        self.sinks: nn.Parameter | None = None
        if config.sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_heads, dtype=dtype), requires_grad=False)
        self.o_proj = Linear(q_size, hidden, bias=config.output_bias, dtype=dtype)
        self.attention_output_norm = norm(after)
        self.mlp_norm = norm(before)
        self.activation: Callable[[Tensor], Tensor] = F.silu if config.activation == "silu" else _gelu_tanh
        self.experts: Experts | None = None
        self.shared: SharedExpert | None = None
        if config.experts is not None and config.has_experts(index):
            self.experts = Experts(config, dtype, self.activation, mxfp4=mxfp4)
            if config.experts.shared is not None:
                self.shared = SharedExpert(config, dtype, self.activation)
        else:
            self.gate_up_proj = Linear(hidden, 2 * width, bias=config.mlp_bias, dtype=dtype)
            self.down_proj = Linear(width, hidden, bias=config.mlp_bias, dtype=dtype)
        self.mlp_output_norm = norm(after)
        self.residual_scale = config.residual_scale
        self.local = config.is_local(index)
        partial = 2 * len(config.rope.inv_freq) < config.head_dim
        self.rotate = apply_partial_rotary if partial else apply_rotary

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order in which they run; of a layer with experts the first two."""
        if self.experts is not None:
            return self.qkv_proj, self.o_proj
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        """x [tokens, hidden] in and out."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        y = x if self.input_norm is None else self.input_norm(x)
        qkv = self.qkv_proj(y).view(-1, heads + 2 * kv_heads, self.head_dim)
        qk = qkv[:, : heads + kv_heads]
        if self.qk_norm is not None and not self.qk_norm_last:
            qk = self.qk_norm(qk)
        qk = self.rotate(qk, cos, sin)
        if self.qk_norm is not None and self.qk_norm_last:
            qk = self.qk_norm(qk)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]
        mixed = attention.attend(self.index, q, k, v, sinks=self.sinks)
        x = self._add(x, self.o_proj, mixed, self.attention_output_norm)
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        if self.experts is not None:
            given = self.experts(y)
            if self.shared is not None:
                given += self.shared(y)
            return self._added(x, given, self.mlp_output_norm)
        gate, up = self.gate_up_proj(y).chunk(2, dim=-1)
        return self._add(x, self.down_proj, self.activation(gate).mul_(up), self.mlp_output_norm)

    def _add(self, x: Tensor, linear: Linear, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """x plus what a block's last linear layer makes of y, normed and scaled where the family does so."""
        out: Tensor
        if norm is None and self.residual_scale == 1.0:
            out = linear(y, x)
            return out
        return self._added(x, linear(y), norm)

    def _added(self, x: Tensor, out: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is not None:
            out = norm(out)
        return torch.add(x, out, alpha=self.residual_scale)


def _norm(config: ModelConfig, dtype: torch.dtype) -> RMSNorm:
    kind = OffsetNorm if config.norm_offset else RMSNorm
    return kind(config.hidden_size, config.rms_norm_eps, dtype=dtype)


def _qk_norm(config: ModelConfig, dtype: torch.dtype) -> HeadNorm | ProjectionNorm | None:
    heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
    if config.qk_norm == "head":
        return HeadNorm(heads + kv_heads, config.head_dim, eps, offset=config.norm_offset, dtype=dtype)
    if config.qk_norm == "projection":
        return ProjectionNorm(heads * config.head_dim, kv_heads * config.head_dim, eps, dtype=dtype)
    return None


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quantize(modules: nn.Module, kind: Literal["int8", "fp8"]) -> None:
    for name, module in modules.named_modules():
        if isinstance(module, Experts) and not module.is_quantized:
            module.quantize(kind)
        if isinstance(module, Linear) and module.quantized is None:
            # Attention's output is an average over many tokens, which has no outliers to spread.
            module.quantize(kind, rotate=not name.endswith("o_proj"))


_SHARED = {
    "gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "down_proj": ("mlp.shared_experts.down_proj",),
    "gate": ("mlp.shared_expert_gate",),
}
"""The checkpoint's modules of `SharedExpert`'s (see `ExpertsFile`)."""


class Decoder(nn.Module):
    """Token ids to final hidden states to logits.

    Args:
        config: the model.
        dtype: of weights and activations.
        max_position: positions of the rotary table.
        mxfp4: hold the weights of experts in 4 bits, which only kernels for CUDA take (`fuse_triton`).
    """

    logits_divisor: Tensor

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, max_position: int, *, mxfp4: bool = False
    ) -> None:
        super().__init__()
        self.config, self.mxfp4 = config, mxfp4
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype, mxfp4=mxfp4) for i in range(config.num_layers)
        )
        self.norm = _norm(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed
        self.rotary = RotaryTable(config.rope, max_position, dtype)
        local = config.local_rope
        self.local_rotary = None if local is None else RotaryTable(local, max_position, dtype)
        # Rounded as the reference's: its factor is a tensor of the embedding's dtype.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        divisor = torch.tensor([config.logits_divisor], dtype=torch.float32)
        self.register_buffer("logits_divisor", divisor, persistent=False)
        self.fused: FusedInt8Layers | None = None
        self.fused_cuda: FusedLayers | None = None

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: AttentionBackend, out: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [T] int64.
            positions: [T] int64.
            attention: a backend whose `plan` was called for these rows.
            out: [T, hidden], contiguous, to be written to and returned; None is a new tensor.

        Returns:
            [T, hidden].
        """
        if self.fused_cuda is not None:
            return self.fused_cuda(tokens, positions, attention, out)
        x = F.embedding(tokens, self.embed)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        table = self.rotary(positions)
        local = table if self.local_rotary is None else self.local_rotary(positions)
        if self.fused is not None:
            x = self.fused(x, table[0], table[1], attention)
        else:
            for layer in self.layers:
                cos, sin = local if layer.local else table
                x = layer(x, cos, sin, attention)
        hidden: Tensor = self.norm(x)
        return hidden if out is None else out.copy_(hidden)

    @property
    def logits_dtype(self) -> torch.dtype:
        """What holds logits as they are: the model's dtype, but float32 where they are divided."""
        return self.embed.dtype if self.config.logits_divisor == 1.0 else torch.float32

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[..., hidden] to [..., vocab] in float32.

        Args:
            hidden: after the final norm; [T, hidden] with `out`.
            out: [T, vocab], float32 or of `logits_dtype`, to be written to and returned.
        """
        if self.config.logits_divisor != 1.0:
            # A tensor of one dimension, so that the quotient is float32.
            return torch.div(self.lm_head(hidden), self.logits_divisor, out=out)
        if out is not None:
            return self.lm_head.into(hidden, out)
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def randomize(self, device: torch.device) -> None:
        """Random weights on `device`, in place of a checkpoint's: norms of one, the rest small.

        They are made there: the parameters of a model that nobody has read take no memory here.
        """
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if values.dtype == torch.uint8:  # two codes of 4 bits
                parameter.data = values.random_()
            elif values.dtype == torch.int32:  # four scales of such, 2 ** -7 each
                parameter.data = values.fill_(0x78787878)
            elif "norm" in name:
                parameter.data = values.fill_(0.0 if self.config.norm_offset else 1.0)
            else:
                parameter.data = values.normal_(std=0.02)

    def order_rows(self, *of: int) -> None:
        """Once, after weights are loaded and before anything else is done with them; of some layers or all.

        Where the checkpoint rotates neighbouring channels, rows of queries and keys change places, so that
        they are rotated by halves, as everywhere here: their products are the same sums in another order.
        """
        config = self.config
        if not config.interleaved:
            return
        rotated = 2 * len(config.rope.inv_freq)
        order = torch.arange((config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        qk = order.view(-1, config.head_dim)[: config.num_heads + config.num_kv_heads, :rotated]
        qk.copy_(torch.cat((qk[:, ::2], qk[:, 1::2]), 1))
        for layer in [self.layers[index] for index in of] or self.layers:
            assert isinstance(layer, DecoderLayer)
            for rows in layer.qkv_proj.parameters():
                rows.copy_(rows[order.to(rows.device)])

    def quantize(self, kind: Literal["int8", "fp8"]) -> None:
        """All linear layers to 8 bits that are not yet, once weights are loaded; embeddings and norms stay
        float.

        Raises:
            ConfigError: see `Linear.quantize`.
        """
        _quantize(self, kind)
        if self.embed.device.type == "cpu":
            self.fused = self._fuse()

    def quantize_layer(self, index: int, kind: Literal["int8", "fp8"], device: torch.device) -> None:
        """A layer whose weights are loaded, on `device`, with its rows in order, so that no more than one is
        held as it was: whoever else has its parameters has nothing left of them.

        Raises:
            ConfigError: see `Linear.quantize`.
        """
        before = list(self.layers[index].parameters())
        layer = self.layers[index].to(device)
        self.order_rows(index)
        _quantize(layer, kind)
        kept = {id(parameter) for parameter in layer.parameters()}
        for parameter in before:
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)

    def _fuse(self) -> FusedInt8Layers | None:
        """The int8 layers as one, for families of the plain shape whose matrices are small.

        Where a step is the reading of large matrices, what lies between them does not count.
        """
        config = self.config
        plain = (
            config.experts is None
            and config.norms == "pre"
            and not config.norm_offset
            and config.qk_norm == "none"
            and not config.sinks
        )
        plain = plain and config.activation == "silu" and config.residual_scale == 1.0
        plain = plain and self.local_rotary is None and 2 * len(config.rope.inv_freq) == config.head_dim
        if not plain:
            return None
        from engine.model.fused_int8 import FusedInt8Layer, FusedInt8Layers  # only int8 needs the compiler

        layers = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            assert layer.input_norm is not None
            assert layer.mlp_norm is not None
            weights = [
                weight for linear in layer.linears if isinstance(weight := linear.quantized, Int8Weight)
            ]
            if any(weight.large or weight.biased for weight in weights):
                return None
            norms = (layer.input_norm.weight, layer.mlp_norm.weight)
            layers.append(FusedInt8Layer(norms, weights))
        return FusedInt8Layers(
            layers,
            eps=config.rms_norm_eps,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )

    def pack(self) -> None:
        """Reorder the weights for this device, once, after they are loaded (and quantised)."""
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.pack()

    def fuse_triton(self, folder: Path | None = None, attention: AttentionBackend | None = None) -> None:
        """From here on Triton kernels do what lies between the products, where they can run (on CUDA).

        Args:
            folder: measure which products of few rows shall be such kernels too, and keep it there.
            attention: between them as served.
        """
        from engine.model.fused_triton import FusedLayers  # only CUDA needs Triton

        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        self.fused_cuda = FusedLayers(
            layers,
            self.norm,
            embedding=self.embed,
            embedding_scale=self.embedding_scale,
            table=self.rotary,
            local=self.local_rotary,
            offset=self.config.norm_offset,
            activation=self.config.activation,
        )
        if folder is not None:
            from engine.model.products_tuning import tune_products

            tune_products(self.fused_cuda, folder, attention)

    def weight_map(self) -> dict[str, tuple[str, ...]]:
        """For each parameter, the Hugging Face tensors it concatenates along dimension 0."""
        names: dict[str, tuple[str, ...]] = {
            "embed": ("model.embed_tokens.weight",),
            "norm.weight": ("model.norm.weight",),
        }
        if not self.config.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight",)
        sources, experts = self._layer_sources(), self._expert_sources()
        for name, _ in self.named_parameters():
            if name.startswith("layers."):
                _, index, module, *kind = name.split(".")
                these = sources.get(module, ())
                if module == "experts":
                    these, kind = experts[kind[0]], []
                if module == "shared":
                    these, kind = _SHARED[kind[0]], kind[1:] or ["weight"]
                names[name] = tuple(".".join(("model.layers", index, source, *kind)) for source in these)
        return names

    def _expert_sources(self) -> dict[str, tuple[str, ...]]:
        """The same for the parameters of a layer's experts (see `ExpertsFile`)."""
        count = 0 if self.config.experts is None else self.config.experts.count
        found: dict[str, tuple[str, ...]] = {
            "router": ("mlp.gate.weight",),
            "router_bias": ("mlp.gate.bias",),
            "correction": ("mlp.gate.e_score_correction_bias",),
        }
        weight, scales = ("blocks", "scales") if self.mxfp4 else ("weight", "")
        for name, parts in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            for own, kind in ((name, weight), (f"{name}_scales", scales), (f"{name}_bias", "bias")):
                each = (f"mlp.experts.{i}.{part}.{kind}" for i in range(count) for part in parts)
                found[own] = tuple(each)
        return found

    def _layer_sources(self) -> dict[str, tuple[str, ...]]:
        """For each module of a layer, the checkpoint's modules it is made of."""
        config = self.config
        sources: dict[str, tuple[str, ...]] = {
            "input_norm": ("input_layernorm",),
            "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o_proj": ("self_attn.o_proj",),
            "sinks": ("self_attn.sinks",),
            "mlp_norm": ("post_attention_layernorm",),
            "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "down_proj": ("mlp.down_proj",),
        }
        if config.fused == "all":
            sources["qkv_proj"] = ("self_attn.qkv_proj",)
        if config.fused != "none":
            sources["gate_up_proj"] = ("mlp.gate_up_proj",)
        if config.norms != "pre":
            sources |= {
                "attention_output_norm": ("post_attention_layernorm",),
                "mlp_norm": ("pre_feedforward_layernorm",),
                "mlp_output_norm": ("post_feedforward_layernorm",),
            }
        per_head = config.qk_norm == "head"
        sources["qk_norm"] = ("self_attn.q_norm",) * (config.num_heads if per_head else 1)
        sources["qk_norm"] += ("self_attn.k_norm",) * (config.num_kv_heads if per_head else 1)
        renamed = config.renamed
        return {name: tuple(renamed.get(one, one) for one in these) for name, these in sources.items()}
