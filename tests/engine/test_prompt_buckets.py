"""The shapes of captured passes over prompts, and what fills them up."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, strategies as st

from engine.prompt_buckets import PromptBuckets
from engine.scheduler import Chunk


def chunk(slot: int, start: int, size: int) -> Chunk:
    tokens = [100 * slot + i for i in range(start + size)]
    sequence: Any = SimpleNamespace(slot=slot, token_ids=tokens)
    return Chunk(sequence, start, start + size, last=True, first=True)


def test_default_sizes() -> None:
    made = PromptBuckets.default((1, 2, 4, 8, 16, 32, 48), max_tokens=600, longest=1000)
    assert made.chunks == (1, 8, 48)
    assert made.tokens == (16, 32, 64, 128, 192, 256, 384, 512, 600)
    assert made.up_to(130).tokens == (16, 32, 64, 128)
    assert (made.up_to(15).chunks, made.up_to(15).tokens) == ((), ())
    few = PromptBuckets.default((1, 2, 3), max_tokens=10, longest=7)
    assert (few.chunks, few.tokens) == ((1, 3), (10,))
    none = PromptBuckets.default((), max_tokens=600, longest=1000)
    assert none.all() == []
    assert none.find(1, 1) is None


@given(
    chunks=st.integers(1, 70),
    tokens=st.integers(1, 700),
    most=st.sampled_from([1, 3, 8, 48]),
    max_tokens=st.sampled_from([10, 64, 600]),
)
def test_the_smallest_is_found_and_captured(chunks: int, tokens: int, most: int, max_tokens: int) -> None:
    batches = tuple(b for b in (1, 2, 3, 4, 8, 16, 32, 48) if b <= most)
    made = PromptBuckets.default(batches, max_tokens=max_tokens, longest=1000)
    tokens = max(tokens, chunks)  # a chunk has one at least
    found = made.find(chunks, tokens)
    if chunks > most or tokens > max_tokens:
        assert found is None
        return
    assert found in made.all()
    fitting = [b for b in made.all() if b.chunks >= chunks and b.tokens >= tokens]
    assert found == min(fitting, key=lambda b: (b.tokens, b.chunks))


@given(data=st.data(), longest=st.sampled_from([20, 50, 300]))
def test_inputs(data: st.DataObject, longest: int) -> None:
    """Every chunk's rows in order, then fillers' from their first row on; each row once."""
    made = PromptBuckets.default((1, 8, 12), max_tokens=200, longest=longest)
    sizes = data.draw(st.lists(st.integers(1, longest), max_size=12).filter(lambda s: sum(s) <= 200))
    starts = data.draw(st.lists(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes)))
    chunks = [chunk(3 + i, *each) for i, each in enumerate(zip(starts, sizes, strict=True))]
    bucket = made.find(max(1, len(sizes)), max(1, sum(sizes)))
    assert bucket is not None
    given_ = bucket.inputs(chunks, spare=99)
    assert all(length % 2 == 0 for length in bucket.parts)
    ends = list(accumulate(bucket.parts))
    slots, begins, index, tokens = (
        part[:length]
        for part, length in zip(
            np.split(given_, ends[:-1]),
            (bucket.sequences, bucket.sequences, bucket.tokens, bucket.tokens),
            strict=True,
        )
    )
    assert slots.tolist() == [c.sequence.slot for c in chunks] + [99] * (bucket.sequences - len(chunks))
    assert begins.tolist() == starts + [0] * (bucket.sequences - len(chunks))
    assert (np.diff(index) > 0).all()
    rows = [divmod(int(i), bucket.longest) for i in index]
    wanted = [(i, j) for i, size in enumerate(sizes) for j in range(size)]
    assert rows[: len(wanted)] == wanted
    for sequence, row in rows[len(wanted) :]:
        assert sequence >= bucket.chunks
        assert row == 0 or (sequence, row - 1) in rows
    assert tokens[: len(wanted)].tolist() == [
        token for c in chunks for token in c.sequence.token_ids[c.start : c.end]
    ]
    assert not tokens[len(wanted) :].any()
