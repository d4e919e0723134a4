"""Token shards: what is written is read, whatever the vocabulary; what is none is refused."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from training.data import SHARD_SUFFIX, Row, held_out, load_shards, read_shard, write_shard


def make_rows(count: int, vocab_size: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        Row(
            conversation=int(rng.integers(1 << 63)) * 2 + 1,
            turn=i % 3,
            sample=i % 2,
            temperature=(0.0, 0.7)[i % 2],
            prompt=rng.integers(vocab_size, size=int(rng.integers(1, 9))),
            answer=rng.integers(vocab_size, size=int(rng.integers(1, 30))),
        )
        for i in range(count)
    ]


def same(row: Row, other: Row) -> bool:
    return (
        row.key == other.key
        and row.temperature == other.temperature
        and np.array_equal(row.prompt, other.prompt)
        and np.array_equal(row.answer, other.answer)
    )


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, "<u2"), (1 << 17, "<u4")])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, width: str) -> None:
    rows = make_rows(50, vocab_size)
    rows[0].answer[0] = vocab_size - 1
    file = tmp_path / f"a{SHARD_SUFFIX}"
    write_shard(file, rows, vocab_size=vocab_size, model="m")
    header, read = read_shard(file)
    assert (header["rows"], header["dtype"], header["vocab_size"], header["model"]) == (
        50,
        width,
        vocab_size,
        "m",
    )
    assert all(map(same, rows, read))
    assert len(read) == 50
    assert read[0].answer.dtype == np.int64


def test_folders_are_read_by_name_and_extended_by_more_files(tmp_path: Path) -> None:
    first, second, third = (make_rows(5, 100, seed) for seed in (1, 2, 3))
    write_shard(tmp_path / f"b{SHARD_SUFFIX}", second, vocab_size=100)
    write_shard(tmp_path / f"a{SHARD_SUFFIX}", first, vocab_size=100)
    assert all(map(same, load_shards([tmp_path]), [*first, *second]))
    write_shard(tmp_path / "more" / f"c{SHARD_SUFFIX}", third, vocab_size=100)
    assert len(load_shards([tmp_path])) == 15
    assert len(load_shards([tmp_path / f"a{SHARD_SUFFIX}", tmp_path / "more"])) == 10


def test_a_row_must_not_occur_twice(tmp_path: Path) -> None:
    rows = make_rows(3, 100)
    write_shard(tmp_path / f"a{SHARD_SUFFIX}", rows, vocab_size=100)
    write_shard(tmp_path / f"b{SHARD_SUFFIX}", rows[2:], vocab_size=100)
    with pytest.raises(ConfigError, match=r"b\.tokens\.xz repeats a row"):
        load_shards([tmp_path])


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \*\.tokens\.xz"):
        load_shards([tmp_path])
    file = tmp_path / f"x{SHARD_SUFFIX}"
    write_shard(file, make_rows(4, 100), vocab_size=100)
    whole = file.read_bytes()
    for content in (
        b"",
        b"no xz",
        whole[:-9],
        lzma.compress(b'{"format": "other"}\n'),
        lzma.compress(lzma.decompress(whole) + b"\0\0"),
        lzma.compress(lzma.decompress(whole)[:-2]),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.tokens\.xz is not a token shard"):
            load_shards([file])


def test_the_held_out_part_is_a_fixed_share_by_conversation() -> None:
    keys = [row.conversation for row in make_rows(20_000, 10)]
    part = {key for key in keys if held_out(key)}
    assert 0.045 < len(part) / len(keys) < 0.055
    assert part <= {key for key in keys if held_out(key, 0.1)}
    assert not any(held_out(key, 0.0) for key in keys)
