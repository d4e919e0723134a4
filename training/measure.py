"""The calibrate command: from heads and held-out answers to a tree, its table, a picture and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import MAX_TREE_NODES
from engine.devices import device_named
from engine.errors import ConfigError
from engine.medusa.calibrated import CALIBRATION_FILE, TREE_FILE
from engine.medusa.head_files import read_heads
from engine.medusa.heads import MedusaHeads
from engine.medusa.tree import Tree
from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint, resolve_model
from training.backbone import Backbone, make_backbone, pack_size, read_lm_head
from training.calibrate import calibrate, marginal_tree
from training.data import Row, held_out, load_shards
from training.evaluate import Ranks, rank_targets, replay
from training.hidden import TOP_K, cache_hidden
from training.plots import draw_tree
from training.setup import model_identity, training_dtype
from training.vocabulary import Vocabulary

__all__ = ["measure", "ranks_of"]

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def measure(
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    *,
    model: str,
    cache_dir: Path,
    share: float,
    size: int,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Calibrate heads on the held-out part of `data`; write tree, table and picture to `output`.

    Args:
        heads: file, folder or hub id.
        data: what `distill` wrote.
        output: folder; beside the heads, `serve` finds the tree and the table there.
        model: the base model.
        cache_dir: hidden states that are there are used, missing ones added.
        share: of the conversations that count as held out; as in training, or less.
        size: most nodes of the tree, root counted.

    Returns:
        Accuracies, and acceptance lengths by size: what the tree promises; replayed on answers that it was
        grown on; and, for a tree grown on one half, replayed on the other, beside the paper's marginal tree.

    Raises:
        ConfigError: no data.
        HeadsError, ModelError: heads or model cannot be used.
    """
    if not 2 <= size <= MAX_TREE_NODES:
        raise ConfigError(f"size must be from 2 to {MAX_TREE_NODES}, got {size}")
    rows = [row for row in load_shards(data) if held_out(row.conversation, share) and len(row.prompt)]
    if not rows:
        raise ConfigError(
            f"{', '.join(map(str, data))} holds no held-out rows; distill more, or raise --held-out"
        )
    ranks = ranks_of(heads, rows, model=model, cache_dir=cache_dir, device=device, dtype=dtype)
    whole = calibrate(ranks, size)
    output.mkdir(parents=True, exist_ok=True)
    whole.save(output)

    grown, other = calibrate(ranks.part(range(1), 2), size), ranks.part(range(1, 2), 2)
    sizes = [n for n in _SIZES if n <= whole.tree.size]
    lengths = {
        "promised": [whole.expected_length(n) for n in sizes],
        "replayed": replay(ranks, [whole.tree.prefix(n) for n in sizes]),
        "other_half_conditional": replay(other, [_cut(grown.tree, n) for n in sizes]),
        "other_half_marginal": replay(other, [_cut(marginal_tree(grown, size), n) for n in sizes]),
    }
    everything = [whole.tree.prefix(n) for n in range(1, whole.tree.size + 1)]
    curves = {
        "promised by the table": [whole.expected_length(n) for n in range(1, whole.tree.size + 1)],
        "replayed": replay(ranks, everything),
        "half and half, conditional": replay(other, [_cut(grown.tree, tree.size) for tree in everything]),
        "half and half, marginal": replay(
            other, [_cut(marginal_tree(grown, size), tree.size) for tree in everything]
        ),
    }
    picture = output / "medusa_tree.svg"
    draw_tree(whole.tree, whole.accepted, curves, picture)
    return {
        "heads": heads,
        "held_out": share,
        "held_out_answers": len(rows),
        "held_out_tokens": len(ranks),
        **{f"top{count}": [round(value, 4) for value in ranks.top(count)] for count in (1, 3, 5, 10)},
        "conditional_top1": [round(row[0], 4) for row in whole.conditional],
        "nodes": sizes,
        **{name: [round(value, 3) for value in values] for name, values in lengths.items()},
        "tree": str(output / TREE_FILE),
        "table": str(output / CALIBRATION_FILE),
        "picture": str(picture),
    }


def _cut(tree: Tree, size: int) -> Tree:
    return tree.prefix(min(size, tree.size))


def ranks_of(source: str, rows: list[Row], *, model: str, cache_dir: Path, device: str, dtype: str) -> Ranks:
    """Ranks of the rows' tokens under the heads as the engine serves them."""
    folder = resolve_model(model)
    base, checkpoint = ModelConfig.from_folder(folder), Checkpoint(folder)
    on = device_named(device)
    kind = training_dtype(dtype, base, on)
    tensors = read_heads(source, hidden_size=base.hidden_size, vocab_size=base.vocab_size)

    pack = pack_size(on)

    def make() -> tuple[Backbone, Tensor]:
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        backbone = make_backbone(
            model,
            device=str(on),
            dtype=str(kind).removeprefix("torch."),
            bits=16,
            pack_tokens=max(pack, longest),
            longest=longest,
        )
        return backbone, read_lm_head(model)

    cache = cache_hidden(
        cache_dir,
        rows,
        model=model_identity(checkpoint),
        hidden_size=base.hidden_size,
        top_k=min(TOP_K, base.vocab_size),
        make_backbone=make,
        pack_tokens=pack,
    )
    heads = MedusaHeads.from_tensors(tensors, hidden_size=base.hidden_size, dtype=kind, device=on)
    token_map = tensors.token_map
    lm_head = read_lm_head(model).to(device=on, dtype=kind)
    heads.prepare(lm_head, quantize="none")
    vocabulary = Vocabulary(token_map, base.vocab_size)
    return rank_targets(
        lambda hidden: heads(hidden, lambda x: x @ lm_head.T, heads.num_heads),
        cache,
        cache.select(rows),
        vocabulary.rows(on),
        num_heads=heads.num_heads,
        vocabulary=len(vocabulary),
        dtype=kind,
    )
