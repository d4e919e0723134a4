"""Requests as programs send them that people point at such a server, and what they make of the answers."""

from __future__ import annotations

from typing import Any

import pytest

from engine.text import TextProcessor
from tests.server.conftest import EOS, EOS_ID, MODEL, TEXT, RunningServer, Serve, ids, says


def scored(server: RunningServer, context: str, continuation: str) -> tuple[float, bool, list[str]]:
    """`LocalCompletionsAPI` of lm-eval 0.4.13: its request, and what it reads out of the answer.

    The last token is the one that was drawn, which it leaves out.
    """
    body = {
        "model": MODEL,
        "prompt": [ids(context + continuation)],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = server.http.post("/v1/completions", json=body).json()
    (choice,) = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    found, after = choice["logprobs"], len(ids(context))
    logprobs, tops = found["token_logprobs"][after:-1], found["top_logprobs"][after:-1]
    greedy = all(token == max(top.values()) for token, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), greedy, found["tokens"][after:-1]


@pytest.mark.parametrize("drawn", [ids("x"), [EOS_ID]], ids=["text", "the end"])
def test_lm_eval_scores_all_of_a_continuation(serve: Serve, drawn: list[int]) -> None:
    """Whatever the token is that was drawn behind it."""
    server = serve(lambda _r, _i: [drawn])
    assert scored(server, "2+2=", "four") == (-2.0, True, list("four"))


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, [("a", 2), ("b", 3), ("c", 4), (EOS, 5)]),
        ({"include_stop_str_in_output": True}, [("a", 2), ("b", 3), ("c", 4), (EOS, 5)]),
        ({"stop_token_ids": ids("b")}, [("a", 2), ("b", 3)]),
        ({"stop": "c"}, [("a", 2), ("b", 3)]),
    ],
)
def test_the_token_that_ended_a_text_completion_has_its_entry(
    serve: Serve, fields: dict[str, Any], tokens: list[tuple[str, int]]
) -> None:
    """As in vLLM and of OpenAI's models that complete text; behind a stop string there is none."""
    server = serve(lambda _r, _i: [[*ids("abc"), EOS_ID]])
    body = {"model": MODEL, "prompt": "hi", "echo": True, "logprobs": 0, **fields}
    (choice,) = server.http.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert list(zip(found["tokens"], found["text_offset"], strict=True))[2:] == tokens
    assert len({len(values) for values in found.values()}) == 1


def test_lm_eval_does_without_a_tokenizer_of_its_own(hello: RunningServer) -> None:
    """`check_remote_tokenizer_support` and `RemoteTokenizer` of lm-eval 0.4.13."""
    info = hello.http.get("/tokenizer_info").json()
    assert info["eos_token"] == EOS
    assert info["bos_token"] is None
    asked = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert hello.http.post("/tokenize", json=asked).json()["tokens"][0] == EOS_ID
    assert info["chat_template"] == TEXT.chat_template
    assert info["tokenizer_class"] == type(TEXT.tokenizer).__name__


NAMING = (
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: "
    "{{ m.content }}\n{% endfor %}"
)


def test_autogen_names_who_speaks(serve: Serve) -> None:
    """AutoGen 0.7 does by default, LangChain where a message has a name: for templates that read it."""
    messages = [
        {"content": "Be short.", "role": "system"},
        {"content": "hi", "role": "user", "name": "user"},
        {"content": "hello", "role": "assistant", "name": "writer"},
    ]
    reads = serve(says("ok"), text=TextProcessor(TEXT.tokenizer, NAMING))
    reads.openai.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
    prompt = TEXT.decode(reads.engine.submitted[-1].prompt_token_ids)
    assert prompt == "system: Be short.\nuser user: hi\nassistant writer: hello\n"
    other = serve(says("ok"))
    assert other.chat(messages=messages).status_code == 200
    bare = [{name: message[name] for name in ("role", "content")} for message in messages]
    assert list(other.engine.submitted[-1].prompt_token_ids) == TEXT.encode_chat(bare)
    assert other.chat(messages=[{"role": "user", "content": "hi", "name": 5}]).status_code == 400
