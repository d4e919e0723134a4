"""What calibrate promises from cached states is what the engine does."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.types import Request, SamplingParams
from tests.support import save_model, save_random_heads, tiny_llama, tiny_model
from tests.training.support import random_rows, train_config, write_rows
from training.cli import app
from training.data import Row
from training.measure import measure
from training.train import HEADS_FILE, train


@pytest.mark.parametrize(
    ("own_lm_head", "bigram", "scaling"),
    [(True, False, 1.0), (False, False, 1.0), (True, True, 3.0), (False, True, 3.0)],
)
def test_replayed_lengths_are_those_of_the_engine(
    tmp_path: Path, own_lm_head: bool, bigram: bool, scaling: float
) -> None:
    """Twelve tokens: random heads are often right. Greedy, heads alone, or with pairs from other answers.

    A Granite's logits are divided, and what pairs add to them is weighed against them as they are then.
    """
    vocab = 12
    model = tiny_llama if scaling == 1.0 else partial(tiny_model, "granite", logits_scaling=scaling)
    folder = save_model(model(vocab_size=vocab, max_position_embeddings=128), tmp_path / "model")
    heads = save_random_heads(
        tmp_path / "heads.safetensors", hidden=32, vocab=vocab, heads=3, own_lm_head=own_lm_head
    )
    settings = {"model": str(folder), "block_size": 4, "device": "cpu", "lookup": "off", "max_num_seqs": 4}
    plain = LLM(EngineConfig(**settings, tree="off"))
    prompts = [row.prompt.tolist() for row in random_rows(36 if bigram else 12, vocab)]
    requests = [
        Request(str(i), tuple(prompt), SamplingParams(temperature=0.0, max_tokens=40))
        for i, prompt in enumerate(prompts)
    ]
    rows = [
        Row(
            index * 10_000 + (9_000 if index >= 12 else 0),  # of which those are not held out
            0,
            0,
            0.0,
            np.array(prompt),
            np.array(output.token_ids),
        )
        for index, (prompt, output) in enumerate(zip(prompts, plain.generate(requests), strict=True))
    ]
    data = write_rows(tmp_path / "data", rows, vocab)
    calibrated = partial(
        measure,
        str(heads),
        (data,),
        tmp_path,
        model=str(folder),
        cache_dir=tmp_path / "cache",
        share=0.5,
    )
    result = calibrated(size=24)
    assert (result["bigram_pairs"] > 0) == bigram
    assert (tmp_path / "medusa_bigram.safetensors").is_file() == bigram
    with_heads = LLM(
        EngineConfig(**settings, heads=str(heads), tree=16, tree_file=str(tmp_path / "medusa_tree.json"))
    )
    del requests[12:], rows[12:]
    outputs = with_heads.generate(requests)
    steps = sum(output.num_steps for output in outputs)
    tokens = sum(output.num_decoded for output in outputs)
    assert [output.token_ids for output in outputs] == [row.answer.tolist() for row in rows]
    replayed = dict(zip(result["nodes"], result["replayed"], strict=True))
    assert tokens / steps > 1.3
    assert replayed[16] == pytest.approx(tokens / steps, abs=0.001)
    assert replayed[1] == 1.0
    assert (tmp_path / "medusa_tree.svg").is_file()
    assert calibrated(size=2, bigram=False)["bigram"] is None
    assert not (tmp_path / "medusa_bigram.safetensors").exists()  # the tree is not grown with what was there


def test_calibrate_measures_on_what_training_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another share is asked for: the heads know the rest. Nothing recorded: the default."""
    shares: list[float] = []

    def measured(*_: Any, share: float, **__: Any) -> dict[str, Any]:
        shares.append(share)
        return {}

    def calibrate(*options: str) -> Result:
        return CliRunner().invoke(app, ["calibrate", "--data", str(data), *options])

    monkeypatch.setattr("training.measure.measure", measured)
    folder = save_model(tiny_llama(), tmp_path / "model")
    data = write_rows(tmp_path / "data", random_rows(40, 61), 61)
    run = tmp_path / "run"
    train(train_config(folder, data, run, epochs=1, held_out=0.02))
    (tmp_path / "moved").mkdir()
    alone = Path(shutil.copy(run / HEADS_FILE, tmp_path / "moved"))
    elsewhere = ("--output", str(tmp_path / "tree"))
    for heads in (run, run / HEADS_FILE, alone):
        assert calibrate("--heads", str(heads), *elsewhere).exit_code == 0
    unseen = calibrate("--heads", str(run), "--held-out", "0.01")
    assert (unseen.exit_code, unseen.stderr) == (0, "")
    assert calibrate("--heads", "some/hub-id", *elsewhere).exit_code == 0
    assert shares == [0.02, 0.02, 0.05, 0.01, 0.05]
    known = "trained with --held-out 0.02, so of 0.03 they know a part"
    assert known in " ".join(calibrate("--heads", str(run), "--held-out", "0.03").output.split())
    assert shares.pop() == 0.03
    (run / "checkpoint.pt").write_bytes(b"cut")
    assert "say --held-out" in " ".join(calibrate("--heads", str(run)).output.split())
    assert calibrate("--heads", str(run), "--held-out", "0.03").exit_code == 0
    assert len(shares) == 6


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    rows = [row for row in random_rows(8, 12) if row.conversation % 10_000 == 9_000]
    data = write_rows(tmp_path / "data", rows, 12)
    settings = {"model": "m", "cache_dir": tmp_path, "share": 0.1}
    with pytest.raises(ConfigError, match="no held-out rows"):
        measure("heads", (data,), tmp_path, size=64, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size must be from 2 to 64"):
        measure("heads", (data,), tmp_path, size=65, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--device", "mps"), "device 'mps' is not supported; use 'cpu' or 'cuda'"),
        (("--device", "cpu", "--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_said_in_one_line(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    folder = save_model(tiny_llama(), tmp_path / "model")
    data = write_rows(tmp_path / "data", random_rows(40, 61), 61)
    asked = ["calibrate", str(folder), "--heads", str(tmp_path), "--data", str(data), "--held-out", "1"]
    result = CliRunner().invoke(app, [*asked, *options])
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"error: {reason}")
