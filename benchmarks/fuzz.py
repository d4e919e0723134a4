"""Schemathesis over every endpoint: requests made from the server's own OpenAPI description, good and bad.

    python -m benchmarks.fuzz --cases 10000                 # against a FakeEngine
    python -m benchmarks.fuzz --cases 300 --engine real     # against the embedded model, outputs kept short
    python -m benchmarks.fuzz --url http://…                # against a server that runs already

A case fails if it is answered with 5xx, not within the time limit, in a form or with a status that the
description does not have, or with success though it breaks the description. At the end nothing may run and
no K/V block be owned. The last line is JSON; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, Verbosity, given, seed as seeded, settings as hypothesis_settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from engine.client import EngineClient
from engine.fake import FakeEngine
from engine.types import Request

__all__ = ["Result", "fake_server", "fuzz", "real_server"]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
"""Not `positive_data_acceptance`: fields exclude each other and the context bounds them together, which a
JSON schema does not say."""

MODEL = "fuzzed"
LONGEST = 24  # tokens of an answer where a request bounds it
MAX_SHOWN = 20


@dataclass(slots=True)
class Result:
    """What came of it."""

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    leaked: str = ""

    def line(self) -> str:
        """The result as one line of JSON."""
        return json.dumps(
            {
                "benchmark": "fuzz",
                "cases": self.cases,
                "seconds": round(self.seconds, 1),
                "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
                "operations": dict(sorted(self.operations.items())),
                "succeeded": dict(sorted(self.succeeded.items())),
                "failures": len(self.failures),
                "leaked": self.leaked,
            }
        )


def fuzz(url: str, cases: int, *, seed: int = 0, timeout_s: float = 30.0) -> Result:
    """Send about `cases` requests to the server at `url`.

    Args:
        url: its base URL; it must serve nobody else, since idleness is checked at the end.
        cases: shared among the operations with a body, half of them made to be wrong; the others, which
            have little to vary, get a few.
        seed: of the cases.
        timeout_s: for each answer; later is a hang.
    """
    result = Result()
    started = time.monotonic()
    described = httpx.get(f"{url}/openapi.json", timeout=timeout_s).json()
    name = httpx.get(f"{url}/v1/models", timeout=timeout_s).json()["data"][0]["id"]
    session = requests.Session()
    kinds = [
        (_likely(described, name, stream=False), schemathesis.GenerationMode.POSITIVE, 2),
        (_likely(described, name, stream=True), schemathesis.GenerationMode.POSITIVE, 2),
        (_named(described, name), schemathesis.GenerationMode.POSITIVE, 1),
        (_named(described, name), schemathesis.GenerationMode.NEGATIVE, 3),
    ]
    with_body = sum("requestBody" in one for path in described["paths"].values() for one in path.values())
    for raw, mode, weight in kinds:
        schema = schemathesis.openapi.from_dict(copy.deepcopy(raw))
        for found in schema.get_all_operations():
            operation = found.ok()
            count = max(1, cases * weight // (8 * with_body)) if operation.body else 3
            if mode.is_negative and not operation.body:
                continue  # nothing to get wrong
            _fuzz_one(operation, mode, count, url, session, timeout_s, seed, result)
    result.leaked = _leaked(url, timeout_s)
    result.seconds = time.monotonic() - started
    return result


def _fuzz_one(
    operation: Any,
    mode: schemathesis.GenerationMode,
    count: int,
    url: str,
    session: requests.Session,
    timeout_s: float,
    seed: int,
    result: Result,
) -> None:
    @seeded(seed)
    @hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # failures are collected, not shrunk
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        result.cases += 1
        result.operations[operation.label] += 1
        try:
            response = case.call(base_url=url, session=session, timeout=timeout_s)
            result.statuses[response.status_code] += 1
            result.succeeded[operation.label] += response.status_code < 300
            case.validate_response(response, checks=CHECKS)
        except (Exception, BaseExceptionGroup) as error:  # a group of failed checks, or no answer
            told = str(error) or type(error).__name__
            result.failures.append(f"{operation.label}: {told}\nbody: {case.body!r}")

    send()


def _named(described: dict[str, Any], model: str) -> dict[str, Any]:
    """The description with the only model names that are not a 404."""
    named = copy.deepcopy(described)
    for body in _bodies(named):
        if "model" in body["properties"]:
            body["properties"]["model"] = {"enum": [model, "", None]}
    return named


def _likely(described: dict[str, Any], model: str, stream: bool) -> dict[str, Any]:
    """The description with values that a server is likely to accept: fields in their ranges and none that
    exclude each other, tokens that the model has, short answers."""
    likely = _named(described, model)
    for body in _bodies(likely):
        fields, required = body["properties"], set(body.get("required", []))
        for name in _NOT_STREAMED if stream else _STREAMED:
            fields.pop(name, None)
        if {"prompt", "messages"} <= set(fields):  # /tokenize takes one of them
            for name in ("prompt",) if stream else _OF_MESSAGES:
                fields.pop(name, None)
            required.add("messages" if stream else "prompt")
        values = {**_LIKELY, **_LIKELY_IN.get(body["title"], {})}
        for name in set(fields) & set(values):
            fields[name] = copy.deepcopy(values[name])
        if "stream" in fields:
            fields["stream"] = {"type": "boolean", "enum": [stream]}
            required.add("stream")
        if {"top_logprobs", "logprobs"} <= set(fields):
            fields["logprobs"] = {"type": "boolean", "enum": [True]}
            required.add("logprobs")
        body["required"] = sorted(required)
    for operations in likely["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = {"type": "string", "enum": [model]}
    return likely


def _bodies(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each component that is part of a request: only these know no other fields."""
    for component in described["components"]["schemas"].values():
        if component.get("additionalProperties") is False:
            yield component


def _integer(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _number(least: float, most: float) -> dict[str, Any]:
    return {"type": "number", "minimum": least, "maximum": most}


_TOKENS = {"type": "array", "items": _integer(0, 255), "minItems": 1, "maxItems": 12}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 3}
_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_MESSAGES_OF_TOOLS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "reasoning_content": "c", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "b"},
]
_LIKELY: dict[str, dict[str, Any]] = {
    "bad_words": {"type": "array", "items": {"enum": ["a", "the", "x y"]}, "maxItems": 3},
    "chat_template_kwargs": {"type": "object", "maxProperties": 0},
    "frequency_penalty": _number(-2, 2),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]?)$"},
        "additionalProperties": _number(-100, 100),
    },
    "max_completion_tokens": _integer(1, LONGEST),
    "max_tokens": _integer(1, LONGEST),
    "max_tree_size": _integer(1, 64),
    "medusa": {
        "type": "object",
        "properties": {
            "acceptance": {"enum": ["typical"]},
            "epsilon": _number(0, 1),
            "delta": _number(0, 5),
            "max_tree_size": _integer(1, 64),
        },
        "required": ["acceptance"],
        "additionalProperties": False,
    },
    "messages": {
        "anyOf": [
            {"type": "array", "items": {"$ref": "#/components/schemas/ChatMessage"}, "minItems": 1},
            {"enum": [_MESSAGES_OF_TOOLS]},
        ]
    },
    "metadata": {"type": "object", "maxProperties": 0},
    "min_p": _number(0, 1),
    "min_tokens": _integer(0, 1),
    "n": _integer(1, 2),
    "name": {"enum": [None]},
    "parallel_tool_calls": {"enum": [True]},
    "presence_penalty": _number(-2, 2),
    "prompt": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            _TOKENS,
            _TEXTS,
            {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": 3},
        ]
    },
    "include_reasoning": {"enum": [None, True]},
    "reasoning": {"enum": [None, ""]},
    "reasoning_content": {"enum": [None, ""]},
    "reasoning_effort": {"enum": [None, "none"]},
    "repetition_penalty": _number(0.1, 3),
    "seed": _integer(-(2**63), 2**63 - 1),
    "response_format": {"enum": [None, {"type": "text"}]},
    "role": {"enum": ["system", "developer", "user", "assistant"]},
    "stop_token_ids": _TOKENS,
    "structured_outputs": {
        "enum": [
            {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            {"json": '{"type": "array", "items": {"type": "boolean"}}'},
            {"regex": "[a-z]{1,9}"},
            {"choice": ["yes", "no"]},
            {"grammar": 'root ::= "a" | "b" root'},
            {"json_object": True},
        ]
    },
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"const": True}, "continuous_usage_stats": {"type": "boolean"}},
        "required": ["include_usage"],
        "additionalProperties": False,
    },
    "tokens": _TOKENS,
    "tool_call_id": {"enum": [None]},
    "tool_calls": {"enum": [None, []]},
    "tool_choice": {"enum": ["none", "auto"]},
    "tools": {
        "enum": [
            [],
            [{"type": "function", "function": _FUNCTION}],
            [{"type": "function", "function": {**_FUNCTION, "strict": True}}],
        ]
    },
    "top_p": _number(0.01, 1),
    "truncate_prompt_tokens": _integer(1, 50),
}
_THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "c"}], "summary": []}
_OF_CALL = {"call_id": "c", "type": "function_call"}
_LIKELY_IN: dict[str, dict[str, Any]] = {
    "CallInput": {"name": {"enum": ["f"]}},
    "FunctionTool": {"name": {"enum": ["f"]}},
    "MessageInput": {"id": {"enum": [None, "m"]}, "status": {"enum": [None, "completed"]}},
    "ResponsesRequest": {
        "include": {"enum": [None, [], ["reasoning.encrypted_content"]]},
        "input": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"$ref": "#/components/schemas/MessageInput"}, "minItems": 1},
                {
                    "enum": [
                        [
                            _THOUGHT,
                            {**_OF_CALL, "name": "f", "arguments": "{}"},
                            {**_OF_CALL, "type": "function_call_output", "output": "b"},
                        ]
                    ]
                },
            ]
        },
        "max_output_tokens": _integer(1, LONGEST),
        "reasoning": {"enum": [None, {}, {"effort": "none"}]},
        "stream_options": {"enum": [None]},
        "text": {"enum": [None, {}, {"format": {"type": "text"}}]},
        "tools": {
            "enum": [
                [],
                [{"type": "function", **_FUNCTION}],
                [{"type": "function", **_FUNCTION, "strict": True}],
            ]
        },
        "top_logprobs": {"enum": [None, 0]},
    },
}
"""Where a field is another one than elsewhere."""
# Fields that exclude each other, told apart by whether the answer is streamed.
_GUIDED = ("guided_choice", "guided_grammar", "guided_json", "guided_regex")
_STREAMED = (
    "stream_options",
    "max_completion_tokens",
    "continue_final_message",
    "structured_outputs",
    *_GUIDED,
)
_NOT_STREAMED = ("prompt_logprobs", "max_tokens", "add_generation_prompt", "min_tokens", "tools", *_GUIDED)
_OF_MESSAGES = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
)


def _leaked(url: str, timeout_s: float) -> str:
    """What still runs or is owned a while after the last answer; empty if nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = httpx.get(f"{url}/metrics", timeout=timeout_s).text
        values = {
            (sample.name, sample.labels.get("state", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        busy = {
            name: values[name, state]
            for name, state in (
                ("medusa_num_requests_running", ""),
                ("medusa_num_requests_waiting", ""),
                ("medusa_kv_blocks", "used"),
            )
            if values[name, state]
        }
        if not busy:
            return ""
        if time.monotonic() > deadline:
            return json.dumps(busy)
        time.sleep(0.05)


def _answers(request: Request, index: int) -> Iterator[list[int]]:
    """Up to 40 tokens in steps of one to five, other ones for each prompt and choice."""
    kind = (len(request.prompt_token_ids) * 31 + index * 7) % 97
    for step in range(kind % 12):
        yield [(kind * 13 + step * 5 + at) % 256 for at in range(1 + (kind + step) % 5)]


@contextmanager
def fake_server() -> Iterator[str]:
    """The URL of a server around a `FakeEngine` with the embedded model's tokenizer."""
    from engine.model.embedded import ensure_converted
    from engine.model.weights import load_generation_defaults, load_tokenizer
    from engine.text import TextProcessor

    folder = ensure_converted()
    text = TextProcessor(load_tokenizer(folder))
    engine = FakeEngine(_answers, vocab_size=text.vocab_size, max_model_len=512, draft_tokens=4)
    with _serving(engine, text, load_generation_defaults(folder)) as url:
        yield url


@contextmanager
def real_server() -> Iterator[str]:
    """The URL of a server of the embedded model whose context allows short answers only."""
    from engine.config import EngineConfig
    from engine.loop import EngineLoop

    engine = EngineLoop.load(EngineConfig(max_model_len=72, max_num_seqs=8), progress=False)
    with _serving(engine, engine.text, engine.generation_defaults) as url:
        yield url


@contextmanager
def _serving(engine: EngineClient, text: Any, defaults: Any) -> Iterator[str]:
    from server.app import create_app
    from server.lifecycle import bind
    from server.logs import configure_logging
    from server.settings import Settings

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("error", "json", io.StringIO())  # a line per case would bury the result
    app = create_app(engine, text, Settings(served_model_name=MODEL, drain_timeout=0.0), defaults)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        root.handlers[:], root.level = handlers, level


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--engine", choices=["fake", "real"], default="fake")
    parser.add_argument("--url", help="a server that runs already, instead of --engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until an answer is a hang")
    options = parser.parse_args()
    if options.url:
        result = fuzz(options.url, options.cases, seed=options.seed, timeout_s=options.timeout)
    else:
        with real_server() if options.engine == "real" else fake_server() as url:
            result = fuzz(url, options.cases, seed=options.seed, timeout_s=options.timeout)
    for failure in result.failures[:MAX_SHOWN]:
        print(failure, file=sys.stderr)
    print(result.line())
    return 1 if result.failures or result.leaked else 0


if __name__ == "__main__":
    sys.exit(main())
