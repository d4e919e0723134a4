"""Who owns which K/V block. Plain integers; the tensors are `KVPool`'s."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["BlockManager"]


class BlockManager:
    """Hands out pool blocks and takes them back.

    A block is free, or has owners (counted), or is cached: published for reuse and ownerless. Cached
    blocks are handed out like free ones once there are none, least recently used first; the block
    whose content is lost that way is reported to whoever `watch`es.

    Block 0 is never handed out: unused entries of a block table point to it.
    """

    NULL_BLOCK = 0

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is padding), got {num_blocks}")
        self.block_size = block_size
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, self.NULL_BLOCK, -1))
        self._references = [0] * num_blocks
        self._published = [False] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._on_evict: Callable[[int], None] | None = None

    @property
    def free(self) -> int:
        """Blocks that nobody owns and nobody can reuse."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks kept only for reuse by a later prompt; taken back when the free ones run out."""
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free - self.cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` rows."""
        return -(-num_tokens // self.block_size)

    def owners(self, block: int) -> int:
        return self._references[block]

    def published(self, block: int) -> bool:
        return self._published[block]

    def watch(self, on_evict: Callable[[int], None]) -> None:
        """Call `on_evict(block)` for every cached block that `grow` takes back.

        Raises:
            RuntimeError: somebody watches already, and would go on believing in lost blocks.
        """
        if self._on_evict is not None:
            raise RuntimeError("these K/V blocks have a prefix cache already")
        self._on_evict = on_evict

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Append blocks to `blocks` until it holds `num_tokens` rows; all or nothing.

        Returns:
            False, with nothing changed, if too few are free or cached.
        """
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self._free) + len(self._cached):
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return True

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that are owned or cached (a prompt's blocks used by several sequences).

        Raises:
            ValueError: a block is free; those before it have been shared.
        """
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise ValueError(f"block {block} is free and cannot be shared")
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one owner of each block and empty the list; ownerless blocks become cached or free.

        The last block is let go first: a block is of use only after those before it, so a chain has
        to lose its tail before its head.

        Raises:
            ValueError: a block has no owner.
        """
        while blocks:
            block = blocks.pop()
            if self._references[block] < 1:
                raise ValueError(f"block {block} was released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._published[block]:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int) -> None:
        """Mark an owned block as reusable: from now on it is never written again.

        Raises:
            ValueError: nobody owns it, or it is published already.
        """
        if self._references[block] < 1 or self._published[block]:
            raise ValueError(f"block {block} has no owner or is published already")
        self._published[block] = True

    def unpublish(self, block: int) -> None:
        """Take a published block out of reuse; a cached one becomes free.

        Raises:
            ValueError: it is not published.
        """
        if not self._published[block]:
            raise ValueError(f"block {block} is not published")
        self._published[block] = False
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check(self) -> None:
        """Integrity of the books: raises RuntimeError unless every block is in exactly one place."""
        owned = [block for block, count in enumerate(self._references) if count]
        if any(count < 0 for count in self._references):
            raise RuntimeError("a K/V block has fewer than no owners")
        if sorted([*owned, *self._free, *self._cached]) != list(range(1, self.total + 1)):
            raise RuntimeError(
                f"K/V blocks leaked or held twice: {len(owned)} owned + {self.free} free + "
                f"{self.cached} cached of {self.total}"
            )
        if any(self._published[block] for block in self._free):
            raise RuntimeError("a free K/V block is published")
        if not all(self._published[block] for block in self._cached):
            raise RuntimeError("a cached K/V block is not published")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._published[block] = False
        if self._on_evict is not None:
            self._on_evict(block)
        return block
