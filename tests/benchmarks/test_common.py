import json
import os
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import (
    add_model,
    bootstrap_interval,
    cpu_seconds,
    exact_prompt,
    kv_blocks,
    metrics,
    new_parser,
    positive,
    print_result,
    prompt_ids,
)
from engine.config import EngineConfig

PAGE = """\
# HELP medusa_kv_blocks K/V blocks by state.
# TYPE medusa_kv_blocks gauge
medusa_kv_blocks{state="free"} 90.0
medusa_kv_blocks{state="cached"} 6.0
medusa_kv_blocks{state="used"} 4.0
medusa_acceptance_length_bucket{le="+Inf"} 12.0
medusa_generation_tokens_total 1e+03
"""


class WordTokenizer:
    """One token per word or mark, and a template of ten."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: Any) -> list[int]:
        return list(range(10 + len(conversation[0]["content"].replace("!", " !").split())))


def test_metrics_page() -> None:
    page = metrics(PAGE)
    assert page["medusa_generation_tokens_total"] == 1000
    assert page['medusa_acceptance_length_bucket{le="+Inf"}'] == 12
    assert kv_blocks(page) == {"free": 90, "cached": 6, "used": 4}
    with pytest.raises(RuntimeError, match="free, cached, used"):
        kv_blocks({})


def test_a_result_is_a_line_and_a_file_if_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"benchmark": "é", "rows": [1, 2]}
    print_result(result)
    assert not list(tmp_path.iterdir())
    print_result(result, tmp_path / "result.json")
    assert capsys.readouterr().out == 2 * '{"benchmark": "é", "rows": [1, 2]}\n'
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == result


def test_options_that_commands_share(capsys: pytest.CaptureFixture[str]) -> None:
    parser = new_parser("One line.\n\n    python -m it\n")
    add_model(parser)
    parser.add_argument("--rounds", type=positive, default=3)
    assert "\n    python -m it\n" in parser.format_help()
    given = parser.parse_args([])
    assert (given.model, given.rounds) == (EngineConfig().model, 3)
    assert parser.parse_args(["--rounds", "1"]).rounds == 1
    for wrong in ("0", "-2", "many"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rounds", wrong])
    assert "argument --rounds: must be at least 1" in capsys.readouterr().err


def test_bootstrap_interval() -> None:
    rng = random.Random(1)
    values = [rng.gauss(5.0, 1.0) for _ in range(60)]
    low, high = bootstrap_interval(values, statistics.fmean, resamples=2000)
    # The standard error is 1/sqrt(60), about 0.13; the interval is about two of them to either side.
    assert low < statistics.fmean(values) < high
    assert 0.3 < high - low < 0.75
    assert bootstrap_interval([2.0] * 5, resamples=100) == (2.0, 2.0)


@pytest.mark.parametrize("length", [20, 37, 60])
def test_exact_prompt(length: int) -> None:
    tokenizer = WordTokenizer()
    prompts = {exact_prompt(tokenizer, length, random.Random(seed)) for seed in range(5)}
    assert {len(prompt_ids(tokenizer, prompt)) for prompt in prompts} == {length}
    assert len(prompts) == 5
    with pytest.raises(ValueError, match="no room"):
        exact_prompt(tokenizer, 12, random.Random(0))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU times are read from /proc")
def test_a_threads_cpu_time_is_the_processs_and_not_the_main_threads() -> None:
    def seconds(*, main_thread: bool) -> float:
        found = cpu_seconds(os.getpid(), main_thread=main_thread)
        assert found is not None
        return found

    whole, main = seconds(main_thread=False), seconds(main_thread=True)
    started = time.thread_time()

    def busy() -> None:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.3:
            pass

    worker = threading.Thread(target=busy)
    worker.start()
    worker.join()
    own = time.thread_time() - started
    assert seconds(main_thread=False) - whole > 0.25
    assert seconds(main_thread=True) - main < own + 0.05
