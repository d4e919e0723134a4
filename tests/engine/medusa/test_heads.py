"""Head files: what loads drafts what a plain reference computes; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError, HeadsError, TreeError
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Tree, default_tree
from tests.engine.conftest import TinyModel
from tests.support import load_heads, make_engine, save_random_heads

CPU = torch.device("cpu")
HIDDEN, VOCAB = 16, 40


def load(file: Path):
    return load_heads(file, hidden_size=HIDDEN, vocab_size=VOCAB)


def reference_logits(
    tensors: dict, x: torch.Tensor, head: int, layers: int, shared: torch.Tensor
) -> torch.Tensor:
    for j in range(layers):
        x = x + F.silu(F.linear(x, tensors[f"{head}.{j}.linear.weight"], tensors[f"{head}.{j}.linear.bias"]))
    return F.linear(x, tensors.get(f"{head}.{layers}.weight", shared))


@pytest.mark.parametrize(("own", "layers"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 2)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_drafts_are_the_heads_best_guesses(tmp_path: Path, own: bool, layers: int, suffix: str) -> None:
    saved = save_random_heads(
        tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=3, layers=layers, own_lm_head=own
    )
    tensors = load_file(saved)
    file = saved
    if suffix == ".pt":
        file = tmp_path / "medusa_lm_head.pt"
        torch.save(tensors, file)
    heads = load(file if suffix == ".safetensors" else tmp_path)  # a folder is searched
    assert heads.num_heads == 3
    shared = torch.randn(VOCAB, HIDDEN)
    tree = default_tree(3).prefix(30)
    drafter = HeadDrafter(heads, lambda h: F.linear(h, shared), tree, vocab_size=VOCAB, device=CPU)
    root, hidden = torch.zeros(2, dtype=torch.int64), torch.randn(2, HIDDEN)
    for nodes in (29, 8, 0):
        guesses = drafter.guess(root, hidden, nodes)
        assert guesses.shape == (2, nodes)
        for b in range(2):
            for node, path in enumerate(tree.paths[:nodes]):
                logits = reference_logits(tensors, hidden[b], len(path) - 1, layers, shared)
                assert guesses[b, node] == logits.argsort(descending=True)[path[-1]]


def broken(tmp_path: Path, **changes) -> Path:
    file = save_random_heads(tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=2)
    tensors = load_file(file)
    for name, tensor in changes.items():
        name = name.replace("_", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"1_0_linear_bias": None}, r"1\.0\.linear\.bias is missing"),
        ({"0_0_linear_weight": torch.zeros(8, 8)}, r"0\.0\.linear\.weight has shape \[8, 8\]"),
        ({"1_1_weight": torch.zeros(39, HIDDEN)}, r"1\.1\.weight has shape"),
        ({"1_1_weight": None}, r"do not: 1\.1\.weight"),
        ({"surprise": torch.zeros(1)}, "unexpected tensors surprise"),
        ({"1_0_linear_weight": None}, "head 1 has layers"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(HeadsError, match=reason):
        load(broken(tmp_path, **changes))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    file = save_random_heads(tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HeadsError, match="complete"):
        load(file)
    with pytest.raises(HeadsError, match="does not exist"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadsError, match="holds no head file"):
        load(tmp_path / "empty")
    evil = tmp_path / "evil.pt"
    torch.save({"0.0.linear.weight": Path}, evil)
    with pytest.raises(HeadsError, match="cannot read"):
        load(evil)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(HeadsError, match="Medusa head file"):
        load(tmp_path / "other.safetensors")


def test_a_tree_deeper_or_wider_than_the_heads_is_refused(tmp_path: Path) -> None:
    file = save_random_heads(tmp_path / "h.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=1)
    with pytest.raises(TreeError, match="2 deep and there are 1"):
        HeadDrafter(load(file), lambda h: h, Tree.from_paths([[0], [0, 0]]), vocab_size=VOCAB, device=CPU)
    with pytest.raises(TreeError, match="41 best of 40"):
        HeadDrafter(load(file), lambda h: h, Tree.from_paths([[40]]), vocab_size=VOCAB, device=CPU)


def test_heads_tree_and_lookup_go_together_or_say_so(tiny: TinyModel, tmp_path: Path) -> None:
    def info(**settings: object):
        return make_engine(tiny.folder, **settings).info

    heads = str(tiny.heads)
    with pytest.raises(ConfigError, match="needs Medusa heads or the lookup"):
        info(tree=8, lookup="off")
    with pytest.raises(ConfigError, match="chain of 29 nodes, and lookup allows 16"):
        info(tree=30)
    with pytest.raises(ConfigError, match=r"lookup 8 does not fit: .* gets 3 nodes, a third; .* --tree 25$"):
        info(heads=heads, tree=10, lookup=8)
    assert info(heads=heads, tree=25, lookup=8).tree_size == 25
    with pytest.raises(ConfigError, match="tree_file has no effect"):
        info(heads=heads, tree="off", tree_file="absent.json")
    with pytest.raises(ConfigError, match="tree_file needs Medusa heads"):
        info(tree_file="absent.json")
    with pytest.raises(ConfigError, match="lookup has no effect"):
        info(tree="off", lookup=8)
    assert info(tree="off", heads=heads).num_heads == 0
    assert (info(tree="off").tree_size, info(tree="off").lookup) == (1, 0)
    assert (info(tree=9, lookup=8).tree_size, info(tree=9, lookup=8).num_heads) == (9, 0)
    assert (info().tree, info().tree_size, info().lookup) == ("auto", 17, 16)
    assert info(lookup="off").tree_size == 1
    assert info(heads=heads).tree_size == 64
    one = save_random_heads(tmp_path / "one.safetensors", hidden=32, vocab=61, heads=1)
    assert info(heads=str(one), lookup="off").tree_size == 11  # all that one head offers
    with pytest.raises(
        ConfigError, match=r"tree 30 takes 21 nodes .*, and 1 heads offer 11; pass --tree 16 or"
    ):
        info(heads=str(one), tree=30)
    assert info(heads=str(one), tree=16).tree_size == 16
