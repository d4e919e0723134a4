"""Kernels that order guesses by a bigram against torch's operators, on Triton's interpreter (or a GPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.medusa import bigram as reference, bigram_triton, heads_triton
from engine.medusa.bigram import CANDIDATES, Bigram, BigramTable, Walk
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Tree, default_tree
from tests.engine.conftest import TinyModel
from tests.engine.test_step_triton import HEADS as HEADS_ALONE, MIXED, engine_for, requests_for, run_kernels
from tests.support import load_heads, run_all, save_random_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, BATCH, TOKENS = 4, 2, 90

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary has several parts, and levels more parents than are looked at together."""
    monkeypatch.setattr(heads_triton, "_BLOCK", 64)
    monkeypatch.setattr(bigram_triton, "_PARENTS", 4)


def table(pairs: int, *, tokens: int = TOKENS) -> BigramTable:
    """Random pairs whose values, times any weight, tell candidates apart."""
    generator = torch.Generator().manual_seed(pairs)
    chosen = torch.randperm(tokens * tokens, generator=generator)[:pairs].int()
    values = 40 * torch.rand(pairs, generator=generator)
    return BigramTable(chosen // tokens, chosen % tokens, values, torch.tensor([0.5, 1.0, 2.0, 0.25]))


def different(vocab: int, dtype: torch.dtype, heads: int = HEADS) -> Tensor:
    """[heads, BATCH, vocab] logits of both signs, no two of a row alike in any type."""
    generator = torch.Generator().manual_seed(vocab)
    values = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(heads * BATCH)])
    signed = values - vocab // 2
    logits = signed / 8
    if dtype == torch.bfloat16:  # which tells fewer numbers apart: those are its bits themselves
        bits = torch.where(signed < 0, -signed - 0x8000, signed).to(torch.int16)
        logits = (bits + 0x3F80).view(torch.bfloat16)
    return logits.to(dtype).view(heads, BATCH, vocab).to(DEVICE)


def both(
    logits: Tensor, token_map: Tensor | None, pairs: BigramTable, root: Tensor, tree: Tree, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """What torch's operators and what the kernels make of it."""
    bigram = Bigram(pairs, token_map, vocab_size=vocab_size, device=DEVICE)
    # Buckets are filled from their first place on; here from any.
    places = (torch.arange(4, device=DEVICE) + torch.arange(len(bigram.keys), device=DEVICE).unsqueeze(1)) % 4
    bigram.keys, bigram.values = (tensor.gather(1, places) for tensor in (bigram.keys, bigram.values))
    walk = Walk.of(tree, DEVICE)
    wanted = reference.follow(logits, token_map, bigram, root, walk)
    return wanted, bigram_triton.follow(logits, token_map, bigram, root, walk)


@pytest.mark.parametrize(
    ("dtype", "mapped"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)]
)
def test_they_are_torchs_operators(dtype: torch.dtype, mapped: bool) -> None:
    """Over a wide tree, with every token's pairs and with none for one root."""
    vocab = 150
    tree = Tree.from_paths([*default_tree(HEADS).prefix(50).paths, (31,), (0, 0, 25), (31, 30)])
    generator = torch.Generator().manual_seed(1)
    token_map = torch.randperm(9000, generator=generator)[:vocab].to(DEVICE) if mapped else None
    pairs, vocab_size = table(6000), vocab
    if token_map is not None:
        vocab_size, names = 9000, token_map.cpu().int()
        pairs = BigramTable(names[pairs.tokens], names[pairs.followers], pairs.values, pairs.weights)
    logits = different(vocab, dtype)
    roots = torch.tensor([3, 149])  # the last has no pairs
    root = roots.to(DEVICE) if token_map is None else token_map[roots.to(DEVICE)]
    wanted, found = both(logits, token_map, pairs, root, tree, vocab_size)
    assert torch.equal(found, wanted)
    # The pairs do say something here, at each depth.
    nothing = Bigram(table(0), token_map, vocab_size=vocab_size, device=DEVICE)
    alone = reference.follow(logits, token_map, nothing, root, Walk.of(tree, DEVICE))
    for depth in range(1, HEADS + 1):
        nodes = [i for i, path in enumerate(tree.paths) if len(path) == depth]
        assert not torch.equal(found[:, nodes], alone[:, nodes])


def test_every_prefix_of_a_tree() -> None:
    """Also where nodes' order is no level's, and ranks are left out."""
    paths = [(0,), (0, 2), (1,), (1, 0), (0, 2, 1), (3,), (0, 0), (0, 2, 1, 5), (3, 31), (0, 0, 0), (5,)]
    paths += [(5, 1), (4,), (4, 0)]
    logits, root = different(70, torch.float32), torch.tensor([1, 2], device=DEVICE)
    for size in range(2, len(paths) + 2):
        tree = Tree.from_paths(paths).prefix(size)
        wanted, found = both(logits[: tree.depth], None, table(2500, tokens=70), root, tree, 70)
        assert torch.equal(found, wanted), size


@pytest.mark.parametrize(("vocab", "pairs"), [(7, 30), (CANDIDATES, 600), (33, 0), (65, 1)])
def test_small_vocabularies_and_tables(vocab: int, pairs: int) -> None:
    tree = default_tree(HEADS).prefix(20)
    tree = Tree(tuple(path for path in tree.paths if max(path) < min(vocab, 6)))
    root = torch.tensor([0, 6], device=DEVICE)
    chosen = table(pairs, tokens=min(vocab, 30))
    wanted, found = both(different(vocab, torch.float32), None, chosen, root, tree, vocab)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_value_gives_each_node_a_token_and_of_equals_the_first_comes_first(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_triton, "_BLOCK", 8)
    vocab = 37  # whose last part has five
    logits = torch.zeros(2, 5, vocab, dtype=dtype, device=DEVICE)
    logits[:, 1] = float("-inf")
    logits[:, 2] = float("nan")
    logits[:, 3] = float("inf")
    logits[:, 4, ::2] = float("nan")
    tree = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (31,), (31, 31)])
    bigram = Bigram(
        BigramTable(*torch.tensor([[9, 1], [1, 3]], dtype=torch.int32), torch.ones(2), torch.ones(2)),
        torch.arange(vocab, device=DEVICE),
        vocab_size=vocab,
        device=DEVICE,
    )
    root = torch.full((5,), 9, device=DEVICE)
    for token_map in (None, torch.arange(vocab, device=DEVICE)):
        found = bigram_triton.follow(logits, token_map, bigram, root, Walk.of(tree, DEVICE))
        # Behind 9 comes 1, and behind that 3; all else is as large.
        assert found[0].tolist() == [1, 0, 2, 3, 0, 0, 31, 31]
        assert ((found >= 0) & (found < vocab)).all()
        for siblings in ([0, 1, 2, 6], [3, 4]):
            assert all(len(set(row)) == len(siblings) for row in found[:, siblings].tolist())


def test_whole_heads_guess_the_same(tmp_path: Path) -> None:
    """And one drafter goes on with the tables it has when the kernels take over."""
    file = save_random_heads(tmp_path / "h.safetensors", hidden=16, vocab=150, heads=HEADS, layers=2)
    heads = load_heads(file, hidden_size=16, vocab_size=150, device=DEVICE)
    bigram = Bigram(table(6000), None, vocab_size=150, device=DEVICE)
    drafter = HeadDrafter(
        heads, lambda x: x, default_tree(HEADS), vocab_size=150, device=DEVICE, bigram=bigram
    )
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    root = torch.tensor([1, 5, 80, 120], device=DEVICE)
    wanted = {nodes: drafter.guess(root, hidden, nodes) for nodes in (40, 3, 1)}
    drafter.fuse_triton()
    for nodes, tokens in wanted.items():
        assert torch.equal(drafter.guess(root, hidden, nodes), tokens)
    assert drafter.guess(root, hidden, 0).shape == (4, 0)
    with pytest.raises(ValueError, match="by the root, which was not given"):
        drafter.guess(None, hidden, 3)


def test_steps_draft_what_torchs_operators_do(
    narrow: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines with a table beside the heads, state by state and trace by trace."""
    heads = tmp_path / "heads.safetensors"
    heads.write_bytes(narrow.heads.read_bytes())
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randperm(12 * 12, generator=generator)[:100].int()
    values = torch.rand(100, generator=generator)
    BigramTable(chosen // 12, chosen % 12, values, torch.ones(4)).save(tmp_path, vocab_size=12)
    settings = HEADS_ALONE | {"heads": str(heads)}
    steps, _ = run_kernels(narrow, settings, requests_for(MIXED[:1]))
    assert steps > 5
    # A kernel that gathers the roots is launched for a bigram, and for heads alone not.
    given, guess = [], HeadDrafter.guess

    def noted(drafter: HeadDrafter, root: Tensor | None, hidden: Tensor, nodes: int) -> Tensor:
        given.append(root is not None)
        return guess(drafter, root, hidden, nodes)

    monkeypatch.setattr(HeadDrafter, "guess", noted)
    for found in (heads, narrow.heads):
        engine = engine_for(narrow.folder, kernels=True, tree=3, heads=str(found))
        run_all(engine, requests_for(MIXED[:1])[:1])
        assert set(given) == {found == heads}
        given.clear()
