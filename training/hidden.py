"""What the frozen model says of every answer token, computed once and kept on disk.

With a frozen backbone the heads need nothing else: the final hidden state that chose each token, the token,
and the model's best tokens there (for the KL term). Heads of a small model then train from a memory map,
without the backbone, at the speed of the heads alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError
from training.backbone import Backbone, packs
from training.data import Row

__all__ = ["TOP_K", "HiddenCache", "cache_hidden", "missing_rows", "row_key", "top_tokens"]

TOP_K = 16
"""Best tokens of the model that are kept per position; the rest of the probability is left out."""

_FORMAT = 1

_FILES: dict[str, tuple[str, type]] = {
    "hidden": ("hidden.f16", np.float16),
    "tokens": ("tokens.i32", np.int32),
    "ends": ("ends.i64", np.int64),
    "row_of": ("row_of.i32", np.int32),
    "top_ids": ("top_ids.i32", np.int32),
    "top_log_p": ("top_log_p.f16", np.float16),
    "keys": ("keys.u64", np.uint64),
}


@dataclass(frozen=True, slots=True)
class HiddenCache:
    """Arrays over the answer tokens of R rows, row after row.

    Args:
        hidden: [N, hidden] float16, the state after the final norm that chose each token.
        tokens: [N] int32.
        ends: [N] int64, one past the last token of the answer that each belongs to.
        row_of: [N] int32, the row that each token comes from.
        top_ids: [N, top_k] int32, the model's best tokens.
        top_log_p: [N, top_k] float16, their log-probabilities.
        keys: [R] uint64, `row_key` of each row.
    """

    hidden: NDArray[np.float16]
    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    row_of: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_log_p: NDArray[np.float16]
    keys: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """[R] bool: which of the cache's rows are among these."""
        found: NDArray[np.bool_] = np.isin(
            self.keys, np.array([row_key(row) for row in rows], dtype=np.uint64)
        )
        return found


@dataclass(slots=True)
class _State:
    """How far a cache has come; written after each pack, so that a killed pass goes on from there."""

    format: int
    model: str
    hidden_size: int
    top_k: int
    rows: int = 0
    tokens: int = 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the array with this name."""
        if name == "keys":
            return (self.rows,)
        if name == "hidden":
            return (self.tokens, self.hidden_size)
        return (self.tokens, self.top_k) if name.startswith("top_") else (self.tokens,)


def row_key(row: Row) -> int:
    """64-bit hash of a row's tokens."""
    text = hashlib.sha256(np.asarray([len(row.prompt)], dtype="<i8").tobytes())
    text.update(row.prompt.astype("<i8").tobytes())
    text.update(row.answer.astype("<i8").tobytes())
    return int.from_bytes(text.digest()[:8], "little")


def top_tokens(hidden: Tensor, lm_head: Tensor, count: int = TOP_K) -> tuple[Tensor, Tensor]:
    """The model's best tokens: ids [T, count] and log-probabilities [T, count] float32, falling."""
    ids, log_p = [], []
    for part in torch.split(hidden, 256):
        logits = (part.to(lm_head.dtype) @ lm_head.T).float()
        best = logits.topk(min(count, logits.shape[1]), dim=1)
        ids.append(best.indices)
        log_p.append(best.values - logits.logsumexp(1, keepdim=True))
    return torch.cat(ids), torch.cat(log_p)


def missing_rows(folder: Path, rows: Sequence[Row], *, model: str, hidden_size: int, top_k: int) -> list[Row]:
    """Rows whose states the cache does not hold yet.

    Raises:
        ConfigError: the folder holds the cache of another model, or is damaged.
    """
    state = _load_state(folder, model, hidden_size, top_k)
    known = set(_array(folder, state, "keys").tolist())
    return [row for row in rows if row_key(row) not in known]


def cache_hidden(
    folder: Path,
    rows: Sequence[Row],
    *,
    model: str,
    hidden_size: int,
    top_k: int,
    make_backbone: Callable[[], tuple[Backbone, Tensor]],
    pack_tokens: int = 512,
    progress: bool = True,
) -> HiddenCache:
    """A cache in `folder` that holds these rows (and others, maybe); what is not there yet is computed.

    A killed pass goes on where it stood, and more data is added to what there is.

    Args:
        model: identity of the model.
        top_k: best tokens kept per position.
        make_backbone: the model and its whole lm_head [vocab, hidden]; called only where rows are missing.
        pack_tokens: tokens of a pass.

    Raises:
        ConfigError: the folder holds the cache of another model, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _load_state(folder, model, hidden_size, top_k)
    missing = missing_rows(folder, rows, model=model, hidden_size=hidden_size, top_k=top_k)
    if missing:
        for name, (file, dtype) in _FILES.items():
            (folder / file).touch()
            with (folder / file).open("r+b") as out:
                out.truncate(int(np.prod(state.shape(name), dtype=np.int64)) * np.dtype(dtype).itemsize)
        backbone, lm_head = make_backbone()
        _extend(folder, state, missing, backbone, lm_head, pack_tokens, progress)
    return HiddenCache(**{name: _array(folder, state, name) for name in _FILES})


def _extend(
    folder: Path,
    state: _State,
    rows: Sequence[Row],
    backbone: Backbone,
    lm_head: Tensor,
    pack_tokens: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    weight = lm_head.to(device=backbone.device, dtype=backbone.dtype)
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    bar = tqdm(total=sum(lengths), desc="hidden states", unit="tok", disable=None if progress else True)
    for pack in packs(lengths, pack_tokens):
        chosen = [rows[i] for i in pack]
        arrays = _arrays(state, chosen, backbone, weight)
        for name, (file, dtype) in _FILES.items():
            with (folder / file).open("ab") as out:
                out.write(np.ascontiguousarray(arrays[name], dtype=dtype).tobytes())
        # Last: what the files hold beyond these counts is cut off when a killed pass goes on.
        state.rows += len(chosen)
        state.tokens += len(arrays["tokens"])
        partial = folder / "cache.json.partial"
        partial.write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        partial.replace(folder / "cache.json")
        bar.update(sum(lengths[i] for i in pack))
    bar.close()


def _arrays(
    state: _State, rows: Sequence[Row], backbone: Backbone, lm_head: Tensor
) -> dict[str, NDArray[Any]]:
    """The arrays' next entries for a pack of rows."""
    states = backbone.hidden([np.concatenate((row.prompt, row.answer)).tolist() for row in rows])
    prompts = np.array([len(row.prompt) for row in rows])
    answers = np.array([len(row.answer) for row in rows])
    starts = np.cumsum(prompts + answers) - answers
    # The state at a token chose the next one.
    places = np.concatenate(
        [np.arange(start - 1, start - 1 + length) for start, length in zip(starts, answers, strict=True)]
    )
    hidden = states[torch.from_numpy(places).to(states.device)]
    ids, log_p = top_tokens(hidden, lm_head, state.top_k)
    return {
        "hidden": hidden.to(torch.float16).cpu().numpy(),
        "tokens": np.concatenate([row.answer for row in rows]),
        "ends": np.repeat(state.tokens + np.cumsum(answers), answers),
        "row_of": np.repeat(state.rows + np.arange(len(rows)), answers),
        "top_ids": ids.cpu().numpy(),
        "top_log_p": log_p.cpu().numpy(),
        "keys": np.array([row_key(row) for row in rows], dtype=np.uint64),
    }


def _load_state(folder: Path, model: str, hidden_size: int, top_k: int) -> _State:
    fresh = _State(_FORMAT, model, hidden_size, top_k)
    file = folder / "cache.json"
    if not file.is_file():
        return fresh
    try:
        state = _State(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove {folder}") from error
    if (state.format, state.model, state.hidden_size, state.top_k) != (_FORMAT, model, hidden_size, top_k):
        raise ConfigError(
            f"{folder} holds hidden states of {state.model} ({state.hidden_size} wide, format "
            f"{state.format}), not of {model} ({hidden_size} wide, format {_FORMAT}); remove it, or name "
            "another folder"
        )
    return state


def _array(folder: Path, state: _State, name: str) -> NDArray[Any]:
    file, dtype = _FILES[name]
    shape = state.shape(name)
    if shape[0] == 0:
        return np.zeros(shape, dtype=dtype)
    try:
        return np.memmap(folder / file, dtype=dtype, mode="r", shape=shape)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / file} is damaged ({error}); remove {folder}") from error
