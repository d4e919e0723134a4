"""Distilling a tiny model: every row once, the same rows after a kill, and what the files say."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.types import Request
from server.cli import app
from tests.support import greedy
from training import distill
from training.data import load_shards
from training.distill import DistillOptions, hash_weights, run
from training.pack import main as pack_main, pack

ROOT = Path(__file__).parents[2]


def config(model: Path, **settings: Any) -> EngineConfig:
    values: dict[str, Any] = {"max_num_seqs": 4, "block_size": 4, "device": "cpu", "max_model_len": 96}
    return EngineConfig(model=str(model), tree="off", **(values | settings))


def options(prompts: Path | None = None, **given: Any) -> DistillOptions:
    values: dict[str, Any] = {"temperature": "0,0.8", "part": "1/1", "max_tokens": 24, "shard_rows": 7}
    if prompts is not None:
        values["prompts"] = (prompts,)
    return DistillOptions.parse(**(values | given))


def items(folder: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The rows by key; fails where one occurs twice."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    keyed = {(row["conversation"], row["turn"], row["sample"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty conversations, every third of two turns."""
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [{"turns": [f"t{5 + i} t{6 + i % 7}", "t9 t10"][: 1 + (i % 3 == 0)]} for i in range(19)]
    lines.append({"turns": ["t5 " * 80]})  # too long
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def done(chat_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("done")
    run(config(chat_model), options(prompts, max_prompt_tokens=64), folder)
    return folder


def test_rows_are_the_models_own_answers(chat_model: Path, done: Path) -> None:
    rows = items(done)
    assert len(rows) == 19 + 7
    llm = LLM(config(chat_model))
    first = [row for row in rows.values() if row["temperature"] == 0.0]
    assert 0 < len(first) < len(rows)
    outputs = llm.generate([greedy(str(i), row["prompt_ids"], 24) for i, row in enumerate(first)])
    for row, output in zip(first, outputs, strict=True):
        assert row["answer_ids"] == output.token_ids
        assert row["finish_reason"] == output.finish_reason
        assert row["prompt_ids"] == llm.text.encode_chat(row["messages"])
        assert row["answer"] == llm.text.decode(row["answer_ids"])


def test_later_turns_stand_on_the_models_earlier_answers(done: Path) -> None:
    rows = items(done)
    second = [row for row in rows.values() if row["turn"] == 1]
    assert len(second) == 7
    for row in second:
        before = rows[row["conversation"], 0, 0]
        said = [*before["messages"], {"role": "assistant", "content": before["answer"]}]
        assert row["messages"] == [*said, {"role": "user", "content": "t9 t10"}]


def test_shards_hold_the_rows_in_order(done: Path) -> None:
    files = sorted(path.name for path in done.glob("*.tokens.xz"))
    assert files == [f"{i:05}.tokens.xz" for i in range(4)]
    written = list(items(done).values())
    for row, item in zip(load_shards([done]), written, strict=True):
        assert f"{row.conversation:016x}" == item["conversation"]
        assert (row.turn, row.sample, row.temperature) == (item["turn"], 0, item["temperature"])
        assert (row.prompt.tolist(), row.answer.tolist()) == (item["prompt_ids"], item["answer_ids"])


def test_the_manifest_says_what_was_done(chat_model: Path, done: Path) -> None:
    manifest = json.loads((done / "manifest.json").read_text())
    rows = items(done).values()
    assert manifest["counts"] == {
        "rows": len(rows),
        "prompt_tokens": sum(len(row["prompt_ids"]) for row in rows),
        "answer_tokens": sum(len(row["answer_ids"]) for row in rows),
        "skipped": 1,
    }
    assert manifest["weights_sha256"] == hash_weights(chat_model)
    assert sum(manifest["rows_by"]["temperature"].values()) == len(rows)
    assert (manifest["temperatures"], manifest["seed"], manifest["max_tokens"]) == ([0.0, 0.8], 0, 24)
    assert manifest["seconds"] > 0


def test_parts_are_disjoint_and_together_the_whole(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path
) -> None:
    together: dict[tuple[str, int, int], list[int]] = {}
    for part in ("1/2", "2/2"):
        folder = tmp_path / part[0]
        run(config(chat_model), options(prompts, part=part, max_prompt_tokens=64), folder)
        for key, row in items(folder).items():
            assert key not in together
            together[key] = row["answer_ids"]
    # In other company, and still the same draws.
    assert together == {key: row["answer_ids"] for key, row in items(done).items()}


def test_killed_and_resumed_no_row_is_lost_or_repeated_or_different(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "server.cli", "distill", str(chat_model), "--device", "cpu"]
    command += ["--prompts", str(prompts), "--output", str(tmp_path), "--temperature", "0,0.8"]
    command += ["--max-tokens", "24", "--max-prompt-tokens", "64", "--max-num-seqs", "1", "--shard-rows", "7"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = tmp_path / "rows.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not rows.exists() or rows.read_bytes().count(b"\n") < 9:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = rows.read_bytes()
    whole = before.count(b"\n")
    assert 9 <= whole < 26
    # As if the kill had come in the middle of a row.
    rows.write_bytes(before + before.splitlines(keepends=True)[0][:37])
    run(config(chat_model, max_num_seqs=4), options(prompts, max_prompt_tokens=64), tmp_path)
    assert rows.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert items(tmp_path) == items(done)
    assert {row.key for row in load_shards([tmp_path])} == {row.key for row in load_shards([done])}
    manifest, undisturbed = (json.loads((f / "manifest.json").read_text()) for f in (tmp_path, done))
    assert manifest["counts"] == undisturbed["counts"]


def test_a_finished_run_has_nothing_left_to_do_and_more_prompts_are_added(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path
) -> None:
    few = options(prompts, limit=5, max_prompt_tokens=64)
    run(config(chat_model), few, tmp_path)
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes())
    run(config(chat_model), few, tmp_path)
    assert hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).digest() == digest.digest()
    run(config(chat_model), options(prompts, max_prompt_tokens=64), tmp_path)
    assert items(tmp_path) == items(done)


def test_stopped_by_the_clock_the_same_command_goes_on(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path
) -> None:
    manifest = run(config(chat_model), options(prompts, max_prompt_tokens=64, minutes=1e-6), tmp_path)
    assert manifest["counts"]["rows"] < 4  # the first step was over too late
    run(config(chat_model), options(prompts, max_prompt_tokens=64, minutes=60.0), tmp_path)
    assert items(tmp_path) == items(done)
    assert {row.key for row in load_shards([tmp_path])} == {row.key for row in load_shards([done])}


def test_new_conversations_begin_together_where_a_pass_is_dear(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four slots have to be free; what is answered does not change."""
    busy: list[int] = []
    request = distill._Distiller._request

    def noted(self: distill._Distiller, talk: distill._Talk) -> Request | None:
        if (made := request(self, talk)) is not None:
            busy.append(len(self._active))
        return made

    monkeypatch.setattr(distill, "_refill", lambda _: 3)
    monkeypatch.setattr(distill._Distiller, "_request", noted)
    run(config(chat_model), options(prompts, max_prompt_tokens=64), tmp_path)
    assert items(tmp_path) == items(done)
    assert all(now == before + 1 or now <= 1 for before, now in zip([-1, *busy], busy, strict=False))
    assert busy.count(3) < len(busy) / 3


def test_another_setting_in_the_same_folder_is_refused_by_name(
    chat_model: Path, prompts: Path, done: Path
) -> None:
    with pytest.raises(ConfigError, match="was distilled with seed 0, not 1"):
        run(config(chat_model), options(prompts, max_prompt_tokens=64, seed=1), done)


def test_packing_adds_what_is_new_and_leaves_the_rest(
    chat_model: Path, prompts: Path, done: Path, tmp_path: Path
) -> None:
    shards, run_folder = tmp_path / "shards", tmp_path / "run"
    run(config(chat_model), options(prompts, limit=5, max_prompt_tokens=64), run_folder)
    few = len(items(run_folder))
    # A run under way may be in the middle of a line.
    with (run_folder / "rows.jsonl").open("ab") as file:
        file.write(b'{"conversation": "00')
    assert pack(shards, [run_folder]) == few
    first = (shards / "00000.tokens.xz").read_bytes()
    assert pack_main([str(shards), str(run_folder), str(done)]) == 0
    assert (shards / "00000.tokens.xz").read_bytes() == first
    assert pack(shards, [done]) == 0
    assert sorted(path.name for path in shards.iterdir()) == ["00000.tokens.xz", "00001.tokens.xz"]
    packed = {row.key: row.answer.tolist() for row in load_shards([shards])}
    assert packed == {row.key: row.answer.tolist() for row in load_shards([done])}


def test_packing_refuses_another_models_answers(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(tmp_path / "shards", [done]) > 0
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((done / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "weights_sha256": "0"}))
    (other / "rows.jsonl").write_bytes((done / "rows.jsonl").read_bytes())
    assert pack_main([str(tmp_path / "shards"), str(other)]) == 2
    assert "answers of other weights" in capsys.readouterr().err
    assert pack_main([str(tmp_path / "shards"), str(tmp_path)]) == 2
    assert "is no output of `medusa-serve distill`" in capsys.readouterr().err


def test_samples_of_a_prompt_differ(chat_model: Path, prompts: Path, tmp_path: Path) -> None:
    given = options(prompts, samples=3, temperature="1.5", turns=1, limit=4)
    run(config(chat_model), given, tmp_path)
    rows = items(tmp_path)
    assert len(rows) == 12
    for key in {key[0] for key in rows}:
        assert len({tuple(rows[key, 0, sample]["answer_ids"]) for sample in range(3)}) == 3


def test_the_model_asks_itself(chat_model: Path, tmp_path: Path) -> None:
    given = options(self_prompt=12, turns=2, self_prompt_temperature=1.2)
    manifest = run(config(chat_model), given, tmp_path)
    rows = items(tmp_path)
    assert manifest["counts"]["skipped"] + len({key[0] for key in rows}) >= 12
    assert any(key[1] == 1 for key in rows)
    asked = [row["messages"][-1]["content"] for row in rows.values() if row["turn"] == 0]
    assert len(set(asked)) == len(asked) >= 4
    for row in rows.values():
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * row["turn"] + [
            "user"
        ]
    # The same again: what is sampled hangs on the seed alone.
    again = tmp_path / "again"
    run(config(chat_model, max_num_seqs=2), given, again)
    assert {key: row["messages"][0] for key, row in items(again).items()} == {
        key: row["messages"][0] for key, row in rows.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to answer: give --prompts JSONL, --self-prompt N, or both"),
        (["--self-prompt", "1", "--temperature", "warm"], "--temperature must be numbers from 0 like 0,0.7"),
        (["--self-prompt", "1", "--temperature", "nan"], "--temperature must be numbers from 0 like 0,0.7"),
        (["--self-prompt", "1", "--part", "3/2"], "--part must be I/N with I from 1 to N"),
        (["--self-prompt", "1", "--samples", "2"], "--samples above 1 would repeat the answers"),
        (["--self-prompt", "1", "--top-p", "0"], "--top-p must be in (0, 1]"),
        (
            ["--self-prompt", "1", "--quantization", "int3"],
            "--quantization: Input should be 'none', 'int8' or 'fp8'",
        ),
        (["--prompts", "/none.jsonl"], "cannot read /none.jsonl"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["distill", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_is_not_there_is_an_error_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    arguments = ["distill", str(tmp_path / "model"), "--self-prompt", "1", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
