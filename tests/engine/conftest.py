"""Tiny models shared by the engine's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine import warmup
from tests.interpreter import quicken
from tests.support import save_model, save_random_heads, tiny_llama

# The models here are so small that a second thread costs more than it does, far more on a busy machine.
torch.set_num_threads(1)
quicken()
# Hundreds of engines are measured here, and what steps of toys take matters in no test.
MEASURED = {name: getattr(warmup, name) for name in ("_ROUNDS", "_IN_A_ROW", "_NODES", "_BATCHES")}
"""What is measured where nobody asks for less."""

warmup._WARM_S, warmup._ROUNDS, warmup._IN_A_ROW = 0.02, 1, 1
warmup._NODES, warmup._BATCHES = (1, 8, 64), (1, 2, 8)

compiles = pytest.mark.skipif(torch.cuda.is_available(), reason="only compiles, which needs no GPU")
"""On a test of which a GPU learns nothing, and which would take its time."""


@dataclass(frozen=True)
class TinyModel:
    """A model, its folder, and random heads for it."""

    reference: LlamaForCausalLM
    folder: Path
    heads: Path
    tree_file: Path | None = None


def _make(folder: Path, **config: object) -> TinyModel:
    reference = tiny_llama(**config)
    save_model(reference, folder)
    hidden, vocab = reference.config.hidden_size, reference.config.vocab_size
    return TinyModel(
        reference, folder, save_random_heads(folder / "heads.safetensors", hidden=hidden, vocab=vocab)
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """61 tokens: random heads are rarely right."""
    return _make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """12 tokens: a wide tree of random guesses is often right, so long runs are accepted."""
    return _make(tmp_path_factory.mktemp("narrow"), vocab_size=12)


@pytest.fixture(scope="session")
def certain(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """4 tokens and a tree of all of their sequences, level by level: 64 nodes accept two or three."""
    model = _make(tmp_path_factory.mktemp("certain"), vocab_size=4)
    paths = [path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)][:63]
    tree_file = model.folder / "tree.json"
    tree_file.write_text(json.dumps(paths))
    return TinyModel(model.reference, model.folder, model.heads, tree_file)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many of torch's threads run the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
