"""The shards in the repository: whole, small, of the embedded model, and split as documented."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.medusa.bigram import find_bigram
from training.bigram import count_pairs
from training.config import TrainConfig
from training.data import SHARD_SUFFIX, Row, held_out, load_shards, read_shard

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "smollm2-135m" / "data"
MADE = ROOT / "benchmarks" / "results" / "gpu-heads-nvidia-h100-80gb-hbm3.json"
CALIBRATED = ROOT / "benchmarks" / "results" / "calibrate-smollm2-135m.json"
IM_START, EOS, VOCAB = 1, 2, 49152  # SmolLM2's


@cache
def shipped_rows() -> list[Row]:
    return load_shards([FOLDER])


def test_shards_are_small_and_of_one_model() -> None:
    files = sorted(FOLDER.glob("*" + SHARD_SUFFIX))
    assert sum(file.stat().st_size for file in files) <= 10 << 20
    headers = [read_shard(file)[0] for file in files]
    assert {(header["model"], header["vocab_size"]) for header in headers} == {("smollm2-135m", VOCAB)}
    assert len({header["weights_sha256"] for header in headers}) == 1


def test_rows_are_chats_and_as_many_as_the_readme_says() -> None:
    rows = shipped_rows()
    for row in rows:
        assert row.prompt[0] == IM_START
        assert 0 < len(row.answer) <= 256
        assert min(row.prompt.min(), row.answer.min()) >= 0
        assert max(row.prompt.max(), row.answer.max()) < VOCAB
        assert EOS not in row.answer[:-1]
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = re.search(r"([\d,]+) rows, ([\d,]+) answer tokens", text)
    apart = re.search(r"held_out`\): ([\d,]+) rows, ([\d,]+) tokens", text)
    assert found is not None
    assert apart is not None
    assert [int(number.replace(",", "")) for number in (*found.groups(), *apart.groups())] == [
        len(rows),
        sum(len(row.answer) for row in rows),
        sum(held_out(row.conversation) for row in rows),
        sum(len(row.answer) for row in rows if held_out(row.conversation)),
    ]
    share = sum(held_out(row.conversation) for row in rows) / len(rows)
    assert share == pytest.approx(0.05, abs=0.01)


def test_the_shipped_pairs_are_those_of_the_answers_that_are_not_held_out() -> None:
    found = json.loads(CALIBRATED.read_text(encoding="utf-8"))
    rows = [row for row in shipped_rows() if not held_out(row.conversation, found["held_out"])]
    counted = count_pairs(rows, vocab_size=VOCAB, num_heads=4)
    shipped = find_bigram(str(FOLDER.parent), num_heads=4, vocab_size=VOCAB)
    assert shipped is not None
    assert torch.equal(shipped.tokens, counted.tokens)
    assert torch.equal(shipped.followers, counted.followers)
    assert torch.equal(shipped.values, counted.values)
    assert shipped.weights.tolist() == pytest.approx(found["bigram_weights"])
    card = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert f"A table of {found['bigram_pairs']:,} pairs" in card
    assert len(shipped.tokens) == found["bigram_pairs"]
    at = dict(zip(found["nodes"], found["other_half_conditional"], strict=True))
    lengths = " | ".join(f"{at[nodes]:.2f}" for nodes in (2, 4, 8, 16, 32, 64))
    assert f"| acceptance length | {lengths} |" in card


def test_the_shipped_heads_are_measured_on_what_they_held_out() -> None:
    """The model card, the data's README, the run that made the heads and its answers agree."""
    parts = json.loads(MADE.read_text(encoding="utf-8"))["parts"]
    share = parts["train"]["settings"]["held_out"]
    rows = [row for row in shipped_rows() if held_out(row.conversation, share)]
    tokens = sum(len(row.answer) for row in rows)
    measured = parts["calibrate"]["new"]
    assert (measured["held_out_answers"], measured["held_out_tokens"]) == (len(rows), tokens)
    card = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert f"On {len(rows)} held-out prompts ({tokens:,} tokens;" in card
    assert f"--held-out {share}" in card
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for each in (share, TrainConfig.model_fields["held_out"].default):
        assert f"{each:.0%}".replace("%", " % of the conversations by their hash") in text
