"""Rows of training data, and how they lie on disk.

A row is a prompt (the whole context, chat template included) and the model's answer to it, in token ids.
An answer that ended by itself includes the token that ended it.

**Token shards** (`*.tokens.xz`) are what is kept and shared: an xz stream of one JSON header line and
these little-endian arrays, one entry per row:

    conversation u8      hash of what was asked; decides the held-out part
    turn, sample u2      which answer of the conversation it is, from 0
    temperature  f4      it was drawn at; 0 is greedy
    prompts      u4      tokens of the prompt
    answers      u4      tokens of the answer
    tokens       u2|u4   all prompts, then all answers; u2 where the vocabulary fits

A folder of shards is extended by adding more; `load_shards` reads any number of files and folders.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError
from training.config import TrainConfig

__all__ = [
    "HELD_OUT",
    "SHARD_SUFFIX",
    "Row",
    "Tokens",
    "held_out",
    "load_shards",
    "read_shard",
    "row_of",
    "write_json",
    "write_shard",
]

Tokens = npt.NDArray[np.int64]
"""[n] token ids."""

SHARD_SUFFIX = ".tokens.xz"

HELD_OUT = float(TrainConfig.model_fields["held_out"].default)
"""Share of the conversations that is never trained on, where no other is asked for."""

_FORMAT = "medusa-serve tokens 1"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One answer.

    Args:
        conversation: 64-bit hash of what was asked; the same for all turns and samples.
        turn: user turn it answers, from 0.
        sample: which answer to the same prompt, from 0.
        temperature: it was drawn at; 0 is greedy.
        prompt: [P] int64, everything before the answer.
        answer: [A] int64, at least one.
    """

    conversation: int
    turn: int
    sample: int
    temperature: float
    prompt: Tokens
    answer: Tokens

    @property
    def key(self) -> tuple[int, int, int]:
        """No two rows of a data set share it."""
        return self.conversation, self.turn, self.sample


def row_of(item: dict[str, Any]) -> Row:
    """The row that a line of `rows.jsonl` describes."""
    return Row(
        conversation=int(item["conversation"], 16),
        turn=item["turn"],
        sample=item["sample"],
        temperature=item["temperature"],
        prompt=np.array(item["prompt_ids"], dtype=np.int64),
        answer=np.array(item["answer_ids"], dtype=np.int64),
    )


def held_out(conversation: int, share: float = HELD_OUT) -> bool:
    """True for conversations that are only measured on: a fixed `share` of all, whatever else is there."""
    return conversation % 10_000 < share * 10_000


def write_shard(path: Path, rows: Sequence[Row], *, vocab_size: int, **about: Any) -> None:
    """Write rows as one shard; `about` goes into its header. The file appears whole or not at all."""
    kind = "<u2" if vocab_size <= 1 << 16 else "<u4"
    header = {"format": _FORMAT, "rows": len(rows), "dtype": kind, "vocab_size": vocab_size, **about}
    columns = (
        ([row.conversation for row in rows], "<u8"),
        ([row.turn for row in rows], "<u2"),
        ([row.sample for row in rows], "<u2"),
        ([row.temperature for row in rows], "<f4"),
        ([len(row.prompt) for row in rows], "<u4"),
        ([len(row.answer) for row in rows], "<u4"),
    )
    parts = [json.dumps(header, ensure_ascii=False).encode() + b"\n"]
    parts += [np.array(values, dtype=dtype).tobytes() for values, dtype in columns]
    parts += [row.prompt.astype(kind).tobytes() for row in rows]
    parts += [row.answer.astype(kind).tobytes() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    # Token ids are pairs of bytes: literal contexts of two positions (lp) and no text model (lc) suit them.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}]
    partial.write_bytes(lzma.compress(b"".join(parts), filters=filters))
    os.replace(partial, path)


def read_shard(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a shard.

    Raises:
        ConfigError: it cannot be read, or is no shard.
    """
    try:
        with lzma.open(path) as file:
            header = json.loads(file.readline())
            if header.get("format") != _FORMAT:
                raise ValueError(f"format {header.get('format')!r}")
            data = file.read()
        count, start = int(header["rows"]), 0

        def take(dtype: str, size: int) -> npt.NDArray[Any]:
            nonlocal start
            values: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype, count=size, offset=start)
            start += values.nbytes
            return values

        columns = [take(dtype, count).tolist() for dtype in ("<u8", "<u2", "<u2", "<f4", "<u4", "<u4")]
        prompts = take(header["dtype"], sum(columns[4])).astype(np.int64)
        answers = take(header["dtype"], sum(columns[5])).astype(np.int64)
        if start != len(data):
            raise ValueError(f"{len(data) - start} bytes too many")
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a token shard: {error}") from None
    splits = (np.split(prompts, np.cumsum(columns[4])), np.split(answers, np.cumsum(columns[5])))
    rows = [
        Row(conversation, turn, sample, round(temperature, 6), prompt, answer)
        for conversation, turn, sample, temperature, prompt, answer in zip(
            *columns[:4], splits[0][:-1], splits[1][:-1], strict=True
        )
    ]
    return header, rows


def load_shards(paths: Iterable[Path]) -> list[Row]:
    """Rows of all shards, in the order of the paths; of a folder, those below it by name.

    Raises:
        ConfigError: nothing there, a file that is no shard, or a row that occurs twice.
    """
    rows: dict[tuple[int, int, int], Row] = {}
    for path in paths:
        files = sorted(path.rglob("*" + SHARD_SUFFIX)) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{path} holds no *{SHARD_SUFFIX}")
        for file in files:
            for row in read_shard(file)[1]:
                if row.key in rows:
                    raise ConfigError(
                        f"{file} repeats a row: conversation {row.conversation:016x}, "
                        f"turn {row.turn}, sample {row.sample}"
                    )
                rows[row.key] = row
    return list(rows.values())


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
