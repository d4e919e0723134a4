"""Replayed tokens a step are those of the engine, on a tiny model whose heads are fitted to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import acceptance, replayed
from benchmarks.common import Item
from engine.config import EngineConfig
from engine.llm import LLM
from engine.medusa.calibrated import TREE_FILE
from tests.support import save_model, save_random_heads, tiny_llama

PATHS = [[0], [1], [2], [0, 0], [1, 0], [0, 1], [2, 0], [3], [4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of twelve tokens, so that it repeats itself, with random heads and a tree beside them."""
    model = tiny_llama(vocab_size=12)
    folder = save_model(model, tmp_path_factory.mktemp("replayed"))
    (folder / "heads").mkdir()
    save_random_heads(folder / "heads" / "heads.safetensors", hidden=model.config.hidden_size, vocab=12)
    (folder / "heads" / TREE_FILE).write_text(json.dumps(PATHS))
    return folder


def test_steps_of_an_answer() -> None:
    assert replayed.steps(np.array([2, 0, 0, 1, 0, 0])) == 2  # from 0 to 3, from 3 to 5
    assert replayed.steps(np.array([0, 0, 0])) == 2
    assert replayed.steps(np.array([9])) == 0


@pytest.mark.parametrize(("tree", "lookup"), [(8, "off"), (10, 3)])
def test_the_engine_takes_as_many_steps(
    folder: Path, tree: int, lookup: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = folder / "heads" / "heads.safetensors"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def make_llm(config: EngineConfig) -> LLM:
        llm = LLM(config)
        llm.text.tokenizer.chat_template = template
        return llm

    monkeypatch.setattr("engine.llm.LLM", make_llm)
    texts = ["t1 t2 t3", "t3 t1", "t2 t2 t5 t4", "t7 t1 t6"]
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "block_size": 4, "max_num_seqs": 4}
    rows = replayed.answers(EngineConfig(**settings, tree="off"), texts, 40)
    config = EngineConfig(**settings, tree=tree, lookup=lookup, heads=str(heads))
    nodes = replayed.head_nodes(config, tree)
    chains = replayed.lookup_counts(rows, tree - nodes)
    counted = replayed.head_counts(heads, rows, nodes, model=str(folder), cache_dir=tmp_path)
    best = [np.maximum(a, b) for a, b in zip(counted, chains, strict=True)]
    llm = make_llm(config)
    for row, text, own in zip(rows, texts, best, strict=True):
        turn = acceptance.run_turn(llm, [Item("x", text)], 40, prediction=False, salt=text)
        assert turn.answers == [row.answer.tolist()]
        assert (turn.decoded, turn.sequence_steps) == (len(row.answer) - 1, replayed.steps(own))
    found = replayed.compare(["a", "a", "b", "b"], best, chains)
    assert list(found) == ["a", "b", "all"]
    assert found["all"]["new"] >= found["all"]["old"] >= 1.0


def test_what_cannot_be_replayed_is_told(folder: Path, tmp_path: Path) -> None:
    (file := tmp_path / "p.jsonl").write_text(json.dumps({"turns": ["t1"]}))
    argv = ["--prompts", str(file), "--against", str(folder / "heads"), "--model", str(folder), "--"]
    given = ["--heads", str(folder / "heads"), "--tree", "8", "--lookup", "off"]
    _, config, plain = replayed.parse([*argv, *given])
    assert (config.tree, plain.tree, plain.heads) == (8, "off", "none")
    for options in (given[2:], given[:2], given[:4]):
        with pytest.raises(SystemExit):
            replayed.parse([*argv, *options])
