"""Which published block holds which tokens after which prefix. Plain Python: no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count

from engine.cache.blocks import BlockManager

__all__ = ["PrefixCache", "PrivateRoot"]

Key = tuple[Hashable, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Published:
    block: int
    identity: int


class PrivateRoot:
    """The start of chains that one owner alone may reuse; equal for the same object only.

    It keeps the owner alive, so that no later object can be taken for it.
    """

    __slots__ = ("_owner",)

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrivateRoot) and self._owner is other._owner

    def __hash__(self) -> int:
        return id(self._owner)


class PrefixCache:
    """Finds blocks by content: the K/V of a block depends on its tokens and on all tokens before them.

    A published block has an identity, a number given once and never again. Its key is what stands
    before it (the identity of the previous block, or the root of the chain) and its own tokens, compared
    exactly: no hash stands in for a prefix, so no collision can hand out wrong K/V. When a block is
    evicted its identity dies with it. The blocks that followed it can no longer be found, even when the
    same tokens are published again, and age out. Chains with different roots share nothing.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._entries: dict[Key, _Published] = {}
        self._keys: dict[int, Key] = {}  # of each published block
        self._identities = count(1)
        blocks.watch(self._drop)

    def __len__(self) -> int:
        """Blocks that can be found, and those whose prefix is gone."""
        return len(self._keys)

    def find(self, root: Hashable, tokens: SequenceOf[int], max_blocks: int) -> tuple[list[int], Hashable]:
        """The longest published chain from `root` that holds the first tokens, whole blocks only.

        The blocks are as they were: `BlockManager.share` them before anything can evict them.

        Returns:
            At most `max_blocks` blocks, and what the next block of the chain stands after.
        """
        found: list[int] = []
        before = root
        size = self._blocks.block_size
        for start in range(0, max_blocks * size, size):
            entry = self._entries.get((before, tuple(tokens[start : start + size])))
            if entry is None:  # as for a block that `tokens` do not fill: no key is that short
                break
            found.append(entry.block)
            before = entry.identity
        return found, before

    def publish(self, before: Hashable, tokens: SequenceOf[int], block: int) -> int:
        """Make an owned block, holding the K/V of `tokens` after `before`, reusable.

        If the same content is published already, `block` stays private to its owner.

        Returns:
            The identity that the chain goes on under.

        Raises:
            ValueError: `tokens` do not fill a block, nobody owns it, or it is published as something else.
        """
        if len(tokens) != self._blocks.block_size:
            raise ValueError(f"a block holds {self._blocks.block_size} tokens, got {len(tokens)}")
        key = (before, tuple(tokens))
        entry = self._entries.get(key)
        if entry is None:
            self._blocks.publish(block)
            entry = _Published(block, next(self._identities))
            self._entries[key] = entry
            self._keys[block] = key
        return entry.identity

    def forget(self, block: int) -> None:
        """Let nobody reuse the block from now on; its owners keep it. Unpublished ones are ignored."""
        if block in self._keys:
            self._drop(block)
            self._blocks.unpublish(block)

    def check(self) -> None:
        """Raises RuntimeError if what can be found is not what the block books say is published."""
        published = {block for block in range(1, self._blocks.total + 1) if self._blocks.published(block)}
        if published != set(self._keys) or len(self._entries) != len(self._keys):
            raise RuntimeError(f"{len(published)} K/V blocks are published, {len(self._keys)} can be found")
        if any(self._entries[key].block != block for block, key in self._keys.items()):
            raise RuntimeError("a K/V block is found under a key that is not its own")

    def _drop(self, block: int) -> None:
        del self._entries[self._keys.pop(block)]
