"""What the frozen model says of every answer token, computed once and kept on disk.

With a frozen backbone the heads need nothing else: the final hidden state that chose each token, the token,
and the model's best tokens there (for the KL term). Heads of a small model then train from a memory map,
without the backbone, at the speed of the heads alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine.devices import sent
from engine.errors import ConfigError
from training.backbone import Backbone, packs
from training.data import Row

__all__ = [
    "TOP_K",
    "AnswerStates",
    "Batch",
    "HiddenCache",
    "cache_hidden",
    "logits_rows",
    "missing_rows",
    "row_key",
    "row_keys",
    "top_tokens",
]

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
class Batch:
    """Positions whose future is known. Prompts and padding are not among them: only answers have rows.

    Args:
        hidden: [T, hidden], the state that chose each position's token.
        before: [T] int64, the token at each position, which the first head's target follows.
        targets: [heads, T] int64; head i's is the token i + 1 places after the position's; -1 where the
            answer has ended before.
        teacher_ids: [heads, T, k] int64, the model's best tokens at that place; None without a KL term.
        teacher_log_p: [heads, T, k] float32.
    """

    hidden: Tensor
    before: Tensor
    targets: Tensor
    teacher_ids: Tensor | None
    teacher_log_p: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def previous(self) -> Tensor:
        """[heads, T] int64: the token that each target follows; -1 where the answer has ended."""
        return torch.cat((self.before.unsqueeze(0), self.targets[:-1]))


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
        found: NDArray[np.bool_] = np.isin(self.keys, row_keys(rows))
        return found

    def gather(self, positions: NDArray[np.int64], num_heads: int, teacher: bool) -> Batch:
        """The batch of these positions, on the CPU."""
        ahead = positions + 1 + np.arange(num_heads)[:, None]
        known = ahead < self.ends[positions]
        ahead = np.where(known, ahead, 0)
        targets = np.where(known, self.tokens[ahead], -1).astype(np.int64)
        return Batch(
            hidden=torch.from_numpy(np.asarray(self.hidden[positions])),
            before=torch.from_numpy(self.tokens[positions].astype(np.int64)),
            targets=torch.from_numpy(targets),
            teacher_ids=torch.from_numpy(self.top_ids[ahead].astype(np.int64)) if teacher else None,
            teacher_log_p=torch.from_numpy(self.top_log_p[ahead].astype(np.float32)) if teacher else None,
        )


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


def row_keys(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """[R] uint64, `row_key` of each."""
    return np.array([row_key(row) for row in rows], dtype=np.uint64)


def logits_rows(device: torch.device, vocab_size: int) -> int:
    """Rows of logits over the whole vocabulary at a time; on a GPU enough of them to keep all of it busy."""
    return 256 if device.type == "cpu" else max(256, (256 << 20) // (4 * vocab_size))


def top_tokens(hidden: Tensor, lm_head: Tensor, count: int = TOP_K) -> tuple[Tensor, Tensor]:
    """The model's best tokens: ids [T, count] and log-probabilities [T, count] float32, falling."""
    ids, log_p = [], []
    for part in torch.split(hidden, logits_rows(hidden.device, len(lm_head))):
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
    until: float = math.inf,
) -> HiddenCache:
    """A cache in `folder` that holds these rows (and others, maybe); what is not there yet is computed.

    A killed pass goes on where it stood, and more data is added to what there is.

    Args:
        model: identity of the model.
        top_k: best tokens kept per position.
        make_backbone: the model and its whole lm_head [vocab, hidden]; called only where rows are missing.
        pack_tokens: tokens of a pass.
        until: `time.monotonic()` after which no pass begins; rows that come later are not in the cache.

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
        _extend(folder, state, missing, backbone, lm_head, pack_tokens, progress, until)
    return HiddenCache(**{name: _array(folder, state, name) for name in _FILES})


def _extend(
    folder: Path,
    state: _State,
    rows: Sequence[Row],
    backbone: Backbone,
    lm_head: Tensor,
    pack_tokens: int,
    progress: bool,
    until: float,
) -> None:
    weight = lm_head.to(device=backbone.device, dtype=backbone.dtype)
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    bar = tqdm(total=sum(lengths), desc="hidden states", unit="tok", disable=None if progress else True)
    for pack in packs(lengths, pack_tokens):
        if time.monotonic() >= until:
            break
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
    found = AnswerStates.of(rows, backbone, lm_head, state.top_k)
    answers = np.array([len(row.answer) for row in rows])
    return {
        "hidden": found.hidden.to(torch.float16).cpu().numpy(),
        "tokens": np.concatenate([row.answer for row in rows]),
        "ends": np.repeat(state.tokens + np.cumsum(answers), answers),
        "row_of": np.repeat(state.rows + np.arange(len(rows)), answers),
        "top_ids": found.ids.cpu().numpy(),
        "top_log_p": found.log_p.cpu().numpy(),
        "keys": row_keys(rows),
    }


@dataclass(frozen=True, slots=True)
class AnswerStates:
    """What the model says at every answer token of some rows, on its device.

    Args:
        hidden: [N, hidden], the state that chose each token.
        ids: [N, top_k] int64, its best tokens there.
        log_p: [N, top_k] float32.
    """

    hidden: Tensor
    ids: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], backbone: Backbone, lm_head: Tensor, top_k: int) -> AnswerStates:
        """One pass over whole rows; `lm_head` [vocab, hidden] is on the backbone's device, in its dtype."""
        states = backbone.hidden([np.concatenate((row.prompt, row.answer)).tolist() for row in rows])
        prompts = np.array([len(row.prompt) for row in rows])
        answers = np.array([len(row.answer) for row in rows])
        starts = np.cumsum(prompts + answers) - answers
        # The state at a token chose the next one.
        places = np.concatenate(
            [np.arange(start - 1, start - 1 + length) for start, length in zip(starts, answers, strict=True)]
        )
        hidden = states[sent(torch.from_numpy(places), states.device)]
        return cls(hidden, *top_tokens(hidden, lm_head, top_k))


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
