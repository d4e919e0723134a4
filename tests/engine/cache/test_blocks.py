import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.blocks import BlockManager


class Books(RuleBasedStateMachine):
    """Sequences grow, share, publish and end in any order; a plain model says what must hold."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.evicted: list[int] = []
        self.manager.watch(self.evicted.append)
        self.sequences: list[list[int]] = []
        self.published: set[int] = set()
        self.cached: list[int] = []  # least recently used first

    @property
    def owned(self) -> set[int]:
        return {block for blocks in self.sequences for block in blocks}

    @rule(tokens=st.integers(0, 40))
    def admit(self, tokens: int) -> None:
        self.grow_to([], tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.grow_to(self.sequences.pop(index), tokens)

    def grow_to(self, blocks: list[int], tokens: int) -> None:
        before, free = list(blocks), self.manager.free
        needed = max(0, -(-tokens // self.manager.block_size) - len(before))
        fits = needed <= free + len(self.cached)
        self.evicted.clear()
        assert self.manager.grow(blocks, tokens) == fits
        assert blocks[: len(before)] == before
        assert len(blocks) == len(before) + (needed if fits else 0)
        lost = max(0, needed - free) if fits else 0
        assert self.evicted == self.cached[:lost], "least recently used first, and none before the free ones"
        del self.cached[:lost]
        self.published -= set(self.evicted)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = list(data.draw(st.sampled_from(self.sequences)))
        self.manager.share(blocks)
        self.sequences.append(blocks)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.cached))
        self.manager.share([block])
        self.cached.remove(block)
        self.sequences.append([block])

    @precondition(lambda self: self.owned - self.published)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.owned - self.published)))
        self.manager.publish(block)
        self.published.add(block)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.published)))
        self.manager.unpublish(block)
        self.published.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        let_go = [block for block in reversed(blocks) if block not in self.owned]
        self.cached += [block for block in let_go if block in self.published]
        self.manager.release(blocks)
        assert blocks == []

    @invariant()
    def books_balance(self) -> None:
        self.manager.check()
        assert BlockManager.NULL_BLOCK not in self.owned
        assert self.manager.used == len(self.owned)
        assert self.manager.cached == len(self.cached)
        assert self.manager.free == self.manager.total - len(self.owned) - len(self.cached)
        assert all(self.manager.published(block) for block in self.published)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, deadline=None)


def owned_blocks(manager: BlockManager, count: int) -> list[int]:
    blocks: list[int] = []
    assert manager.grow(blocks, count * manager.block_size)
    return blocks


def test_a_double_release_is_loud() -> None:
    manager = BlockManager(4, 2)
    blocks = owned_blocks(manager, 1)
    again = list(blocks)
    manager.release(blocks)
    with pytest.raises(ValueError, match="twice"):
        manager.release(again)


def test_a_free_block_cannot_be_shared_or_published() -> None:
    manager = BlockManager(4, 2)
    with pytest.raises(ValueError, match="free"):
        manager.share([1])
    with pytest.raises(ValueError, match="no owner"):
        manager.publish(1)


def test_a_block_is_published_once() -> None:
    manager = BlockManager(4, 2)
    (block,) = owned_blocks(manager, 1)
    with pytest.raises(ValueError, match="not published"):
        manager.unpublish(block)
    manager.publish(block)
    with pytest.raises(ValueError, match="already"):
        manager.publish(block)


def test_a_chain_loses_its_tail_before_its_head() -> None:
    manager = BlockManager(4, 2)
    chain = owned_blocks(manager, 3)
    for block in chain:
        manager.publish(block)
    head, middle, tail = chain
    manager.release(chain)
    assert owned_blocks(manager, 2) == [tail, middle]
    manager.share([head])  # still there
    assert manager.used == 3


def test_there_is_one_watcher() -> None:
    manager = BlockManager(4, 2)
    manager.watch([].append)
    with pytest.raises(RuntimeError, match="already"):
        manager.watch([].append)


def lose_a_free_block(manager: BlockManager) -> None:
    manager._free.pop()


def list_a_free_block_twice(manager: BlockManager) -> None:
    manager._free[0] = manager._free[1]


def list_a_cached_block_as_free(manager: BlockManager) -> None:
    manager._free.append(next(iter(manager._cached)))


def lose_a_cached_block(manager: BlockManager) -> None:
    manager._cached.popitem()


def own_a_cached_block(manager: BlockManager) -> None:
    manager._references[next(iter(manager._cached))] = 1


def drop_an_owner(manager: BlockManager) -> None:
    manager._references[manager._references.index(1)] = 0


def owe_an_owner(manager: BlockManager) -> None:
    manager._references[manager._free[0]] = -1


def publish_a_free_block(manager: BlockManager) -> None:
    manager._published[manager._free[0]] = True


def hide_a_cached_block(manager: BlockManager) -> None:
    manager._published[next(iter(manager._cached))] = False


@pytest.mark.parametrize(
    ("falsify", "complaint"),
    [
        (lose_a_free_block, "leaked"),
        (list_a_free_block_twice, "held twice"),
        (list_a_cached_block_as_free, "held twice"),
        (lose_a_cached_block, "leaked"),
        (own_a_cached_block, "held twice"),
        (drop_an_owner, "leaked"),
        (owe_an_owner, "fewer than no owners"),
        (publish_a_free_block, "free K/V block is published"),
        (hide_a_cached_block, "not published"),
    ],
)
def test_false_books_are_found(falsify, complaint: str) -> None:
    manager = BlockManager(7, 2)
    owned_blocks(manager, 1)
    chain = owned_blocks(manager, 2)
    for block in chain:
        manager.publish(block)
    manager.release(chain)
    manager.check()
    falsify(manager)
    with pytest.raises(RuntimeError, match=complaint):
        manager.check()
