"""The tree and table beside the heads are found, and `--tree auto` starts from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import TreeError
from engine.loader import load
from engine.medusa.calibrated import CalibratedTree, find_calibrated
from engine.medusa.choice_kernels import shares
from engine.medusa.records import HeadRecord
from engine.medusa.seats import Seats
from engine.medusa.tree import Tree
from tests.engine.conftest import TinyModel
from tests.engine.medusa.by_hand import packed, sequence
from tests.support import save_random_heads

PATHS = [[0], [0, 0], [1], [0, 0, 0]]
ACCEPTED = [0.5, 0.25, 0.2, 0.1]


class OfTwo:
    """A record, and sequences in slots 0 and 1."""

    def __init__(self, accepted: list[float] | None) -> None:
        self.record, self.seats = HeadRecord(Tree.from_paths(PATHS), accepted), Seats(0)
        self.seats.seat([sequence(0), sequence(1)])
        assert self.own(0, 1) == [1.0, 1.0]

    def see(self, *trees: tuple[int, int]) -> None:
        """Nodes of the heads in each one's tree, and the mask of those that were accepted."""
        nodes = np.array([(size, 0) for size, _ in trees])
        values, _ = packed([mask for _, mask in trees])
        self.record.observe(self.seats.known, np.arange(len(trees)), nodes, values)

    def own(self, *slots: int) -> list[float]:
        found: list[float] = shares(self.seats.known.own, np.array(slots)).tolist()
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_heads(tmp_path / "medusa_lm_head.safetensors", hidden=32, vocab=61)
    (tmp_path / "medusa_tree.json").write_text(json.dumps(PATHS))
    (tmp_path / "medusa_calibration.json").write_text(json.dumps({"paths": PATHS, "accepted": ACCEPTED}))
    return tmp_path


def config(model: TinyModel, heads: Path, **values: object) -> EngineConfig:
    return EngineConfig(model=str(model.folder), heads=str(heads), device="cpu", **values)  # type: ignore[arg-type]


def test_heads_are_served_with_the_tree_and_table_beside_them(tiny: TinyModel, folder: Path) -> None:
    for source in (folder, folder / "medusa_lm_head.safetensors"):
        drafter = load(config(tiny, source), progress=False).heads
        assert drafter is not None
        assert drafter.tree == Tree.from_paths(PATHS)
        assert drafter.accepted == pytest.approx(ACCEPTED)


def test_a_fixed_size_takes_a_prefix_and_a_tree_of_ones_own_wins(tiny: TinyModel, folder: Path) -> None:
    fixed = load(config(tiny, folder, tree=4, lookup="off"), progress=False).heads
    assert fixed is not None
    assert fixed.tree == Tree.from_paths(PATHS[:3])
    assert fixed.accepted == pytest.approx(ACCEPTED[:3])
    other = folder / "other.json"
    other.write_text("[[0], [1], [2]]")
    own = load(config(tiny, folder, tree_file=str(other)), progress=False).heads
    assert own is not None
    assert own.tree == Tree.load(other)
    assert own.accepted is None


def test_a_tree_without_a_table_and_heads_without_either(tmp_path: Path) -> None:
    heads = str(tmp_path / "medusa_lm_head.safetensors")
    assert find_calibrated(heads) is None
    assert find_calibrated("someone/heads") is None
    (tmp_path / "medusa_tree.json").write_text(json.dumps(PATHS))
    assert find_calibrated(heads) == CalibratedTree(Tree.from_paths(PATHS))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"paths": [[0]]}',
        '{"paths": [[0]], "accepted": [0.1, 0.2]}',
        '{"paths": [[0]], "accepted": [2]}',
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "medusa_calibration.json").write_text(text)
    with pytest.raises(TreeError, match="cannot read the calibration"):
        find_calibrated(str(tmp_path))


def test_what_is_served_corrects_the_table() -> None:
    two = OfTwo(ACCEPTED)
    record = two.record
    # Sizes 0 and 1, 2, 3, 4 nodes; at depth 1 the first and third node.
    np.testing.assert_allclose(record.reach()[:, 0], [0.0, 0.5, 0.5, 0.7, 0.7])
    for _ in range(2000):
        two.see((4, 0b11))
    assert record.reach()[-1, 0] == pytest.approx(0.99, abs=0.01)
    assert record.reach()[-1, 1] == pytest.approx(0.0, abs=0.01)


def test_what_is_learned_of_a_node_holds_for_those_below_it() -> None:
    """Heads that are always right where they are verified: the third node of the chain never was."""
    two = OfTwo(None)
    record = two.record
    before = record.reach()[-1].copy()
    for _ in range(200):
        two.see((2, 0b111))
    after = record.reach()[-1].copy()
    assert after[0] == pytest.approx(0.98, abs=0.02)
    assert after[1] == pytest.approx(0.98, abs=0.02)
    # Given the second, it comes true as often as was hoped.
    hoped = 0.8 * 0.95**2
    assert before[2] == pytest.approx(0.8 * 0.8 * 0.95 * hoped)
    assert after[2] == pytest.approx(hoped * after[1], rel=0.01)
    for _ in range(300):
        # Always wrong from here on; of the lower ones nothing is seen.
        two.see((4, 0b1), (4, 0b1))
    assert record.reach()[-1] == pytest.approx([0.0, 0.0, 0.0], abs=0.1)


def test_a_calibration_is_read_as_shares_of_the_parents() -> None:
    record = HeadRecord(Tree.from_paths(PATHS), ACCEPTED)
    np.testing.assert_allclose(record.reach()[-1], [0.7, 0.25, 0.1])


def test_what_a_sequences_own_drafts_are_worth() -> None:
    """At first what all are; then by what was expected of them and came, until another has the slot."""
    two = OfTwo(ACCEPTED)
    for _ in range(100):
        two.see((4, 0b1), (2, 0b111))  # never; two tokens each time
    useless, good = two.own(0, 1)
    assert useless < 0.5
    assert good > 1.15
    for _ in range(50):  # in which they draft nothing: what is known grows old
        two.see((0, 0b1), (0, 0b1))
    assert useless + 0.1 < two.own(0)[0] < 0.8
    good = two.own(1)[0]
    others = sequence(0), sequence(5)
    others[0].arrival = 7
    two.seats.seat([sequence(1), *others])
    assert two.own(1, 0, 5) == [good, 1.0, 1.0]
