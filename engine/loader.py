"""From settings to everything a running engine is made of."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.adjust import table_bytes
from engine.attention.base import AttentionBackend
from engine.attention.sdpa import SdpaAttention
from engine.cache.blocks import BlockManager
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES, EngineConfig, lora_sources
from engine.devices import device_named, not_emulated
from engine.errors import ConfigError, WeightsError
from engine.harmony_format import ends_of
from engine.limits import available_bytes, give_back_memory
from engine.medusa.bigram import Bigram, find_bigram
from engine.medusa.configured import check_tree, heads_source, heads_tree, tree_size
from engine.medusa.head_files import JOINT_PREFIX, joint_heads, read_heads
from engine.medusa.heads import HeadDrafter, MedusaHeads
from engine.model.adapter_files import read_adapters
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.embedded import cache_root
from engine.model.info import blocks_of_sequence, cpu_pool_blocks, kv_bytes_per_token
from engine.model.quantize_cuda import check_quantized
from engine.model.weights import (
    Checkpoint,
    GenerationDefaults,
    load_generation_defaults,
    load_tokenizer,
    load_weights,
    resolve_model,
)
from engine.profiling import transient_bytes
from engine.text import TextProcessor
from engine.types import EngineInfo

__all__ = ["Loaded", "load"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, its memory allocated; `captured`: decode steps shall be CUDA graphs; `kernels`:
    Triton's can run on its device."""

    info: EngineInfo
    decoder: Decoder
    attention: AttentionBackend
    pool: KVPool
    blocks: BlockManager
    heads: HeadDrafter | None
    text: TextProcessor
    generation_defaults: GenerationDefaults
    max_step_tokens: int
    max_prefill_tokens: int
    prefix_caching: bool
    captured: bool
    kernels: bool


def load(config: EngineConfig, *, progress: bool = True) -> Loaded:
    """Load weights, heads, tree and tokenizer, and allocate the K/V pool.

    Raises:
        ConfigError: settings that contradict each other or do not fit this machine.
        ModelError: the model, the heads or the tree cannot be used; the text says what to do.
    """
    device = _device(config.device)
    if config.attention == "triton" and (refused := _why_not_triton(device)) is not None:
        raise ConfigError(f"attention triton {refused}; set attention to auto")  # before anything is fetched
    folder = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    dtype = _dtype(config.dtype, model_config, device)
    if config.quantization != "none":
        check_quantized(config.quantization, device, dtype)  # before minutes of loading
        if device.type == "cuda" and (refused := _why_not_triton(device)) is not None:
            raise ConfigError(f"quantization {config.quantization} on CUDA {refused}; leave it out")
    max_model_len = _max_model_len(config, model_config)
    if config.max_num_seqs > config.max_step_tokens:
        raise ConfigError(
            f"max_num_seqs ({config.max_num_seqs}) must not exceed max_step_tokens ({config.max_step_tokens})"
        )

    chat_template = _chat_template(config)
    kernels = _why_not_triton(device) is None
    mxfp4 = kernels and model_config.experts is not None and model_config.experts.mxfp4
    if mxfp4 and config.quantization != "none":
        log.info("the experts stay in 4 bits, all else is in %s", config.quantization)
    checkpoint, adapters = None, read_adapters(lora_sources(config.lora))
    if config.load_format != "dummy":
        tied = model_config.tie_word_embeddings
        checkpoint = Checkpoint(folder, mxfp4=mxfp4, adapters=adapters, tied=tied)
        if checkpoint.untied:
            model_config = replace(model_config, tie_word_embeddings=False)
    source = heads_source(config, folder, checkpoint)
    check_tree(config, with_heads=source is not None)
    sizes = {"vocab_size": model_config.vocab_size}
    heads, tree, pairs = None, None, None
    if source is not None and config.tree in ("off", 1):
        log.info("the tree is off, so the heads are not loaded")
    elif source is not None:
        heads = _heads(source, folder, checkpoint, model_config, dtype, device)
        tree = heads_tree(config, heads.num_heads, source)
        pairs = find_bigram(source, num_heads=heads.num_heads, **sizes) if source else None
        if pairs is not None and not heads.lm_heads:  # the model's gives logits that are still to be divided
            pairs = replace(pairs, weights=pairs.weights * model_config.logits_divisor)

    decoder = _decoder(
        checkpoint,
        model_config,
        dtype,
        max_model_len,
        device,
        config.quantization,
        mxfp4=mxfp4,
        progress=progress,
    )
    most_nodes = tree_size(config, tree.tree if tree is not None else None)
    windows = model_config.windows_within(max_model_len + MAX_TREE_NODES)
    drafter = None
    with _room(device):
        if heads is not None and tree is not None:
            heads.prepare(decoder.lm_head.weight, quantize=config.quantization)
            drafter = HeadDrafter(
                heads,
                decoder.lm_head,  # a divisor of logits changes no order: weights of pairs have it
                tree.tree,
                **sizes,
                device=device,
                accepted=tree.accepted,
                bigram=None if pairs is None else Bigram(pairs, heads.token_map, **sizes, device=device),
            )
        if config.quantization != "none":
            decoder.quantize(config.quantization)
        decoder.pack()
        attention = _attention(config, model_config, dtype, device, windows, most_nodes)
        if kernels:
            decoder.fuse_triton(cache_root(), attention)
            if drafter is not None:
                drafter.fuse_triton()

    give_back_memory()  # of SmolLM2's conversions 100 to 300 MB
    transient = 0
    if device.type == "cuda" and config.kv_cache_tokens is None and config.kv_cache_bytes is None:
        transient = transient_bytes(config, decoder, attention, drafter, most_nodes, device, kernels)
    num_blocks = _num_blocks(config, model_config, dtype, device, max_model_len, transient)
    pool = _pool(num_blocks, config.block_size, model_config, dtype, device)
    blocks = BlockManager(num_blocks, config.block_size)
    info = EngineInfo(
        model=config.model,
        architecture=model_config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        num_heads=heads.num_heads if heads is not None else 0,
        tree_size=most_nodes,
        max_model_len=max_model_len,
        kv_cache_tokens=blocks.total * config.block_size,
        vocab_size=model_config.vocab_size,
        max_num_seqs=config.max_num_seqs,
        tree=str(config.tree),
        lookup=config.lookup_nodes,
        quantization=config.quantization,
        lora=tuple(adapter.identity for adapter in adapters),
    )
    text = TextProcessor(load_tokenizer(folder), chat_template)
    defaults = load_generation_defaults(folder, config.generation_config)
    return Loaded(
        info=info,
        decoder=decoder,
        attention=attention,
        pool=pool,
        blocks=blocks,
        heads=drafter,
        text=text,
        generation_defaults=replace(defaults, eos_token_ids=ends_of(text, defaults.eos_token_ids)),
        max_step_tokens=config.max_step_tokens,
        max_prefill_tokens=config.prefill_tokens(device.type),
        prefix_caching=config.prefix_caching,
        captured=device.type == "cuda" and not config.enforce_eager,
        kernels=kernels,
    )


@contextmanager
def _room_for_weights(decoder: Decoder, device: torch.device) -> Iterator[None]:
    size = sum(weight.nbytes for weight in decoder.parameters())
    if device.type == "cpu" and size > (available := available_bytes()):  # else it is killed without a word
        raise ConfigError(
            f"the weights take {math.ceil(size / 2**20)} MiB and {available >> 20} MiB are available; take a "
            "smaller model, or a dtype of 16 bits"
        )
    with _room(device):
        yield


@contextmanager
def _room(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights do not fit the memory of {device}, or fill it; take a smaller model, or a dtype of "
            "16 bits"
        ) from error


def _device(name: str) -> torch.device:
    device = device_named(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on this thread's device, wherever the tensors are
    return device


def _dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    if name == "auto" and device.type == "cpu":
        return torch.float32
    if name == "auto":
        return not_emulated(model.dtype, device)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the {model.max_position} of {config.model}"
        )
    return config.max_model_len


def _chat_template(config: EngineConfig) -> str | None:
    """Its source, from the file that is named; None leaves it to the tokenizer."""
    if config.chat_template is None or "{%" in config.chat_template or "{{" in config.chat_template:
        return config.chat_template
    try:
        return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the chat template {config.chat_template}: {reason}") from error


def _heads(
    source: str,
    folder: Path,
    checkpoint: Checkpoint | None,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> MedusaHeads:
    """The heads at a `heads_source`, to be prepared before their first use."""
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
    if source or checkpoint is None:
        tensors = read_heads(source, **sizes)
    else:
        inside = {name: partial(checkpoint.get, name) for name in checkpoint.names}
        tensors = joint_heads(inside, str(checkpoint.folder), **sizes)
    log.info(
        "%d heads from %s draft from %d of %d tokens",
        tensors.num_heads,
        source or folder,
        model.vocab_size if tensors.token_map is None else len(tensors.token_map),
        model.vocab_size,
    )
    with _room(device):
        return MedusaHeads.from_tensors(tensors, hidden_size=model.hidden_size, dtype=dtype, device=device)


def _decoder(
    checkpoint: Checkpoint | None,
    model: ModelConfig,
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device,
    quantization: Literal["none", "int8", "fp8"],
    *,
    mxfp4: bool,
    progress: bool,
) -> Decoder:
    """The model with its weights, random ones without a checkpoint; not packed yet. Its layers are quantised
    one by one as they are loaded, so that a device need not hold them all as they are in the checkpoint."""
    decoder = Decoder(model, dtype, max_model_len + MAX_TREE_NODES, mxfp4=mxfp4)
    if checkpoint is None:
        log.warning("the weights are random (load_format dummy): answers mean nothing")
        with _room_for_weights(decoder, device):
            decoder.randomize(device)
            decoder.to(device)
        return decoder
    parameters, filled = dict(decoder.named_parameters()), None
    if quantization != "none":
        filled = partial(_quantize_layer, decoder, _last_of_layers(parameters), quantization, device)
    with _room_for_weights(decoder, device):
        if filled is None:
            decoder.to(device)
        load_weights(
            checkpoint,
            parameters,
            decoder.weight_map(),
            ignored=lambda name: (
                name.startswith((JOINT_PREFIX, *model.unread))
                or (model.tie_word_embeddings and name == "lm_head.weight")
            ),
            progress=progress,
            filled=filled,
        )
        decoder.to(device)
    if filled is None:
        decoder.order_rows()
    _check_output_layer(decoder.lm_head.weight)
    return decoder


def _last_of_layers(names: Iterable[str]) -> dict[str, int]:
    """Each layer's last parameter, and which layer it is."""
    last = {int(name.split(".")[1]): name for name in names if name.startswith("layers.")}
    return {name: layer for layer, name in last.items()}


def _quantize_layer(
    decoder: Decoder,
    last_of_layers: dict[str, int],
    kind: Literal["int8", "fp8"],
    device: torch.device,
    name: str,
) -> None:
    if name in last_of_layers:
        decoder.quantize_layer(last_of_layers[name], kind, device)


def _check_output_layer(weight: Tensor) -> None:
    """Raise WeightsError if it holds NaN or infinities. Those of other layers reach the hidden states, and so
    fail whoever they reach; these would make tokens of nothing, the same ones again and again."""
    if not torch.stack(torch.aminmax(weight)).isfinite().all():  # which makes no copy
        raise WeightsError(
            "the output layer's weights (lm_head) hold values that are not finite: the checkpoint is damaged "
            f"or {str(weight.dtype).removeprefix('torch.')} too narrow for it"
        )


def _pool(
    num_blocks: int, block_size: int, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> KVPool:
    try:
        return KVPool(
            num_layers=model.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            device=device,
        )
    except torch.AcceleratorError:
        raise
    except RuntimeError as error:  # no memory; on a CPU torch has no error of its own for it
        raise ConfigError(
            f"a K/V pool of {(num_blocks - 1) * block_size} tokens does not fit the memory here; "
            "lower kv_cache_tokens (or kv_cache_bytes, or gpu_memory_utilization)"
        ) from error


def _attention(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    windows: tuple[int | None, ...] | None,
    tree_size: int,
) -> AttentionBackend:
    refused = _why_not_triton(device)
    scale = model.attention_scale
    if config.attention == "auto" and device.type == "cpu":
        from engine.attention.cpu import CpuAttention  # nothing but a CPU needs its compiler

        return CpuAttention(model.group, scale=scale, windows=windows)
    if config.attention == "sdpa" or refused is not None:
        if config.attention == "auto":
            log.warning("attention is torch's, which is slow: triton %s", refused)
        return SdpaAttention(model.group, scale=scale, windows=windows)
    # Triton comes with CUDA builds of torch, and nothing but a GPU needs it.
    from engine.attention.triton import TritonAttention
    from engine.attention.triton_tuning import ModelShape, tuned_tiles

    frequencies = len(model.rope.inv_freq)
    shape = ModelShape(
        model.group,
        model.num_kv_heads,
        model.head_dim,
        config.block_size,
        dtype,
        frequencies=frequencies,
        head_norm=model.qk_norm == "head" and 2 * frequencies == model.head_dim,
        norm_offset=model.norm_offset,
        sinks=model.sinks,
    )
    tiles = tuned_tiles(shape, device, cache_root(), most_nodes=tree_size)
    return TritonAttention(model.group, scale=scale, windows=windows, tiles=tiles)


def _why_not_triton(device: torch.device) -> str | None:
    """None where its kernels can run."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU and the device is {device}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or higher and this one has {major}.{minor}"
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        return "needs a C compiler (gcc or clang) and there is none"
    return None


def _num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    transient: int,
) -> int:
    """Pool blocks, padding block included.

    Args:
        transient: bytes that steps take on CUDA beside weights and K/V.
    """
    block_bytes = kv_bytes_per_token(model, dtype) * config.block_size
    one_sequence = blocks_of_sequence(max_model_len, config.block_size)
    tables = table_bytes(config.max_num_seqs, model.vocab_size)  # allocated when a request asks for them
    if config.kv_cache_tokens is not None:
        num_blocks = config.kv_cache_tokens // config.block_size
    elif config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // block_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * config.gpu_memory_utilization) - (total - free) - transient - tables
        num_blocks = room // block_bytes
    else:
        available = max(0, available_bytes() - tables)
        num_blocks = cpu_pool_blocks(available, block_bytes, one_sequence, config.max_num_seqs)
        if (size := num_blocks * block_bytes) > available:
            raise ConfigError(
                f"a K/V pool for max_model_len {max_model_len} takes {math.ceil(size / 2**20)} MiB and "
                f"{available >> 20} MiB are available; lower max_model_len"
            )
    if num_blocks < one_sequence:
        have, need = max(0, num_blocks) * config.block_size, one_sequence * config.block_size
        raise ConfigError(
            f"the K/V pool would hold {have} tokens and one sequence of max_model_len {max_model_len} with "
            f"its tree needs {need}; lower max_model_len, or raise kv_cache_tokens (or kv_cache_bytes, or "
            "gpu_memory_utilization)"
        )
    return num_blocks + 1
