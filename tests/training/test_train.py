"""Whole runs on a tiny model: they learn, and a killed one goes on exactly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from tests.support import save_model, tiny_llama
from tests.training.support import random_rows, train_config, write_rows
from training.memory import MemoryPlan, plan
from training.setup import prepare, read_rows
from training.train import HEADS_FILE, Trainer, train

VOCAB = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), random_rows(60, VOCAB), VOCAB)


@pytest.fixture(scope="module")
def trained(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("run")
    return output, train(train_config(model, data, output, kl=0.0, epochs=8))


def test_heads_learn_what_follows(trained: tuple[Path, dict[str, Any]]) -> None:
    output, result = trained
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    # Untrained they are the model's own lm_head, which knows nothing of these rows: 1 of 61.
    assert result["top1"][0] > 0.5
    assert result["replay_64"] > 2.0
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert all(one <= ten for one, ten in zip(result["top1"], result["top10"], strict=True))
    assert load_file(output / HEADS_FILE)["2.0.linear.weight"].dtype == torch.float16
    assert (output / "curves.svg").read_text().startswith("<?xml")


def test_a_killed_run_goes_on_and_ends_with_the_same_heads(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    settings = {"kl": 0.5, "epochs": 3, "checkpoint_every": 7, "cache_dir": trained[0] / "cache"}
    whole = train_config(model, data, tmp_path / "whole", **settings)
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from training.config import TrainConfig; from training import train\n"
        "step = train.Trainer._step\n"
        "def slow(self):\n    time.sleep(0.02); return step(self)\n"
        "train.Trainer._step = slow\n"
        "train.train(TrainConfig.model_validate_json(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script, killed.model_dump_json()], cwd=root)
    deadline = time.monotonic() + 120
    while not (killed.output / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed.output / HEADS_FILE).exists()
    train(killed.model_copy(update={"resume": True}))

    assert (killed.output / HEADS_FILE).read_bytes() == (whole.output / HEADS_FILE).read_bytes()
    volatile = {"seconds"}
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name not in volatile}
            for line in (folder / "train.jsonl").read_text().splitlines()
        ]
        for folder in (whole.output, killed.output)
    ]
    assert logs[0] == logs[1]


def test_a_signal_ends_a_run_between_steps_and_it_can_be_resumed(
    model: Path,
    data: Path,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = train_config(model, data, tmp_path / "run", kl=0.0, epochs=3, cache_dir=trained[0] / "cache")
    real = Trainer._step

    def stopping(self: Trainer) -> tuple[torch.Tensor, int]:
        if self.state.step == 11:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Trainer, "_step", stopping)
    assert train(config)["step"] == 12
    monkeypatch.setattr(Trainer, "_step", real)
    with pytest.raises(ConfigError, match="go on with --resume"):
        train(config)
    with pytest.raises(ConfigError, match=r"lr 0\.03 then, 0\.5 now"):
        train(config.model_copy(update={"resume": True, "lr": 0.5}))
    (tmp_path / "more").mkdir()
    more = write_rows(tmp_path / "more", random_rows(5, VOCAB, seed=3), VOCAB)
    with pytest.raises(ConfigError, match="data"):
        train(config.model_copy(update={"resume": True, "data": (data, more)}))
    assert train(config.model_copy(update={"resume": True}))["step"] > 12


def test_a_run_ends_by_the_clock_with_its_rate_at_zero(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = train_config(
        model, data, tmp_path / "run", epochs=1e6, minutes=0.05, cache_dir=trained[0] / "cache"
    )
    started = time.monotonic()
    result = train(config.model_copy(update={"patience": 10**6}))
    assert 2.5 < time.monotonic() - started < 30
    lines = [json.loads(line) for line in (config.output / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result["step"]  # a last look, wherever the clock stopped it
    assert lines[-1]["lr"] < 1e-3 * config.lr
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert load_file(config.output / HEADS_FILE)


def test_a_run_whose_states_stay_in_memory_learns_the_same(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = train_config(model, data, tmp_path / "run", kl=0.0, epochs=8, cache="memory")
    result = train(config)
    assert result["step"] == trained[1]["step"]
    assert result["top1"][0] == pytest.approx(trained[1]["top1"][0], abs=0.1)
    assert not (config.output / "cache").exists()


def test_heads_learn_as_well_in_sixteen_bits(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """float16 is what a GPU takes that only emulates bfloat16: no gradient leaves its range."""
    for dtype in ("float16", "bfloat16"):
        result = train(train_config(model, data, tmp_path / dtype, kl=0.0, epochs=8, dtype=dtype))
        assert result["top1"] == pytest.approx(trained[1]["top1"], abs=0.03)


def test_rows_that_do_not_fit_the_memory_are_left_out(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from training import setup

    config = train_config(model, data, tmp_path / "run", cache="memory")
    rows, held = read_rows(config)
    plans: list[MemoryPlan] = []

    def noted(*given: Any, **values: Any) -> MemoryPlan:
        plans.append(plan(*given, **values))
        return plans[-1]

    monkeypatch.setattr(setup, "plan", noted)
    whole = prepare(config, rows, held)
    states = plans[0].parts["hidden states"]
    monkeypatch.setattr(setup, "available_bytes", lambda _: plans[0].total - states // 3)
    some = prepare(config, rows, held)
    assert plans[-1].total <= plans[0].total - states // 3
    assert some.held_rows[: len(held)].all(), "they come first"
    assert 0.6 < len(some.held) / len(whole.held) <= 2 / 3
    assert "are left out" in capsys.readouterr().out
    monkeypatch.setattr(setup, "available_bytes", lambda _: plans[0].total - states)
    with pytest.raises(ConfigError, match="does not fit"):
        prepare(config, rows, held)


def gradients(model: Path, data: Path, output: Path, **settings: Any) -> list[torch.Tensor]:
    config = train_config(model, data, output, **settings)
    trainer = Trainer(config, prepare(config, *read_rows(config)))
    trainer._step()
    return [parameter.grad.clone() for parameter in trainer.heads.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kl", [0.0, 0.3, 1.0])
def test_accumulated_batches_are_one_batch(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, kl: float
) -> None:
    settings: dict[str, Any] = {"kl": kl, "cache_dir": trained[0] / "cache"}
    whole = gradients(model, data, tmp_path / "a", **settings)
    parts = gradients(model, data, tmp_path / "b", micro_tokens=16, **settings)
    assert len(whole) == 2
    for one, other in zip(whole, parts, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_a_cache_the_backbone_runs_at_every_step(model: Path, data: Path, tmp_path: Path) -> None:
    config = train_config(
        model, data, tmp_path / "online", cache="off", kl=0.5, epochs=2, max_length=64, micro_tokens=64
    )
    result = train(config)
    assert result["step"] > 10
    lines = [json.loads(line) for line in (config.output / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # Only held-out answers are kept.
    assert json.loads((config.output / "cache" / "cache.json").read_text())["rows"] == 15


def test_a_reduced_vocabulary_is_saved_with_the_heads_and_covers_the_data(
    model: Path, data: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = train_config(
        model, data, tmp_path / "run", vocabulary=64, epochs=1, cache_dir=trained[0] / "cache"
    )
    assert "token_map" not in load_file(trained[0] / HEADS_FILE)
    assert train(config)["vocabulary"] == VOCAB  # no more than there are
    with pytest.raises(ValueError, match="from 64"):
        train_config(model, data, tmp_path, vocabulary=8)


def test_what_does_not_fit_is_refused_before_it_starts(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import setup

    config = train_config(model, data, tmp_path / "run")
    monkeypatch.setattr(setup, "available_bytes", lambda _: 100 << 20)
    with pytest.raises(ConfigError, match=r"GiB .* of 0\.10 free.*does not fit"):
        train(config)
    monkeypatch.setattr(setup, "available_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(setup, "free_disk", lambda _: 1000)
    with pytest.raises(ConfigError, match="name another place with --cache-dir"):
        train(config.model_copy(update={"cache": "on"}))
    assert not (config.output / HEADS_FILE).exists()


def test_a_quantised_backbone_asks_for_cuda(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs on CUDA only"):
        train(train_config(model, data, tmp_path, backbone_bits=4))


@pytest.mark.parametrize("cache", ["on", "memory"])
def test_too_little_time_for_hidden_states_is_said(
    model: Path, data: Path, cache: str, tmp_path: Path
) -> None:
    """Not that the data is short: it is when nothing was left out for the time."""
    config = train_config(model, data, tmp_path / cache, minutes=1e-6, cache=cache)
    with pytest.raises(
        ConfigError, match=r"time was too short.* 60 rows.* 0 training .*raise --minutes$"
    ) as told:
        train(config)
    assert "distill" not in str(told.value)
    enough = config.model_copy(update={"minutes": None, "batch_tokens": 10**6})
    with pytest.raises(ConfigError, match=r"distill more, or lower --batch-tokens"):
        train(enough)


def test_data_that_cannot_be_split_is_refused(model: Path, tmp_path: Path) -> None:
    rows = [row for row in random_rows(8, VOCAB) if row.conversation % 10_000 == 9_000]
    data = write_rows(tmp_path, rows, VOCAB)
    with pytest.raises(ConfigError, match="0 held"):
        train(train_config(model, data, tmp_path / "run"))
