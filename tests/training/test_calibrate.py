"""Trees from ranks whose truth is known, and replays held against a step-by-step simulation."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError, TreeError
from engine.medusa.calibrated import CalibratedTree, find_calibrated
from engine.medusa.tree import Tree
from training.calibrate import (
    WIDTH,
    calibrate,
    conditional_table,
    marginal_table,
    marginal_tree,
)
from training.evaluate import MISS, NONE, Ranks, accepted_lengths, replay, visits
from training.plots import draw_tree


def ranks_of(values: np.ndarray, answer: int = 20) -> Ranks:
    """Answers of equal length; the ends of answers have no targets, as in real ones."""
    values = values.astype(np.int16)
    ends = (np.arange(len(values)) // answer + 1) * answer
    ends = np.minimum(ends, len(values))
    ahead = np.arange(len(values))[:, None] + 1 + np.arange(values.shape[1])
    values[ahead >= ends[:, None]] = NONE
    return Ranks(values, ends, [0.0] * values.shape[1])


def correlated(count: int = 6000, heads: int = 3, seed: int = 0) -> Ranks:
    """Easy text, where all heads are right together, and hard text, where none is."""
    rng = np.random.default_rng(seed)
    easy = rng.random(count) < 0.4
    guess = np.minimum(rng.geometric(0.6, (count, heads)) - 1, 9)
    return ranks_of(np.where(easy[:, None], guess, MISS))


def coupled(seed: int, count: int = 6000) -> Ranks:
    """A first guess that misses is made good by the same guess of the heads after it, most of the time."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, count)
    later = np.where(rng.random((count, 2)) < 0.9, first[:, None], MISS)
    return ranks_of(np.concatenate((first[:, None], later), axis=1))


def test_every_prefix_of_the_calibrated_tree_is_a_tree_and_promises_less_with_each_node() -> None:
    found = calibrate(correlated())
    assert found.tree.size == 64
    for size in range(1, 65):
        assert found.tree.prefix(size).size == size
    assert list(found.accepted) == sorted(found.accepted, reverse=True)


def test_tables_are_the_shares_they_claim() -> None:
    ranks = correlated()
    counted = ranks.ranks[:, 1]
    even = np.ones(len(ranks))
    marginal, conditional = marginal_table(ranks, even), conditional_table(ranks, even)
    assert marginal[1][0] == pytest.approx((counted == 0).mean())
    given = (ranks.ranks[:, 0] >= 0) & (ranks.ranks[:, 0] < WIDTH)
    assert conditional[1][0] == pytest.approx((counted[given] == 0).mean(), abs=0.01)
    # 0.4 of the text is easy; given the first head was right, all of it is.
    assert conditional[1][0] > 2 * marginal[1][0]


def test_the_conditional_tree_is_the_better_one_where_heads_are_right_together() -> None:
    grown, unseen = calibrate(coupled(0), 13), coupled(1)
    conditional, marginal = replay(unseen, [grown.tree, marginal_tree(grown, 13)])
    assert set(grown.tree.paths) == {(rank,) * depth for rank in range(4) for depth in (1, 2, 3)}
    assert conditional > marginal + 0.5


def test_no_other_tree_of_the_size_accepts_more() -> None:
    """Against every tree of four nodes below the root, from two heads' three best guesses."""
    ranks = correlated(800, heads=2)
    paths = [path for depth in (1, 2) for path in product(range(3), repeat=depth)]
    best = 0.0
    for chosen in product((False, True), repeat=len(paths)):
        picked = [path for path, take in zip(paths, chosen, strict=True) if take]
        if len(picked) == 4 and all(path[:-1] in ((), *picked) for path in picked):
            best = max(best, float(accepted_lengths(ranks.ranks, Tree.from_paths(picked)).mean()))
    found = float(accepted_lengths(ranks.ranks, calibrate(ranks, 5).tree).mean())
    assert found == pytest.approx(best, abs=0.005)


def test_what_the_table_promises_is_what_decoding_accepts() -> None:
    """Text that comes in stretches: decoding leaps over the easy ones and stands in the hard ones."""
    rng = np.random.default_rng(2)
    easy = np.repeat(rng.random(600) < 0.5, 10)
    guess = np.minimum(rng.geometric(0.7, (6000, 3)) - 1, 9)
    ranks = ranks_of(np.where(easy[:, None], guess, MISS), answer=100)
    found = calibrate(ranks)
    assert found.expected_length(64) == pytest.approx(replay(ranks, [found.tree])[0], rel=0.03)
    everywhere = 1 + accepted_lengths(ranks.ranks, found.tree).mean()
    assert everywhere > found.expected_length(64) + 0.2


def test_visits_are_the_steps_of_decoding() -> None:
    """Four tokens, the head right at the second: from the first two steps, from the second one."""
    ranks = ranks_of(np.array([[5], [0], [5], [5]]), answer=4)
    assert visits(ranks, Tree.from_paths([[0]]), 1).tolist() == [1, 1, 0, 0]
    assert visits(ranks, Tree.from_paths([[0]]), 3).tolist() == [1, 2, 1, 0]


def test_replay_is_decoding_step_by_step() -> None:
    ranks = correlated(500, seed=4)
    tree = calibrate(ranks, 12).tree
    nodes = set(tree.paths)
    steps = tokens = 0
    for start in range(0, 500, 20):
        position, left = start, 19  # the first token of twenty comes from prefill
        while left:
            path: tuple[int, ...] = ()
            while len(path) < 3 and (*path, int(ranks.ranks[position, len(path)])) in nodes:
                path = (*path, int(ranks.ranks[position, len(path)]))
            emitted = min(len(path) + 1, left)
            steps, tokens, left, position = steps + 1, tokens + emitted, left - emitted, position + emitted
    assert replay(ranks, [tree, Tree(())]) == pytest.approx([tokens / steps, 1.0])


def test_parts_are_disjoint_whole_answers() -> None:
    ranks = correlated(400)
    even, odd = ranks.part(range(1), 2), ranks.part(range(1, 2), 2)
    assert len(even) == len(odd) == 200
    np.testing.assert_array_equal(even.ranks[:20], ranks.ranks[:20])
    np.testing.assert_array_equal(odd.ranks[20:40], ranks.ranks[60:80])
    assert even.ends[0] == odd.ends[0] == 20
    assert even.ends[-1] == 200


def test_a_calibration_is_saved_as_a_tree_file_and_a_table(tmp_path: Path) -> None:
    found = calibrate(correlated())
    found.save(tmp_path)
    assert Tree.load(tmp_path / "medusa_tree.json") == found.tree
    again = CalibratedTree.load(tmp_path / "medusa_calibration.json")
    assert again.tree == found.tree
    assert again.accepted is not None
    assert again.accepted == pytest.approx(found.accepted, abs=1e-6)
    assert find_calibrated(str(tmp_path / "medusa_lm_head.safetensors")) == again
    assert again.prefix(5).accepted == again.accepted[:4]
    (tmp_path / "medusa_calibration.json").write_text(json.dumps({"paths": [[0]]}))
    with pytest.raises(TreeError, match="cannot read the calibration"):
        CalibratedTree.load(tmp_path / "medusa_calibration.json")


def test_no_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="no held-out answers"):
        calibrate(Ranks(np.zeros((0, 3), dtype=np.int16), np.zeros(0, dtype=np.int64), []))


def test_the_picture_is_the_same_each_time_and_shows_every_node(tmp_path: Path) -> None:
    found = calibrate(correlated(), 20)
    lengths = {"promised": [found.expected_length(size) for size in range(1, 21)]}
    for name in ("a.svg", "b.svg", "c.png"):
        draw_tree(found.tree, found.accepted, lengths, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
