import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.blocks import BlockManager


class Books(RuleBasedStateMachine):
    """Sequences grow, share and end in any order; a plain model of owners says what must hold."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.sequences: list[list[int]] = []

    @rule(tokens=st.integers(0, 40))
    def admit(self, tokens: int) -> None:
        self.grow_to([], tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        self.grow_to(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))), tokens)

    def grow_to(self, blocks: list[int], tokens: int) -> None:
        before, free = list(blocks), self.manager.free
        needed = max(0, -(-tokens // self.manager.block_size) - len(before))
        assert self.manager.grow(blocks, tokens) == (needed <= free)
        assert blocks[: len(before)] == before
        assert len(blocks) == len(before) + (needed if needed <= free else 0)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = list(data.draw(st.sampled_from(self.sequences)))
        self.manager.share(blocks)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.manager.release(blocks)
        assert blocks == []

    @invariant()
    def books_balance(self) -> None:
        self.manager.check()
        owned = {block for blocks in self.sequences for block in blocks}
        assert BlockManager.NULL_BLOCK not in owned
        assert self.manager.used == len(owned)
        assert self.manager.free + self.manager.cached + self.manager.used == self.manager.total


TestBooks = Books.TestCase


def test_a_double_release_is_loud() -> None:
    manager = BlockManager(4, 2)
    blocks: list[int] = []
    manager.grow(blocks, 2)
    again = list(blocks)
    manager.release(blocks)
    with pytest.raises(ValueError, match="twice"):
        manager.release(again)


def test_a_free_block_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="free"):
        BlockManager(4, 2).share([1])


def test_a_lost_block_is_found() -> None:
    manager = BlockManager(4, 2)
    manager._free.pop()
    with pytest.raises(RuntimeError, match="leaked"):
        manager.check()
