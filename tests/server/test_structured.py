"""What an answer has to follow, as requests say it: what reaches the engine, and every refusal."""

from __future__ import annotations

import json
import re
from typing import Any

import pydantic
import pytest

from engine.errors import RequestError
from engine.fake import FakeEngine
from engine.grammar import Grammar, GrammarSpec
from engine.types import Acceptance, Request
from server.schemas.chat import ChatRequest
from tests.server.conftest import EOS_ID, MODEL, Defaults, RunningServer, Serve, chat_body, ids, says
from tests.server.test_errors import error_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]}
NAMED = {"name": "my-Answer_1", "schema": SCHEMA}
OF_SCHEMA = GrammarSpec("json_schema", json.dumps(SCHEMA))
OBJECT = GrammarSpec("json_schema", '{"type": "object"}')
LARK = 'start: "a" | "b"'
GBNF = 'root ::= "a" | "b"'

ASKED: list[tuple[dict[str, Any], GrammarSpec | None]] = [
    ({}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "text", "json_schema": None}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, OF_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": None}}}, OF_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": False}}}, OF_SCHEMA),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {**NAMED, "strict": True, "description": "d"},
            }
        },
        OF_SCHEMA,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA, indent=1), "regex": None}}, OF_SCHEMA),
    ({"structured_outputs": {"regex": "[ab]+", "json_object": False}}, GrammarSpec("regex", "[ab]+")),
    ({"structured_outputs": {"choice": ["é", 'b"\n']}}, GrammarSpec("choice", '["\\u00e9", "b\\"\\n"]')),
    ({"structured_outputs": {"grammar": LARK}}, GrammarSpec("grammar", LARK)),
    ({"structured_outputs": {"grammar": GBNF}}, GrammarSpec("grammar", GBNF)),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, OBJECT),
    ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, OBJECT),
    ({"guided_json": SCHEMA}, OF_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
    ({"guided_regex": "a|b"}, GrammarSpec("regex", "a|b")),
    ({"guided_choice": ["a", "b"]}, GrammarSpec("choice", '["a", "b"]')),
    ({"guided_grammar": GBNF}, GrammarSpec("grammar", GBNF)),
]

SO = "structured_outputs"
PATHS = ["chat/completions", "completions"]


def send(server: RunningServer, path: str, **fields: Any) -> Any:
    body = chat_body(**fields)
    if path == "completions":
        del body["messages"]
        body.setdefault("prompt", "hi")
    return server.http.post(f"/v1/{path}", json=body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "spec"), ASKED, ids=lambda value: str(value)[:60])
def test_what_is_asked_for_reaches_the_engine(
    hello: RunningServer, fields: dict[str, Any], spec: GrammarSpec | None, path: str
) -> None:
    answer = send(hello, path, **fields)
    assert answer.status_code == 200, answer.text
    grammar = hello.engine.submitted[-1].grammar
    assert (grammar and grammar.spec) == spec


def test_a_grammar_ends_at_the_models_own_eos(serve: Serve) -> None:
    """Which need not be the tokenizer's."""
    (other,) = ids("<|im_start|>")
    server = serve(says("x"), defaults=Defaults(eos_token_ids=(other,)))
    assert send(server, PATHS[0], guided_regex="(ab)*").status_code == 200
    grammar = server.engine.submitted[-1].grammar
    assert isinstance(grammar, Grammar)
    assert grammar.start().advance(other)
    assert not grammar.start().advance(EOS_ID)
    state = grammar.start()
    assert [state.advance(token) for token in ids("ab")] == [True, True]
    assert not grammar.start().advance(ids("b")[0])


@pytest.mark.parametrize(
    "asked",
    [
        {"json_object": True},
        {"json": SCHEMA},
        {"json": {**SCHEMA, "x-guidance": {"whitespace_flexible": True, "lenient": False}}},
    ],
    ids=["object", "schema", "schema-that-allows-it"],
)
def test_json_may_be_asked_for_without_whitespace(hello: RunningServer, asked: dict[str, Any]) -> None:
    def follows(text: str) -> bool:
        grammar = hello.engine.submitted[-1].grammar
        assert isinstance(grammar, Grammar)
        state = grammar.start()
        return all(state.advance(token) for token in [*ids(text), EOS_ID])

    packed = json.dumps({"b": 1, "a": ["x y", {}]}, separators=(",", ":"))
    spaced = [packed.replace(part, part + gap) for part in "{:," for gap in " \n"]
    for disabled in (True, False, None):
        sent = send(hello, PATHS[0], structured_outputs={**asked, "disable_any_whitespace": disabled})
        assert sent.status_code == 200, sent.text
        assert follows(packed)
        assert {follows(text) for text in spaced} == {not disabled}


def test_each_prompt_of_several_has_the_grammar(hello: RunningServer) -> None:
    before = len(hello.engine.submitted)
    answer = send(hello, "completions", prompt=["a", "b"], echo=True, n=2, guided_regex="x+")
    assert len(answer.json()["choices"]) == 4
    grammars = [request.grammar for request in hello.engine.submitted[before:]]
    assert grammars[0] is not None
    assert grammars == [grammars[0]] * 2


def test_the_rest_of_the_fields_goes_together_with_it(hello: RunningServer) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "stop": ["x"],
        "n": 2,
        "logprobs": True,
        "medusa": {"acceptance": "typical"},
        "prediction": {"type": "content", "content": "a"},
        "presence_penalty": 1.0,
        "logit_bias": {"5": 1},
        "bad_words": ["q"],
        "ignore_eos": True,
        "min_tokens": 0,
        "stream": True,
    }
    assert send(hello, PATHS[0], guided_regex="[a-z]+", **fields).status_code == 200
    request = hello.engine.submitted[-1]
    assert request.grammar is not None
    assert request.medusa.acceptance is Acceptance.TYPICAL
    assert request.prediction_token_ids


@pytest.mark.parametrize("path", PATHS)
def test_bad_words_that_leave_nothing_to_begin_with_are_refused(hello: RunningServer, path: str) -> None:
    for fields in ({"guided_regex": "[ab]c+"}, {"guided_choice": ["a", "bc"]}):
        error = error_of(send(hello, path, bad_words=["a", "b", "d"], **fields), 400)
        assert (error["param"], error["code"]) == ("bad_words", "invalid_value")
        for left in (["a", "c"], ["ab", "b"]):  # of these one may begin it
            assert send(hello, path, bad_words=left, **fields).status_code == 200
    assert send(hello, path, bad_words=["a", "b"]).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_bad_words_that_leave_nothing_later_are_the_requests_own_fault(serve: Serve, path: str) -> None:
    """What the engine says of them, and not of a step that failed: a 400, or a stream's last event."""

    def reply(request: Request, _index: int) -> list[Any]:
        failed = (
            [RequestError("nothing is left", param="bad_words")]
            if request.grammar is not None
            else [ids("b"), [EOS_ID]]
        )
        return [ids("a"), *failed]

    server = serve(reply)
    told = {"message": "nothing is left", "type": "invalid_request_error", "param": "bad_words"}
    told["code"] = "invalid_value"
    assert error_of(send(server, path, guided_regex="ab", n=2), 400) == told
    events = send(server, path, guided_regex="ab", stream=True).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"] == told
    assert send(server, path).status_code == 200
    assert server.engine.stats.running == 0


def test_a_token_that_only_the_tokenizer_has_is_refused(serve: Serve) -> None:
    named = {"guided_grammar": f"start: <[{EOS_ID}]> | /a/"}
    for size, status in ((EOS_ID + 1, 200), (EOS_ID, 400)):
        server = serve(FakeEngine(says("a"), vocab_size=size))
        answer = send(server, "completions", **named)
        assert answer.status_code == status, answer.text
    assert error_of(answer, 400)["param"] == "guided_grammar"


NESTED: dict[str, Any] = {}
for _ in range(400):
    NESTED = {"items": NESTED}


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # shapes
    ({"response_format": "json"}, "response_format", "an object"),
    ({"response_format": {}}, "response_format.type", "required"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"response_format": {"type": "text", "json_schema": NAMED}}, "response_format.json_schema", "goes with"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "Unrecognized"),
    *(
        (of_schema(schema), f"response_format.{name}", reason)
        for schema, name, reason in [
            ({"schema": SCHEMA}, "json_schema.name", "required"),
            ({"name": "a"}, "json_schema.schema", "required"),
            ({"name": "a b", "schema": {}}, "json_schema.name", "pattern"),
            ({"name": "a" * 65, "schema": {}}, "json_schema.name", "pattern"),
            ({"name": "a\n", "schema": {}}, "json_schema.name", "pattern"),
            ({"name": "a", "schema": "{}"}, "json_schema.schema", "an object"),
            ({"name": "a", "schema": {}, "strict": 1}, "json_schema.strict", "boolean"),
            ({"name": "a", "schema_": {}}, "json_schema.schema_", "Unrecognized"),
        ]
    ),
    ({SO: {}}, SO, "exactly one.*got none"),
    ({SO: {"json_object": False}}, SO, "exactly one.*got none"),
    ({SO: {"regex": "a", "choice": ["a"]}}, SO, "got regex and choice"),
    ({SO: {"json": "{"}}, f"{SO}.json", "not valid JSON.*line 1 column 2"),
    ({SO: {"json": "5"}}, f"{SO}.json", "an object"),
    ({SO: {"json": '{"const": NaN}'}}, f"{SO}.json", "NaN is no JSON"),
    ({SO: {"choice": []}}, f"{SO}.choice", "at least 1 item"),
    ({SO: {"choice": [""]}}, f"{SO}.choice[0]", "at least 1 character"),
    ({SO: {"choice": "a"}}, f"{SO}.choice", "a list"),
    ({SO: {"json": {}, "whitespace_pattern": "x"}}, f"{SO}.whitespace_pattern", "n"),
    ({SO: {"structural_tag": "{}"}}, f"{SO}.structural_tag", "not supported"),
    *(
        (
            {SO: {kind: value, "disable_any_whitespace": True}},
            f"{SO}.disable_any_whitespace",
            f"a {kind} says",
        )
        for kind, value in {"regex": "a", "choice": ["a"], "grammar": LARK}.items()
    ),
    ({SO: {"json": {}, "disable_any_whitespace": 1}}, f"{SO}.disable_any_whitespace", "boolean"),
    ({SO: {"json": {"x-guidance": 1}, "disable_any_whitespace": True}}, SO, r"\.json: not a valid"),
    ({SO: {"regexp": "a"}}, f"{SO}.regexp", "Unrecognized"),
    ({"guided_json": '{"a": [1,]}'}, "guided_json", "not valid JSON.*line 1"),
    ({"guided_json": "[" * 100_000}, "guided_json", "nested too deeply"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "not supported"),
    # what does not go together
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_choice"),
    ({"response_format": {"type": "json_object"}, SO: {"regex": "a"}}, SO, "both"),
    ({SO: {"regex": "a"}, "guided_json": {}}, "guided_json", "cannot both"),
    ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens", "guided_regex"),
    ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens", "response_format"),
    # texts that are no grammars
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}},
        "response_format",
        r"^response_format\.json_schema\.schema: not a valid JSON schema",
    ),
    ({SO: {"json": {"type": "b"}}}, SO, r"\.json: not a valid"),
    ({SO: {"regex": "(a"}}, SO, r"\.regex: .*unclosed group"),
    ({SO: {"grammar": "x"}}, SO, r"\.grammar: not a valid"),
    ({SO: {"choice": ["\ud800"]}}, f"{SO}.choice[0]", "unicode"),
    ({"guided_regex": "a(?=b)"}, "guided_regex", "^guided_regex: not a valid reg.*look-around"),
    ({"guided_regex": "\ud800"}, "guided_regex", "^guided_regex: not a valid regular expression"),
    ({"guided_json": NESTED}, "guided_json", "^guided_json: .*(recursion limit|nested too deeply)"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "^guided_json: no answer"),
    ({"guided_json": {"const": float("nan")}}, "guided_json", "^guided_json: not a valid JSON schema"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "param", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_followed_is_refused_by_its_place(
    hello: RunningServer, fields: dict[str, Any], param: str, reason: str, path: str
) -> None:
    before = len(hello.engine.submitted)
    body = chat_body(stream=True, prompt="x", **fields)
    del body["prompt" if path == PATHS[0] else "messages"]
    answer = hello.http.post(
        f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    error = error_of(answer, 400)
    assert error["param"] == param
    assert re.search(reason, error["message"], re.DOTALL), error["message"]
    assert len(hello.engine.submitted) == before


def test_a_refused_grammar_is_refused_again(hello: RunningServer) -> None:
    for _ in range(2):
        assert error_of(send(hello, PATHS[0], guided_regex="(b"), 400)["param"] == "guided_regex"
    assert (
        error_of(send(hello, PATHS[0], structured_outputs={"regex": "(b"}), 400)["param"]
        == "structured_outputs"
    )


def test_a_schema_nested_deeper_than_python_goes_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    body = ChatRequest.model_construct(guided_json=deep)
    with pytest.raises(RequestError, match="guided_json: nested too deeply") as caught:
        body.constraint()
    assert caught.value.param == "guided_json"


class Step(pydantic.BaseModel):
    explanation: str
    number: int | None


class Answer(pydantic.BaseModel):
    steps: list[Step]
    final: bool


def test_the_official_clients_own_models_are_sent_and_parsed(serve: Serve) -> None:
    text = '{"steps": [{"explanation": "é", "number": null}], "final": true}'
    server = serve(says(text))
    fields: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    completion = server.openai.chat.completions.parse(**fields, response_format=Answer, n=2)
    expected = Answer(steps=[Step(explanation="é", number=None)], final=True)
    assert [choice.message.parsed for choice in completion.choices] == [expected] * 2
    with server.openai.chat.completions.stream(**fields, response_format=Answer) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == expected
    sent = [request.grammar.spec for request in server.engine.submitted]
    assert sent[0] == sent[1]
    assert json.loads(sent[0].text)["properties"].keys() == {"steps", "final"}
