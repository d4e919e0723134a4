"""From the settings of a run to its data, its part of the lm_head, and the assurance that it fits."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine.devices import device_named, not_emulated
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint
from training.backbone import Backbone, make_backbone, open_base, pack_size, read_lm_head
from training.batches import CachedBatches, OnlineBatches, ResidentBatches, Source
from training.config import TrainConfig
from training.data import Row, held_out, load_shards
from training.hidden import TOP_K, HiddenCache, cache_hidden, missing_rows, row_keys
from training.memory import MemoryPlan, available_bytes, free_disk, plan
from training.resident import ResidentCache, keep_hidden
from training.vocabulary import Vocabulary

__all__ = [
    "Setup",
    "fingerprint",
    "model_identity",
    "prepare",
    "read_rows",
    "training_dtype",
]

_MOST_CACHED = 64 << 30


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works on.

    Args:
        source: training batches.
        held: cache that holds the held-out rows, and which of its rows they are.
        held_rows: [rows of the cache] bool.
        vocabulary: of the heads.
        lm_head: [V, hidden], its rows of the base model's, on the training device, in activations' dtype.
        rows: [vocab] int64 there, each token's row or -1.
    """

    source: Source
    held: HiddenCache | ResidentCache
    held_rows: NDArray[np.bool_]
    vocabulary: Vocabulary
    lm_head: Tensor
    rows: Tensor


def read_rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows, cut to `max_length`.

    Raises:
        ConfigError: no data, or nothing on one of the sides.
    """
    train: list[Row] = []
    held: list[Row] = []
    for row in load_shards(config.data):
        room = config.max_length - len(row.prompt)
        if room < 2 or not len(row.prompt):
            continue
        cut = Row(row.conversation, row.turn, row.sample, row.temperature, row.prompt, row.answer[:room])
        (held if held_out(row.conversation, config.held_out) else train).append(cut)
    if not train or not held:
        raise ConfigError(
            f"{', '.join(map(str, config.data))} gives {len(train)} rows to train on and {len(held)} held "
            "out; distill more, or raise --held-out"
        )
    return train, held


def fingerprint(rows: list[Row]) -> str:
    """Identity of a data set, whatever the order of its rows."""
    keys = np.sort(row_keys(rows))
    return f"{len(rows)} rows {hashlib.sha256(keys.tobytes()).hexdigest()[:16]}"


def prepare(config: TrainConfig, train: list[Row], held: list[Row], started: float | None = None) -> Setup:
    """Say what it takes, refuse what cannot fit, and load or compute what the run needs.

    Args:
        started: `time.monotonic()` when the run's minutes began; now if None.

    Raises:
        ConfigError: it does not fit, or settings that contradict each other.
        ModelError: the base model cannot be used.
    """
    until = math.inf
    if config.minutes is not None:
        until = (time.monotonic() if started is None else started) + 60.0 * config.minutes / 2
    made = _Preparation(config, train, held)
    rows = made.rows_that_fit()
    cache = made.hidden_states(rows, until)
    of_held, of_train = cache.select(held), cache.select(train)
    if (left := len(rows) - int((of_held | of_train).sum())) > 0:
        tqdm.write(f"half of the time is over: {left} of {len(rows)} rows are left out")
    return Setup(
        made.batches(cache, of_train, left),
        cache,
        of_held,
        made.vocabulary,
        made.lm_head(made.vocabulary.token_map).to(device=made.device, dtype=made.dtype),
        made.vocabulary.rows(made.device),
    )


class _Preparation:
    """What the settings of a run come to, and one after the other what it needs."""

    def __init__(self, config: TrainConfig, train: list[Row], held: list[Row]) -> None:
        self.config, self.train, self.held = config, train, held
        self.model, self.checkpoint = open_base(config.model, config.lora)
        self.device = device_named(config.device)
        self.dtype = training_dtype(config.dtype, self.model, self.device)
        self.vocabulary = _vocabulary(config, train, self.model)
        self.cached = _cached(config, self.model, train, held)
        self.resident = config.cache == "memory"
        self.cache_dir = config.cache_dir or config.output / "cache"
        self.identity: dict[str, Any] = {
            "model": model_identity(self.checkpoint),
            "hidden_size": self.model.hidden_size,
            "top_k": min(TOP_K, self.model.vocab_size),
        }
        self.longest = max(len(row.prompt) + len(row.answer) for row in (*train, *held))
        self.online_pack = max(config.micro_tokens, self.longest)
        self.pack = pack_size(self.device) if self.cached else self.online_pack
        self._backbone: Backbone | None = None

    def rows_that_fit(self) -> list[Row]:
        """Rows whose hidden states are to be kept, having said what the run takes.

        Raises:
            ConfigError: it does not fit.
        """
        # Held-out rows first: a pass that is cut short can be measured on.
        rows = [*self.held, *self.train] if self.cached else self.held
        missing = rows if self.resident else missing_rows(self.cache_dir, rows, **self.identity)
        memory, available = self._plan(missing), available_bytes(self.device)
        if self.resident:
            rows = _that_fit(rows, memory, available, least=len(self.held) + 1)
        tqdm.write(memory.describe(available))
        memory.check(
            available,
            "Lower --micro-tokens or --vocabulary, or take --backbone-bits 4"
            if self.device.type == "cuda"
            else "Lower --micro-tokens or --vocabulary",
        )
        if memory.disk > (free := free_disk(self.cache_dir)):
            raise ConfigError(
                f"the hidden states take {memory.disk >> 20} MiB and {free >> 20} MiB are free at "
                f"{self.cache_dir}; name another place with --cache-dir, or take --cache off"
            )
        tokens = sum(len(row.answer) for row in self.train)
        tqdm.write(
            f"{len(self.train)} rows to train on ({tokens} answer tokens), {len(self.held)} held out; "
            f"vocabulary {len(self.vocabulary)} covers {self.vocabulary.coverage:.2%}"
        )
        return rows

    def _plan(self, missing: list[Row]) -> MemoryPlan:
        """Of a run that computes the hidden states of these rows."""
        config = self.config
        return plan(
            self.checkpoint,
            self.model,
            device=self.device,
            dtype=self.dtype,
            bits=config.backbone_bits,
            needs_backbone=bool(missing) or not self.cached,
            heads=config.heads,
            layers=config.layers,
            vocabulary=len(self.vocabulary),
            micro_tokens=config.micro_tokens,
            pack_tokens=max(self.pack, self.longest),
            ema=config.ema > 0,
            teacher_online=not self.cached and config.kl > 0,
            cached_tokens=sum(len(row.answer) for row in missing),
            resident=self.resident,
            top_k=TOP_K,
        )

    def hidden_states(self, rows: list[Row], until: float) -> HiddenCache | ResidentCache:
        """Those of the rows, as many as are computed by `until`; see `time.monotonic()`."""
        if self.resident:
            return keep_hidden(
                rows,
                top_k=self.identity["top_k"],
                backbone=self._loaded(),
                lm_head=self.lm_head(),
                pack_tokens=self.pack,
                until=until,
            )
        return cache_hidden(
            self.cache_dir,
            rows,
            **self.identity,
            make_backbone=lambda: (self._loaded(), self.lm_head()),
            pack_tokens=self.pack,
            until=until,
        )

    def batches(self, cache: HiddenCache | ResidentCache, chosen: NDArray[np.bool_], left: int) -> Source:
        """Of the chosen rows of the cache, where there is one for training; `left` ran out of time."""
        config = self.config
        if not self.cached:
            whole = self.lm_head().to(self.device, self.dtype) if config.kl > 0 else None
            return OnlineBatches(
                self._loaded(),
                self.train,
                lm_head=whole,
                num_heads=config.heads,
                batch_tokens=config.batch_tokens,
                micro_tokens=self.online_pack,
                seed=config.seed,
            )
        self._backbone = None  # its memory is the heads' now
        settings: dict[str, Any] = {
            "num_heads": config.heads,
            "batch_tokens": config.batch_tokens,
            "micro_tokens": config.micro_tokens,
            "seed": config.seed,
            "teacher": config.kl > 0,
            "out_of_time": left,
        }
        if isinstance(cache, ResidentCache):
            return ResidentBatches(cache, chosen, **settings)
        return CachedBatches(cache, chosen, **settings)

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        """See `read_lm_head`."""
        return read_lm_head(self.config.model, rows, lora=self.config.lora)

    def _loaded(self) -> Backbone:
        """The base model, loaded when it is first needed."""
        if self._backbone is None:
            self._backbone = make_backbone(
                self.config.model,
                lora=self.config.lora,
                device=str(self.device),
                dtype=str(self.dtype).removeprefix("torch."),
                bits=self.config.backbone_bits,
                pack_tokens=self.pack,
                longest=self.longest,
            )
        return self._backbone


def _vocabulary(config: TrainConfig, train: list[Row], model: ModelConfig) -> Vocabulary:
    """What the heads may say: the answers' most frequent tokens."""
    counted = np.concatenate([row.answer for row in train])
    # Prompts break ties among what thin data has not answered yet: answers are about what was asked.
    prompts = np.unique(np.concatenate([row.prompt for row in train]))
    wanted = None if config.vocabulary == "full" else int(config.vocabulary)
    return Vocabulary.most_frequent(counted, prompts, wanted, model.vocab_size)


def _cached(config: TrainConfig, model: ModelConfig, train: list[Row], held: list[Row]) -> bool:
    if config.cache != "auto":
        return config.cache != "off"
    size = sum(len(row.answer) for row in (*train, *held)) * (2 * model.hidden_size + 6 * TOP_K + 16)
    room = free_disk(config.cache_dir or config.output)
    return size <= min(_MOST_CACHED, room // 4)


def _that_fit(rows: list[Row], memory: MemoryPlan, available: int, *, least: int) -> list[Row]:
    """The first rows, those whose hidden states fit the device beside all else; `memory` then says so.

    Where not even `least` of them fit, all: the plan is then refused.
    """
    ends = np.cumsum([len(row.answer) for row in rows])
    each = memory.parts["hidden states"] / int(ends[-1])
    room = available - (memory.total - memory.parts["hidden states"])
    count = int(np.searchsorted(ends * each, room, side="right"))
    if not least <= count < len(rows):
        return rows
    memory.parts["hidden states"] = int(ends[count - 1] * each)
    tqdm.write(f"the memory holds {count} of {len(rows)} rows: the others are left out")
    return rows[:count]


def model_identity(checkpoint: Checkpoint) -> str:
    """Of a model's weights, by names, shapes and a few values: whole files take minutes to hash."""
    text = hashlib.sha256()
    for name in sorted(checkpoint.names):
        text.update(f"{name}{checkpoint.shape(name)}".encode())
    last = checkpoint.get(sorted(name for name in checkpoint.names if "norm" in name)[-1])
    text.update(last.float().numpy().tobytes())
    for adapter in checkpoint.adapters:
        text.update(f"{adapter.digest} {adapter.scale}".encode())
    return f"{checkpoint.folder.name} {text.hexdigest()[:16]}"


def training_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """Of backbone and activations; for 'auto' see `TrainConfig.dtype`.

    Raises:
        ConfigError: no such setting.
    """
    if name not in (known := get_args(TrainConfig.model_fields["dtype"].annotation)):
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cpu":
        return torch.float32
    return not_emulated(torch.bfloat16 if model.dtype is torch.float32 else model.dtype, device)
