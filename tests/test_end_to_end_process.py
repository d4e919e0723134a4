"""A server whose engine has a process of its own: chat, hanging up, metrics, a drain by a signal to both."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.common import Server, children, metrics
from tests.server.conftest import wait_until
from tests.support import save_model, tiny_llama

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
SOON_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(max_position_embeddings=4096), tmp_path_factory.mktemp("tiny"))


def page(server: Server) -> dict[str, float]:
    return metrics(httpx.get(f"{server.url}/metrics").text)


def test_chat_hanging_up_metrics_and_drain(model: Path) -> None:
    options = ["--engine-process", "on", "--tree", "off", "--max-num-seqs", "4", "--kv-cache-tokens", "20000"]
    options += ["--load-format", "dummy"]  # of which the engine's loader tells the log
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
