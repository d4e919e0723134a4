"""Guesses in the order of a bigram against plain loops; its file; and text that does not change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import HeadsError, TreeError
from engine.medusa import bigram as module, bigram_cpu
from engine.medusa.bigram import BIGRAM_FILE, CANDIDATES, Bigram, BigramTable, Walk, find_bigram
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Tree, default_tree
from tests import support
from tests.engine.conftest import TinyModel
from tests.support import greedy, load_heads, make_engine, run_all, save_random_heads

CPU = torch.device("cpu")
HIDDEN, VOCAB, HEADS = 16, 40, 3


def random_table(pairs: int = 300, vocab: int = VOCAB, heads: int = HEADS) -> BigramTable:
    """Different pairs of values up to some logits' size."""
    generator = torch.Generator().manual_seed(pairs)
    chosen = torch.randperm(vocab * vocab, generator=generator)[:pairs].int()
    values = (4 * torch.rand(pairs, generator=generator)).half()
    return BigramTable(chosen // vocab, chosen % vocab, values, torch.tensor([0.5, 1.0, 2.0][:heads]))


def dictionary(table: BigramTable) -> dict[tuple[int, int], float]:
    pairs = zip(table.tokens.tolist(), table.followers.tolist(), strict=True)
    return dict(zip(pairs, table.values.tolist(), strict=True))


@pytest.mark.parametrize("follow", [module.follow, bigram_cpu.follow])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("candidates", [CANDIDATES, 12])
def test_each_guess_is_the_best_behind_its_own_parent(
    tmp_path: Path, follow: Any, mapped: bool, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    file = save_random_heads(tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=HEADS)
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    tokens = list(range(VOCAB))
    if mapped:
        tensors["token_map"] = torch.randperm(VOCAB, generator=generator)[:30]
        tokens = tensors["token_map"].tolist()
        save_file(tensors, file)
    heads, table = load_heads(file, hidden_size=HIDDEN, vocab_size=VOCAB), random_table()
    tree = Tree.from_paths([*default_tree(HEADS).prefix(30).paths, (11,), (0, 0, 3)])
    bigram = Bigram(table, heads.token_map, vocab_size=VOCAB, device=CPU)
    kept = bigram.keys[bigram.keys >= 0]
    assert set((kept % VOCAB).tolist()) == set(tokens)  # others are never asked for
    drafter = HeadDrafter(heads, lambda x: x, tree, vocab_size=VOCAB, device=CPU, bigram=bigram)
    assert drafter._follow is bigram_cpu.follow
    drafter._follow = follow
    root, hidden = torch.tensor([3, 17, 39, 0]), torch.randn(4, HIDDEN, generator=generator)
    known = dictionary(table)

    def order(state: Tensor, head: int, before: int) -> list[int]:
        """Tokens as a head takes them behind a token."""
        y = tensors[f"{head}.0.linear.weight"] @ state + tensors[f"{head}.0.linear.bias"]
        logits = tensors[f"{head}.1.weight"] @ (state + y * y.sigmoid())
        best = sorted(tokens, key=lambda token: -float(logits[token]))[:candidates]
        weight = float(table.weights[head])
        return sorted(best, key=lambda t: -float(logits[t]) - weight * known.get((before, t), 0.0))

    moved = 0
    for nodes in (tree.size - 1, 9, 1, 0):
        found = drafter.guess(root, hidden, nodes)
        assert found.shape == (4, nodes)
        for b in range(4):
            at = {(): int(root[b])}
            for node, path in enumerate(tree.paths[:nodes]):
                at[path] = order(hidden[b], len(path) - 1, at[path[:-1]])[path[-1]]
                assert found[b, node] == at[path], (nodes, b, path)
                moved += at[path] != order(hidden[b], len(path) - 1, -1)[path[-1]]
    assert moved > 40  # the pairs do say something here


def test_the_hash_table_holds_every_pair_or_leaves_out_the_least() -> None:
    table = random_table(900, 60)
    known = dictionary(table)
    bigram = Bigram(table, None, vocab_size=60, device=CPU)
    everything = torch.arange(60).expand(1, -1)
    found = bigram(everything, everything)[0]
    lost = [value for (s, t), value in known.items() if float(found[s, t]) == 0.0]
    assert len(lost) < 0.02 * len(known)
    assert sum(lost) < 0.02 * sum(known.values())
    for s in range(60):
        for t in range(60):
            value = float(found[s, t])
            assert value in (0.0, known.get((s, t), 0.0))


def test_buckets_that_run_over_keep_their_largest() -> None:
    table = random_table(900, 60)
    bigram = Bigram(table, None, vocab_size=60, device=CPU)
    kept = bigram.values.clone()
    keys = table.tokens.long() * 60 + table.followers.long()
    bucket = bigram._bucket(keys)
    for b in range(len(kept)):
        wanted = table.values[bucket == b].float().sort(descending=True).values[:4]
        assert kept[b, : len(wanted)].tolist() == wanted.tolist()
        assert not kept[b, len(wanted) :].any()


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_few_pairs_are_a_table_too(pairs: int) -> None:
    table = random_table(pairs)
    bigram = Bigram(table, None, vocab_size=VOCAB, device=CPU)
    everything = torch.arange(VOCAB).expand(1, -1)
    assert float(bigram(everything, everything).sum()) == pytest.approx(float(table.values.float().sum()))


def test_a_walk_knows_where_each_node_stands() -> None:
    tree = Tree.from_paths([(0,), (0, 2), (1,), (1, 0), (0, 2, 1), (3,), (0, 0)])
    walk = Walk.of(tree, CPU)
    assert [(parents.tolist(), width, picks.tolist()) for parents, width, picks in walk.levels] == [
        ([0], 4, [0, 1, 3]),
        ([0, 1], 3, [2, 3, 0]),
        ([0], 2, [1]),
    ]
    assert walk.order.tolist() == [0, 3, 1, 4, 6, 2, 5]
    assert walk.table.tolist() == [
        [-1, 0, 2, -1, 5],
        [0, 6, -1, 1, -1],
        [2, 3, -1, -1, -1],
        [1, -1, 4, -1, -1],
    ]
    assert walk.starts.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_is_torchs_operators(dtype: torch.dtype) -> None:
    """For every prefix of a tree whose levels skip ranks; the pairs of a bucket in any of its places."""
    paths = [
        (0,),
        (0, 2),
        (1,),
        (1, 0),
        (0, 2, 1),
        (3,),
        (0, 0),
        (3, 31),
        (0, 0, 0),
        (5,),
        (5, 1),
        (3, 31, 9),
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(2 * HEADS)])
    logits = (logits / 8).view(HEADS, 2, VOCAB).to(dtype)
    values = 40 * torch.rand(1500, generator=generator)  # which tell sums apart
    table = replace(random_table(1500), values=values)
    bigram = Bigram(table, None, vocab_size=VOCAB, device=CPU)
    places = (torch.arange(4) + torch.arange(len(bigram.keys)).unsqueeze(1)) % 4
    bigram.keys, bigram.values = (tensor.gather(1, places) for tensor in (bigram.keys, bigram.values))
    for size in range(2, len(paths) + 2):
        walk = Walk.of(Tree.from_paths(paths).prefix(size), CPU)
        given = logits[: len(walk.levels)], None, bigram, torch.tensor([3, 39]), walk
        assert torch.equal(bigram_cpu.follow(*given), module.follow(*given)), size


@pytest.mark.parametrize("vocab", [VOCAB, 5])
def test_any_value_gives_each_node_a_token_and_of_equals_the_first_comes_first(vocab: int) -> None:
    logits = torch.zeros(2, 4, vocab)
    logits[:, 1], logits[:, 2, ::2], logits[:, 3] = float("-inf"), float("nan"), float("inf")
    tree = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (4,), (4, 3)])
    pairs = torch.tensor([[0, 1], [1, 3]], dtype=torch.int32)
    bigram = Bigram(BigramTable(*pairs, torch.ones(2), torch.ones(2)), None, vocab_size=vocab, device=CPU)
    walk = Walk.of(tree, CPU)
    found = bigram_cpu.follow(logits, None, bigram, torch.zeros(4, dtype=torch.int64), walk)
    best = logits[0, 0].topk(min(CANDIDATES, vocab)).indices.tolist()
    behind = [[t, *(other for other in best if other != t)] for t in (1, 3)]  # 0 comes 1, and behind that 3
    assert found[0, :5].tolist() == [*behind[0][:3], *behind[1][:2]]
    assert ((found >= 0) & (found < vocab)).all()
    for siblings in ([0, 1, 2, 5], [3, 4]):
        assert all(len(set(row)) == len(siblings) for row in found[:, siblings].tolist())


def test_it_lies_beside_the_heads(tmp_path: Path) -> None:
    table = random_table()
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=HEADS)
    assert find_bigram(str(heads), num_heads=HEADS, vocab_size=VOCAB) is None
    assert table.save(tmp_path, vocab_size=VOCAB).name == BIGRAM_FILE
    for place in (heads, tmp_path):
        again = find_bigram(str(place), num_heads=HEADS, vocab_size=VOCAB)
        assert again is not None
        assert dictionary(again) == dictionary(table)
        assert torch.equal(again.weights, table.weights)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": None}, "holds counts, followers, weights: it is no bigram table"),
        ({"weights": torch.ones(2)}, "is for 2 heads, and there are 3"),
        ({"values": torch.zeros(299)}, r"shapes \[300\] and \[299\], and counts give 300"),
        ({"followers": torch.tensor(3).int()}, "counts give 300"),
        ({"counts": torch.ones(VOCAB).int()}, "counts give 40"),
        ({"counts": torch.ones(VOCAB)}, "counts must be whole numbers from 0"),
        ({"counts": torch.tensor(7)}, "is for 1 tokens, and the model has 40"),
        ({"counts": torch.zeros(VOCAB + 1).int()}, "is for 41 tokens, and the model has 40"),
        ({"followers": torch.full((300,), VOCAB).int()}, "followers must be token ids below 40"),
        ({"followers": torch.full((300,), -1).int()}, "followers must be whole numbers from 0"),
        ({"weights": torch.full((3,), float("inf"))}, "not finite"),
        ({"values": torch.full((300,), float("nan"))}, "not finite"),
        ({"values": torch.full((300,), 1e300, dtype=torch.float64)}, "not finite"),
        ({"weights": torch.ones(3, dtype=torch.complex64)}, "not finite"),
        ({"counts": torch.full((VOCAB,), 2**62)}, "counts must be whole numbers from 0, as int32"),
        ({"followers": torch.zeros(300, dtype=torch.uint32)}, "followers must be whole numbers"),
        ({"followers": torch.zeros(300, dtype=torch.int32)}, "a pair twice"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict, reason: str) -> None:
    file = random_table().save(tmp_path, vocab_size=VOCAB)
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(HeadsError, match=reason):
        find_bigram(str(tmp_path), num_heads=HEADS, vocab_size=VOCAB)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = random_table().save(tmp_path, vocab_size=VOCAB)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(HeadsError, match="cannot read the bigram table"):
        find_bigram(str(tmp_path), num_heads=HEADS, vocab_size=VOCAB)


def test_a_tree_wider_than_the_candidates_is_refused(tmp_path: Path) -> None:
    file = save_random_heads(tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=HEADS)
    heads = load_heads(file, hidden_size=HIDDEN, vocab_size=VOCAB)
    bigram = Bigram(random_table(), None, vocab_size=VOCAB, device=CPU)
    with pytest.raises(TreeError, match="33 best of 32 tokens"):
        HeadDrafter(heads, lambda x: x, Tree.from_paths([[32]]), vocab_size=VOCAB, device=CPU, bigram=bigram)


def test_an_engine_drafts_by_the_table_beside_its_heads_and_writes_the_same(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pairs that plain decoding is known to write, nearly every draft comes true, captured or not."""
    heads = save_random_heads(tmp_path / "h.safetensors", hidden=32, vocab=61, heads=3)
    prompts = [[1, 2, 3], [7, 8], [40, 5, 6, 9]]
    requests = [greedy(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts)]
    plain = run_all(make_engine(tiny.folder, tree="off"), requests)
    pairs = sorted({pair for tokens in plain.values() for pair in pairwise(tokens)})
    steps = {}
    for name in ("heads alone", "bigram", "captured"):
        monkeypatch.setitem(support.MODE, "captured", name == "captured")
        engine = make_engine(tiny.folder, heads=str(heads), tree=32, lookup="off", max_num_seqs=3)
        requests = [greedy(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts)]
        assert run_all(engine, requests) == plain
        steps[name] = engine.stats.num_steps
        tokens, followers = (torch.tensor(side, dtype=torch.int32) for side in zip(*pairs, strict=True))
        BigramTable(tokens, followers, torch.full((len(pairs),), 50.0), torch.ones(3)).save(
            tmp_path, vocab_size=61
        )
    assert steps["captured"] == steps["bigram"] < 0.8 * steps["heads alone"]
