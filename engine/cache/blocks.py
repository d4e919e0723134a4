"""Who owns which K/V block. Plain integers; the tensors are `KVPool`'s."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BlockManager"]


class BlockManager:
    """Hands out pool blocks and takes them back; every block is free or has owners, counted.

    Block 0 is never handed out: unused entries of a block table point to it.
    """

    NULL_BLOCK = 0

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is padding), got {num_blocks}")
        self.block_size = block_size
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))
        self._references = [0] * num_blocks

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks kept only for reuse by a later prompt; none before prefix reuse exists."""
        return 0

    @property
    def used(self) -> int:
        return self.total - self.free - self.cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` rows."""
        return -(-num_tokens // self.block_size)

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Append blocks to `blocks` until it holds `num_tokens` rows; all or nothing.

        Returns:
            False, with nothing changed, if too few are free.
        """
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._references[block] = 1
            blocks.append(block)
        return True

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that have one (a prompt's blocks used by several sequences)."""
        for block in blocks:
            if self._references[block] < 1:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one owner of each block and empty the list; ownerless blocks become free."""
        for block in blocks:
            if self._references[block] < 1:
                raise ValueError(f"block {block} was released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        blocks.clear()

    def check(self) -> None:
        """Integrity of the books: raises RuntimeError if a block is lost or owned while free."""
        owned = sum(1 for count in self._references if count)
        if owned + len(self._free) != self.total or any(self._references[b] for b in self._free):
            raise RuntimeError(f"K/V blocks leaked: {owned} owned + {len(self._free)} free of {self.total}")
        if len(set(self._free)) != len(self._free):
            raise RuntimeError("a K/V block is in the free list twice")
