"""The frozen base model as training sees it: whole sequences in, final hidden states out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.attention.base import AttentionInput
from engine.config import EngineConfig, lora_sources
from engine.devices import sent
from engine.errors import ConfigError, ModelError
from engine.loader import Loaded, load
from engine.model.adapter_files import read_adapters
from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint, resolve_model

__all__ = [
    "Backbone",
    "EngineBackbone",
    "QuantizedBackbone",
    "make_backbone",
    "model_class",
    "open_base",
    "pack_size",
    "packs",
    "read_lm_head",
]

_BLOCK = 16


class Backbone(Protocol):
    """Final hidden states of whole sequences."""

    device: torch.device
    dtype: torch.dtype

    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[T, hidden] after the final norm: the sequences' rows one after another, T their lengths' sum."""
        ...


def pack_size(device: torch.device) -> int:
    """Tokens of a pass that only computes hidden states: as many as keep the device busy."""
    return 512 if device.type == "cpu" else 8192


def packs(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Neighbouring sequences that together have at most `most` tokens; a longer one goes alone."""
    start, size = 0, 0
    for index, length in enumerate(lengths):
        if index > start and size + length > most:
            yield range(start, index)
            start, size = index, 0
        size += length
    if start < len(lengths):
        yield range(start, len(lengths))


class EngineBackbone:
    """The engine's own decoder and attention: what the heads will see when they serve, to the bit.

    Args:
        loaded: a model with a K/V pool for the tokens of one pack.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.device, self.dtype = loaded.pool.device, loaded.pool.dtype

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        loaded, device = self._loaded, self.device
        lengths = [len(tokens) for tokens in sequences]
        longest = max(lengths)
        per_sequence = -(-longest // _BLOCK)
        if 1 + len(sequences) * per_sequence > loaded.pool.num_blocks:
            # Padding counts in the pool: halve the pack until it fits.
            middle = len(sequences) // 2
            if not middle:
                raise ModelError(f"a sequence of {longest} tokens does not fit the pool made for training")
            return torch.cat((self.hidden(sequences[:middle]), self.hidden(sequences[middle:])))
        tables = 1 + torch.arange(len(sequences) * per_sequence).view(len(sequences), per_sequence)
        column = torch.arange(longest)
        valid = column < torch.tensor(lengths)[:, None]
        batch = AttentionInput(
            block_tables=sent(tables, device),
            lengths=torch.zeros(len(sequences), dtype=torch.int64, device=device),
            rows=sent(tables[:, :1] * _BLOCK + column, device),
            max_length=longest,
            index=None if bool(valid.all()) else sent(valid.flatten().nonzero().flatten(), device),
        )
        loaded.attention.plan(batch, loaded.pool)
        tokens = sent(torch.tensor([token for row in sequences for token in row]), device)
        positions = sent(column.expand(len(sequences), -1)[valid], device)
        states: Tensor = loaded.decoder(tokens, positions, loaded.attention)
        return states


def model_class(folder: Path) -> Any:
    """Of transformers' the one that reads a model, of those that see images with that part, too."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return AutoModelForImageTextToText if sees_images else AutoModelForCausalLM


class QuantizedBackbone:
    """transformers' model with its linear layers in 8 or 4 bits by bitsandbytes, for a small GPU.

    Args:
        model: name or folder.
        bits: 8 or 4.
    """

    def __init__(self, model: str, bits: int, device: torch.device, dtype: torch.dtype) -> None:
        try:
            importlib.import_module("bitsandbytes")  # transformers asks for it late, with a poorer message
        except ImportError as error:
            raise ConfigError("a backbone in 8 or 4 bits needs: pip install 'bitsandbytes>=0.46'") from error
        from transformers import BitsAndBytesConfig

        options = (
            BitsAndBytesConfig(load_in_8bit=True)
            if bits == 8
            else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4"
            )
        )
        folder = resolve_model(model)
        whole = model_class(folder).from_pretrained(
            folder, dtype=dtype, quantization_config=options, device_map={"": device}
        )
        self._model = whole.base_model.eval()
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(tokens) for tokens in sequences], device=self.device)
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        valid = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
        # Padded on the right, so causal attention never looks at padding.
        states: Tensor = self._model(
            input_ids=tokens.to(self.device), attention_mask=valid.long(), use_cache=False
        ).last_hidden_state
        return states[valid]


def make_backbone(
    model: str,
    *,
    device: str,
    dtype: str,
    bits: int,
    pack_tokens: int,
    longest: int,
    lora: str | None = None,
) -> Backbone:
    """The frozen model, in `bits` of 16 (as it is), 8 or 4.

    Args:
        model: as for `serve`.
        device, dtype: as for `serve`.
        pack_tokens: most tokens of a pass.
        longest: tokens of the longest sequence.
        lora: as for `serve`.

    Raises:
        ConfigError, ModelError: as `engine.loader.load`; bits other than 16 without CUDA or bitsandbytes.
    """
    if bits != 16:
        if bits not in (8, 4):
            raise ConfigError(f"backbone_bits must be 16, 8 or 4, got {bits}")
        if lora is not None:
            raise ConfigError(
                "a backbone in 8 or 4 bits takes no lora: leave --backbone-bits out, or name a model that "
                "PEFT has merged the adapter into"
            )
        if not torch.cuda.is_available() or device == "cpu":
            raise ConfigError("a backbone in 8 or 4 bits runs on CUDA only; leave --backbone-bits out")
        on = torch.device("cuda" if device == "auto" else device)
        return QuantizedBackbone(model, bits, on, torch.bfloat16)
    # Blocks for a pack of equally long sequences and some padding; `hidden` splits what does not fit.
    tokens = 2 * max(pack_tokens, longest) + _BLOCK
    config = EngineConfig(
        model=model,
        lora=lora,
        heads="none",
        tree="off",
        device=device,
        dtype=dtype,
        max_model_len=max(longest, 8),
        max_num_seqs=1,
        block_size=_BLOCK,
        kv_cache_tokens=max(tokens, longest + 128),
    )
    return EngineBackbone(load(config))


def open_base(model: str, lora: str | None = None) -> tuple[ModelConfig, Checkpoint]:
    """The base model and its weights, with the adapters of the setting in them.

    Raises:
        ModelError: the files of one cannot be read, or do not fit.
    """
    folder, adapters = resolve_model(model), read_adapters(lora_sources(lora))
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(folder, adapters=adapters, tied=config.tie_word_embeddings)
    return (replace(config, tie_word_embeddings=False) if checkpoint.untied else config), checkpoint


def read_lm_head(model: str, rows: Tensor | None = None, *, lora: str | None = None) -> Tensor:
    """[V, hidden] float32: the base model's lm_head over its logits' divisor, or its rows for these tokens.

    Raises:
        ModelError: as `open_base`.
    """
    config, checkpoint = open_base(model, lora)
    weight = checkpoint.get("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return (weight if rows is None else weight[rows]).float() / config.logits_divisor
