"""`medusa-serve bench`: what it prints, what it counts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from server.bench import Workload, measure, read_prompts, run, settings_given
from server.cli import app
from tests.support import greedy, save_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("bench"))


def test_the_last_line_is_json_with_a_row_per_concurrency(folder: Path) -> None:
    arguments = ["bench", str(folder), "--concurrency", "1,3", "--rounds", "2", "--tree", "off"]
    arguments += ["--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "5", "--block-size", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [row["streams"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert len(row["tokens_per_s_rounds"]) == 2
        assert row["acceptance_length"] == 1.0
        assert row["step_ms"] > 0
        assert row["ttft_ms"] > 0
    assert found["settings"] == {"model": str(folder), "tree": "off", "device": "cpu", "block_size": 4}
    assert found["hardware"]["cores"] >= 1


def test_measure_counts_what_ran(folder: Path) -> None:
    llm = LLM(EngineConfig(model=str(folder), device="cpu", tree="off", block_size=4))
    found = measure(llm, [greedy("a", [1, 2, 3], 6), greedy("b", [4, 5], 9)])
    assert found.tokens == 15
    assert found.decoded == found.sequence_steps == 13  # all but the two that prefill drew
    assert len(found.ttft_s) == len(found.tpot_s) == 2
    assert len(found.steps_s) == 5  # steps with both of them
    assert max(found.ttft_s) < found.seconds


def test_real_prompts_and_wrong_ones(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"turns": ["t1 t2", "later"]}\n\n{"prompt": "t3"}\n')
    assert read_prompts(file) == ["t1 t2", "t3"]
    for text in ('{"text": "t1"}', "no json", '{"turns": []}', "3"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="line 1"):
            read_prompts(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        read_prompts(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "a"], "error: --concurrency must be numbers"),
        (["--concurrency", "0"], "error: --concurrency must be numbers"),
        (["--concurrency", "64"], "error: --concurrency 64 needs --max-num-seqs 64"),
        (["--rounds", "0"], "error: --rounds must be at least 1"),
        (["--tree", "65"], "error: --tree: "),
        (["--prompts", "/none.jsonl"], "error: cannot read /none.jsonl"),
    ],
)
def test_a_bad_option_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def test_a_variable_that_nothing_reads_is_told() -> None:
    result = CliRunner().invoke(app, ["bench", "--rounds", "0"], env={"MEDUSA_TREES": "8"})
    assert result.stderr.startswith("warning: nothing reads MEDUSA_TREES; MEDUSA_TREE is meant?\nerror: ")


def test_a_prompt_that_does_not_fit_is_told(folder: Path) -> None:
    arguments = ["bench", str(folder), "--device", "cpu", "--tree", "off", "--max-model-len", "16"]
    result = CliRunner().invoke(app, [*arguments, "--prompt-tokens", "30"])
    assert result.exit_code == 1
    assert "the context holds 16 tokens" in result.stderr


def test_settings_given_leaves_defaults_out() -> None:
    assert settings_given(EngineConfig(tree=8)) == {"model": "smollm2-135m", "tree": 8}


def test_too_many_at_once_is_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs 40"):
        run(EngineConfig(model="/nowhere"), Workload(concurrency=(1, 40)))
