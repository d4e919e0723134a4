"""From settings to everything a running engine is made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention.base import AttentionBackend
from engine.attention.sdpa import SdpaAttention
from engine.cache.blocks import BlockManager
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.errors import ConfigError
from engine.medusa.heads import Drafter, HeadDrafter, MedusaHeads, load_heads
from engine.medusa.tree import Tree, default_tree
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import (
    Checkpoint,
    GenerationDefaults,
    load_generation_defaults,
    load_tokenizer,
    load_weights,
    resolve_model,
)
from engine.text import TextProcessor
from engine.types import EngineInfo

__all__ = ["Loaded", "load"]

log = logging.getLogger(__name__)

_TREE_WITH_HEADS = 16
"""Tree nodes where heads are given and no size: on a CPU they cost little more than one."""

_CPU_POOL_BYTES = 2 << 30
"""K/V pool on the CPU where no size is given; pages nobody writes cost nothing."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, with its memory allocated."""

    info: EngineInfo
    decoder: Decoder
    attention: AttentionBackend
    pool: KVPool
    blocks: BlockManager
    drafter: Drafter | None
    text: TextProcessor
    generation_defaults: GenerationDefaults
    max_step_tokens: int


def load(config: EngineConfig, *, progress: bool = True) -> Loaded:
    """Load weights, heads, tree and tokenizer, and allocate the K/V pool.

    Raises:
        ConfigError: settings that contradict each other or do not fit this machine.
        ModelError: the model, the heads or the tree cannot be used; the text says what to do.
    """
    device = _device(config.device)
    folder = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    dtype = _dtype(config.dtype, model_config, device)
    max_model_len = _max_model_len(config, model_config)
    if config.max_num_seqs > config.max_step_tokens:
        raise ConfigError(
            f"max_num_seqs ({config.max_num_seqs}) must not exceed max_step_tokens ({config.max_step_tokens})"
        )

    wanted = config.heads is not None and config.heads != "none"
    tree_size = _tree_size(config, wanted)
    heads = None
    if wanted and tree_size == 1:
        log.info("the tree is off, so the heads are not loaded")
    elif wanted and config.heads is not None:
        heads = load_heads(
            config.heads,
            hidden_size=model_config.hidden_size,
            vocab_size=model_config.vocab_size,
            dtype=dtype,
            device=device,
        )
    tree = _tree(config, heads, tree_size) if heads is not None else None

    decoder = Decoder(model_config, dtype, max_model_len + MAX_TREE_NODES).to(device)
    checkpoint = Checkpoint(folder)
    ignored = {"lm_head.weight"} if model_config.tie_word_embeddings else set()
    load_weights(
        checkpoint, dict(decoder.named_parameters()), decoder.weight_map(), ignored=ignored, progress=progress
    )
    decoder.pack()
    drafter = None
    if heads is not None and tree is not None:
        drafter = HeadDrafter(heads, decoder.logits, tree, vocab_size=model_config.vocab_size, device=device)

    num_blocks = _num_blocks(config, model_config, dtype, device, max_model_len)
    pool = KVPool(
        num_layers=model_config.num_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        dtype=dtype,
        device=device,
    )
    blocks = BlockManager(num_blocks, config.block_size)
    info = EngineInfo(
        model=config.model,
        architecture=model_config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        num_heads=heads.num_heads if heads is not None else 0,
        tree_size=tree.size if tree is not None else 1,
        max_model_len=max_model_len,
        kv_cache_tokens=blocks.total * config.block_size,
        vocab_size=model_config.vocab_size,
        max_num_seqs=config.max_num_seqs,
    )
    return Loaded(
        info=info,
        decoder=decoder,
        attention=SdpaAttention(model_config.num_heads // model_config.num_kv_heads),
        pool=pool,
        blocks=blocks,
        drafter=drafter,
        text=TextProcessor(load_tokenizer(folder)),
        generation_defaults=load_generation_defaults(folder),
        max_step_tokens=config.max_step_tokens,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not one torch knows") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for and torch sees no GPU here")
    return device


def _dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        return model.dtype if device.type == "cuda" else torch.float32
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


def _tree_size(config: EngineConfig, heads: bool) -> int:
    """Nodes per sequence and step, root counted."""
    size = config.tree if config.tree is not None else (_TREE_WITH_HEADS if heads else "off")
    nodes = 1 if size == "off" else size
    if nodes > 1 and not heads:
        raise ConfigError(f"tree {nodes} needs Medusa heads; pass --heads PATH, or --tree off")
    if nodes == 1 and config.tree_file:
        raise ConfigError(
            "tree_file has no effect while the tree is off; leave it out, or set heads and tree"
        )
    return nodes


def _tree(config: EngineConfig, heads: MedusaHeads, size: int) -> Tree:
    tree = Tree.load(Path(config.tree_file)) if config.tree_file else default_tree(heads.num_heads)
    # A size nobody asked for must not fail on few heads or a small file.
    return tree.prefix(size if config.tree is not None else min(size, tree.size))


def _num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> int:
    """Pool blocks, padding block included."""
    block_bytes = (
        2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize * config.block_size
    )
    one_sequence = -(-(max_model_len + MAX_TREE_NODES) // config.block_size)
    if config.kv_cache_tokens is not None:
        num_blocks = config.kv_cache_tokens // config.block_size
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Logits of a full step in the model's dtype and, for the draw, a few copies in float32.
        transient = config.max_step_tokens * model.vocab_size * (dtype.itemsize + 4 * torch.float32.itemsize)
        room = int(total * config.gpu_memory_utilization) - (total - free) - transient
        num_blocks = room // block_bytes
    else:
        most = config.max_num_seqs * one_sequence
        wanted = min(_CPU_POOL_BYTES, _available_bytes() // 2)
        num_blocks = min(most, max(wanted // block_bytes, one_sequence))
        size_mib, available_mib = num_blocks * block_bytes >> 20, _available_bytes() >> 20
        if size_mib > available_mib:
            raise ConfigError(
                f"a K/V pool for max_model_len {max_model_len} takes {size_mib} MiB and {available_mib} MiB "
                "are available; lower max_model_len"
            )
    if num_blocks < one_sequence:
        have, need = max(0, num_blocks) * config.block_size, one_sequence * config.block_size
        raise ConfigError(
            f"the K/V pool would hold {have} tokens and one sequence of max_model_len {max_model_len} with "
            f"its tree needs {need}; lower max_model_len, or raise kv_cache_tokens or gpu_memory_utilization"
        )
    return num_blocks + 1


def _available_bytes() -> int:
    """Memory that can be had without swapping, page cache included; no bound where nothing tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 62)
