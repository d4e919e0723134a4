"""The calibrate command: from heads and held-out answers to a tree, its table, a picture and figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import MAX_TREE_NODES
from engine.devices import device_named
from engine.errors import ConfigError
from engine.medusa.bigram import BIGRAM_FILE, Bigram, BigramTable, find_bigram
from engine.medusa.calibrated import CALIBRATION_FILE, TREE_FILE
from engine.medusa.head_files import read_heads
from engine.medusa.heads import MedusaHeads
from engine.medusa.tree import Tree
from training.backbone import Backbone, make_backbone, open_base, pack_size, read_lm_head
from training.bigram import count_pairs, fit_weights
from training.calibrate import calibrate, marginal_tree
from training.data import Row, held_out, load_shards
from training.evaluate import rank_targets, replay
from training.hidden import TOP_K, cache_hidden
from training.plots import draw_tree
from training.setup import model_identity, training_dtype
from training.vocabulary import Vocabulary

__all__ = ["HeldOut", "measure"]

_FIT_TOKENS = 16384
"""Held-out tokens by which weights are chosen."""

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_CURVES = ("promised by the table", "replayed", "half and half, conditional", "half and half, marginal")
"""What the picture calls the lengths."""


def measure(
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    *,
    model: str,
    cache_dir: Path,
    share: float,
    size: int,
    bigram: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    lora: str | None = None,
) -> dict[str, Any]:
    """Calibrate heads on the held-out part of `data`; write tree, tables and picture to `output`.

    Args:
        heads: file, folder or hub id.
        data: what `distill` wrote.
        output: folder; beside the heads, `serve` finds the tree and the table there.
        model: the base model; lora: adapters in it, as for `serve`.
        cache_dir: hidden states that are there are used, missing ones added.
        share: of the conversations that count as held out; as in training, or less.
        size: most nodes of the tree, root counted.
        bigram: count pairs of tokens in the rest of the data, if there is any, and keep them where they help.

    Returns:
        Accuracies, and acceptance lengths by size: what the tree promises; replayed on answers that it was
        grown on; and, for a tree grown on one half, replayed on the other, beside the paper's marginal tree.

    Raises:
        ConfigError: no data.
        HeadsError, ModelError: heads or model cannot be used.
    """
    if not 2 <= size <= MAX_TREE_NODES:
        raise ConfigError(f"size must be from 2 to {MAX_TREE_NODES}, got {size}")
    everything = [row for row in load_shards(data) if len(row.prompt)]
    rows = [row for row in everything if held_out(row.conversation, share)]
    if not rows:
        raise ConfigError(
            f"{', '.join(map(str, data))} holds no held-out rows; distill more, or raise --held-out"
        )
    held = HeldOut(heads, rows, model=model, cache_dir=cache_dir, device=device, dtype=dtype, lora=lora)
    rest = [row for row in everything if not held_out(row.conversation, share)]
    table, pairs = _pairs(held, rest) if bigram else (None, None)
    ranks = held.ranks(bigram=pairs)
    whole = calibrate(ranks, size)
    output.mkdir(parents=True, exist_ok=True)
    whole.save(output)
    if table is None:
        (output / BIGRAM_FILE).unlink(missing_ok=True)  # the tree was grown without it
    else:
        table.save(output, vocab_size=held.vocab_size)

    grown, other = calibrate(ranks.part(range(1), 2), size), ranks.part(range(1, 2), 2)
    marginal = marginal_tree(grown, size)
    every = range(1, whole.tree.size + 1)
    lengths = {
        "promised": [whole.expected_length(n) for n in every],
        "replayed": replay(ranks, [whole.tree.prefix(n) for n in every]),
        "other_half_conditional": replay(other, [_cut(grown.tree, n) for n in every]),
        "other_half_marginal": replay(other, [_cut(marginal, n) for n in every]),
    }
    sizes = [n for n in _SIZES if n in every]
    picture = output / "medusa_tree.svg"
    draw_tree(whole.tree, whole.accepted, dict(zip(_CURVES, lengths.values(), strict=True)), picture)
    return {
        "heads": heads,
        "held_out": share,
        "held_out_answers": len(rows),
        "held_out_tokens": len(ranks),
        **{f"top{count}": [round(value, 4) for value in ranks.top(count)] for count in (1, 3, 5, 10)},
        "conditional_top1": [round(row[0], 4) for row in whole.conditional],
        "bigram_pairs": 0 if table is None else len(table.tokens),
        "bigram_weights": None if table is None else [round(w, 2) for w in table.weights.tolist()],
        "nodes": sizes,
        **{name: [round(values[n - 1], 3) for n in sizes] for name, values in lengths.items()},
        "tree": str(output / TREE_FILE),
        "table": str(output / CALIBRATION_FILE),
        "bigram": None if table is None else str(output / BIGRAM_FILE),
        "picture": str(picture),
    }


def _pairs(held: HeldOut, rest: list[Row]) -> tuple[BigramTable | None, Bigram | None]:
    """A table counted in the rest of the data, as stored and as read; None where it helps no head."""
    if not rest:
        return None, None
    table = count_pairs(rest, vocab_size=held.vocab_size, num_heads=held.num_heads)
    bigram = held.bigram(table)
    weights = fit_weights(bigram, lambda: held.ranks(bigram=bigram, limit=_FIT_TOKENS))
    if not any(weights):
        return None, None
    return replace(table, weights=torch.tensor(weights)), bigram


def _cut(tree: Tree, size: int) -> Tree:
    return tree.prefix(min(size, tree.size))


class HeldOut:
    """Heads as the engine serves them, and the hidden states of answers that they have not seen.

    Args:
        source: of the heads.
        rows: the answers.
        model: the base model.
        cache_dir: of hidden states; what is missing is computed.
        device, dtype: of the heads, see `TrainConfig`.
        lora: in the base model, as for `serve`.
    """

    def __init__(
        self,
        source: str,
        rows: list[Row],
        *,
        model: str,
        cache_dir: Path,
        device: str,
        dtype: str,
        lora: str | None = None,
    ) -> None:
        base, checkpoint = open_base(model, lora)
        self.device, self.vocab_size = device_named(device), base.vocab_size
        kind = training_dtype(dtype, base, self.device)
        tensors = read_heads(source, hidden_size=base.hidden_size, vocab_size=base.vocab_size)
        self.num_heads, self.token_map = tensors.num_heads, tensors.token_map
        pack = pack_size(self.device)

        def make() -> tuple[Backbone, Tensor]:
            longest = max(len(row.prompt) + len(row.answer) for row in rows)
            backbone = make_backbone(
                model,
                lora=lora,
                device=str(self.device),
                dtype=str(kind).removeprefix("torch."),
                bits=16,
                pack_tokens=max(pack, longest),
                longest=longest,
            )
            return backbone, read_lm_head(model, lora=lora)

        cache = cache_hidden(
            cache_dir,
            rows,
            model=model_identity(checkpoint),
            hidden_size=base.hidden_size,
            top_k=min(TOP_K, base.vocab_size),
            make_backbone=make,
            pack_tokens=pack,
        )
        heads = MedusaHeads.from_tensors(
            tensors, hidden_size=base.hidden_size, dtype=kind, device=self.device
        )
        lm_head = read_lm_head(model, lora=lora).to(device=self.device, dtype=kind)
        heads.prepare(lm_head, quantize="none")
        vocabulary = Vocabulary(tensors.token_map, base.vocab_size)
        self.ranks = partial(
            rank_targets,
            lambda hidden: heads(hidden, lambda x: x @ lm_head.T, heads.num_heads),
            cache,
            cache.select(rows),
            vocabulary.rows(self.device),
            num_heads=heads.num_heads,
            vocabulary=len(vocabulary),
            dtype=kind,
        )
        """Of all answers; `limit` and `bigram` as for `rank_targets`."""

    def bigram(self, table: BigramTable) -> Bigram:
        """A table as these heads read it."""
        return Bigram(table, self.token_map, vocab_size=self.vocab_size, device=self.device)

    def bigram_beside(self, heads: str) -> Bigram | None:
        """The one that lies beside the heads.

        Raises:
            HeadsError: it cannot be used.
        """
        table = find_bigram(heads, num_heads=self.num_heads, vocab_size=self.vocab_size)
        return None if table is None else self.bigram(table)
