import gc
import weakref

import pytest

from engine.cache.blocks import BlockManager
from engine.cache.prefix import PrefixCache, PrivateRoot


class Pool:
    """A prefix cache over few blocks of two tokens, and what a sequence does with it."""

    def __init__(self, blocks: int = 8) -> None:
        self.books = BlockManager(blocks + 1, 2)
        self.cache = PrefixCache(self.books)

    def run(self, tokens: list[int], root: object = None) -> list[int]:
        """Fill blocks with `tokens` and publish them; returns them, still owned."""
        blocks: list[int] = []
        assert self.books.grow(blocks, len(tokens))
        before = root
        for index in range(len(tokens) // 2):
            before = self.cache.publish(before, tokens[2 * index : 2 * index + 2], blocks[index])
        self.check()
        return blocks

    def find(self, tokens: list[int], root: object = None, most: int = 100) -> list[int]:
        return self.cache.find(root, tokens, most)[0]

    def check(self) -> None:
        self.books.check()
        self.cache.check()


def test_the_longest_common_prefix_is_found_in_whole_blocks() -> None:
    pool = Pool()
    blocks = pool.run([1, 2, 3, 4, 5, 6])
    assert pool.find([1, 2, 3, 4, 5, 6]) == blocks
    assert pool.find([1, 2, 3, 4, 5]) == blocks[:2]
    assert pool.find([1, 2, 3, 4, 5, 7]) == blocks[:2]
    assert pool.find([1, 2, 4, 3, 5, 6]) == blocks[:1]
    assert pool.find([1]) == pool.find([]) == pool.find([3, 4, 5, 6]) == []
    assert pool.find([1, 2, 3, 4, 5, 6], most=2) == blocks[:2]
    assert pool.find([1, 2, 3, 4, 5, 6], most=0) == []


def test_equal_tokens_after_another_prefix_are_another_block() -> None:
    pool = Pool()
    one, other = pool.run([1, 1, 9, 9]), pool.run([2, 2, 9, 9])
    assert pool.find([1, 1, 9, 9]) == one
    assert pool.find([2, 2, 9, 9]) == other
    assert len(pool.cache) == 4


def test_roots_share_nothing() -> None:
    pool = Pool()
    roots = [None, "", "1", PrivateRoot("1")]
    chains = [pool.run([1, 2], root) for root in roots]
    assert [pool.find([1, 2], root) for root in roots] == chains
    assert pool.find([1, 2], "other") == []


def test_what_is_published_already_stays_private_and_its_chain_goes_on_under_the_first() -> None:
    pool = Pool()
    first = pool.run([1, 2])
    second = pool.run([1, 2, 3, 4])
    assert pool.find([1, 2, 3, 4]) == [first[0], second[1]]
    assert not pool.books.published(second[0])
    pool.books.release(second)
    assert (pool.books.free, pool.books.cached) == (6, 1)


def test_an_evicted_prefix_takes_its_continuations_along_for_good() -> None:
    """The blocks behind a lost one hold K/V of its identity; the same tokens anew have another."""
    pool = Pool(blocks=4)
    first = pool.run([1, 2])
    second = pool.run([1, 2, 3, 4])  # its second block follows the first one's
    pool.books.release(first)
    scratch: list[int] = []
    assert pool.books.grow(scratch, 4)  # takes the free block, then the cached head
    assert pool.find([1, 2, 3, 4]) == []
    pool.books.release(scratch)
    again = pool.run([1, 2])
    assert pool.find([1, 2, 3, 4]) == again
    assert pool.books.published(second[1]), "not found, but evictable once it is let go"
    pool.books.release(second)
    assert pool.books.cached == 1
    pool.check()


def test_a_block_is_found_for_its_new_content_only_after_eviction() -> None:
    pool = Pool(blocks=1)
    block = pool.run([1, 2])
    pool.books.release(block)
    assert pool.run([3, 4]) == pool.find([3, 4])
    assert pool.find([1, 2]) == []


def test_forgotten_blocks_are_not_found_and_not_kept() -> None:
    pool = Pool()
    blocks = pool.run([1, 2, 3, 4])
    pool.cache.forget(blocks[0])
    pool.cache.forget(blocks[0])
    pool.check()
    assert pool.find([1, 2, 3, 4]) == []
    pool.books.release(blocks)
    assert (pool.books.free, pool.books.cached) == (7, 1)


def test_only_full_owned_blocks_are_published() -> None:
    pool = Pool()
    with pytest.raises(ValueError, match="holds 2 tokens"):
        pool.cache.publish(None, [1], 1)
    with pytest.raises(ValueError, match="no owner"):
        pool.cache.publish(None, [1, 2], 1)
    block = pool.run([1, 2])[0]
    with pytest.raises(ValueError, match="already"):
        pool.cache.publish(None, [3, 4], block)
    pool.check()
    assert pool.find([3, 4]) == []


def test_a_private_root_outlives_its_owners_name() -> None:
    """While a chain can be found its owner exists, so that no later object has the same address."""

    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    assert PrivateRoot(owner) == PrivateRoot(owner) != PrivateRoot(Owner())
    pool = Pool(blocks=1)
    blocks = pool.run([1, 2], PrivateRoot(owner))
    del owner
    gc.collect()
    assert alive() is not None
    pool.books.release(blocks)
    pool.run([3, 4])
    gc.collect()
    assert alive() is None


def test_lost_entries_are_found() -> None:
    pool = Pool()
    pool.run([1, 2, 3, 4])
    entries = dict(pool.cache._entries)
    key = next(iter(entries))
    del pool.cache._entries[key]
    with pytest.raises(RuntimeError, match="can be found"):
        pool.check()
    pool.cache._entries.update(dict(zip(entries, reversed(entries.values()), strict=True)))
    with pytest.raises(RuntimeError, match="not its own"):
        pool.check()
