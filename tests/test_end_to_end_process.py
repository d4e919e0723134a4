"""A server whose engine has a process of its own: chat, hanging up, metrics, a drain by a signal to both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
import torch

from benchmarks.common import Server, children, metrics
from tests.engine.model.adapters import merged, save_adapter
from tests.server.conftest import wait_until
from tests.support import greedy_reference, save_model, tiny_llama

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
OPTIONS = ["--engine-process", "on", "--tree", "off", "--max-num-seqs", "4", "--kv-cache-tokens", "20000"]
SOON_S = 30.0
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(max_position_embeddings=4096), tmp_path_factory.mktemp("tiny"))


def page(server: Server) -> dict[str, float]:
    return metrics(httpx.get(f"{server.url}/metrics", verify=False).text)


def test_chat_hanging_up_metrics_and_drain(model: Path) -> None:
    options = [*OPTIONS, "--load-format", "dummy"]  # of which the engine's loader tells the log
    names = [str(model), "--served-model-name", "tiny", "--chat-template", TEMPLATE, "--log-format", "json"]
    with (
        Server([*names, *options], threads=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=60) as client,
    ):
        (child,) = children(server.pid)

        def ask(count: int, stream: bool) -> object:
            messages = [{"role": "user", "content": "t5 t9 t2 t44"}]
            return client.chat.completions.create(  # type: ignore[call-overload]
                model="tiny", messages=messages, temperature=0, max_tokens=count, stream=stream
            )

        whole = ask(40, False).choices[0].message.content  # type: ignore[attr-defined]
        found = page(server)
        assert found["medusa_generation_tokens_total"] == 40
        assert found["medusa_num_requests_running"] == 0
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(40, True)]  # type: ignore[attr-defined]
        assert "".join(pieces) == whole
        assert page(server)["medusa_generation_tokens_total"] == 80

        left = ask(3000, True)
        next(iter(left))  # type: ignore[call-overload]
        left.close()  # type: ignore[attr-defined]
        wait_until(lambda: page(server)["medusa_num_requests_running"] == 0, SOON_S)
        found = page(server)
        assert found["medusa_generation_tokens_total"] < 3000
        assert found['medusa_kv_blocks{state="used"}'] == 0
        assert found["medusa_step_age_seconds"] == 0

        whole = ask(300, False).choices[0].message.content  # type: ignore[attr-defined]
        chunks = iter(ask(300, True))  # type: ignore[call-overload]
        first = next(chunks).choices[0].delta.content or ""
        for pid in (child, server.pid):  # as a terminal's Ctrl-C, or a service manager
            os.kill(pid, signal.SIGTERM)
        assert first + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert server.wait(SOON_S) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        assert "Traceback" not in server.log_tail(1000)
        assert '"logger": "engine.loader"' in server.log_tail(1000)  # the child's lines are as the server's


def test_an_engine_that_is_killed_ends_what_runs_and_its_server(model: Path, tmp_path: Path) -> None:
    base = tiny_llama(max_position_embeddings=4096)
    adapter = save_adapter(base, tmp_path / "adapter")
    options = ["--served-model-name", "tiny", "--lora", f"{adapter}@0.5", *OPTIONS]
    with Server([str(model), *options], threads=1) as server:
        (child,) = children(server.pid)
        asked = {"model": "tiny", "prompt": [3, 14, 15], "max_tokens": 8, "temperature": 0}
        choice = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=SOON_S).json()["choices"][0]
        wanted = greedy_reference(merged(base, (adapter, 0.5)), [3, 14, 15], 8)
        assert choice["text"].split() == [f"t{token}" for token in wanted]
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [(card["id"], card["root"]) for card in listed] == [("tiny", "tiny")]
        assert "adapter@0.5 sha256:" in server.log_tail(100)
        assert page(server)["medusa_engine_process_resident_memory_bytes"] > 1e6
        asked = {"model": "tiny", "prompt": [1, 2], "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=SOON_S) as answer:
            events = answer.iter_lines()
            next(events)
            os.kill(child, signal.SIGKILL)
            last = [event for event in events if event][-1]
        assert "the engine's process was killed by SIGKILL" in last
        assert server.wait(SOON_S) == 1
        assert "engine_died" in server.log_tail(5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_an_engine_that_cannot_start_there_is_told_in_one_line(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", str(model), "--device", "cuda", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: device 'cuda' was asked for and torch sees no GPU here\n"


# Where tests run in the background, SIGINT is ignored, and processes inherit it.
SERVED = """
import signal, sys
from server.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def test_ctrl_c_while_it_loads_ends_it_in_one_line(model: Path) -> None:
    """The engine's thread is inside torch, in threads that the interpreter's own end would not survive."""
    command = [sys.executable, "-c", SERVED, "serve", str(model), "--device", "cpu", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            assert any("measuring decode steps" in line for line in running.stderr)
            running.send_signal(signal.SIGINT)
            assert running.wait(SOON_S) == 1
        finally:
            running.kill()
        assert running.stderr.read() == "error: interrupted while loading\n"
