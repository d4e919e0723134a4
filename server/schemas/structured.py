"""The fields that say what an answer has to follow: OpenAI's, and vLLM's newer and older ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.errors import RequestError
from engine.grammar import GrammarSpec
from server.errors import UnsupportedFieldError
from server.schemas.base import Body, GenerationBody

__all__ = ["JSON_OBJECT", "ConstrainedBody", "Constraint", "ResponseFormat", "StructuredOutputs"]

JSON_OBJECT = GrammarSpec("json_schema", '{"type": "object"}')


class Constraint(NamedTuple):
    """A grammar that a request asks for.

    Args:
        spec: the grammar.
        param: the request's field.
        place: where in the field the text stands, for messages.
    """

    spec: GrammarSpec
    param: str
    place: str


def _parsed(value: object) -> object:
    """A JSON schema that came as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_Schema = dict[str, Any]
SchemaOrText = Annotated[_Schema, BeforeValidator(_parsed, json_schema_input_type=_Schema | str)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]


class JsonSchema(Body):
    """OpenAI's schema and what it is called."""

    PATH = ("response_format", "json_schema")

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: _Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="No effect: the schema is enforced either way.")
    description: str | None = Field(None, description="No effect: the model is told nothing of the schema.")


class ResponseFormat(Body):
    """OpenAI's form of an answer."""

    PATH = ("response_format",)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise RequestError(
                f"response_format.json_schema {'is missing' if self.json_schema is None else 'goes'} "
                "with response_format.type 'json_schema'",
                param="response_format.json_schema",
            )
        return self


class StructuredOutputs(Body):
    """vLLM's constraint: one of several kinds."""

    PATH = ("structured_outputs",)
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_fallback": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="Lark or GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool | None = Field(None, description="JSON without any between its tokens.")

    @property
    def kinds(self) -> dict[str, Any]:
        """What is given, by its name."""
        values = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(given := self.kinds) != 1:
            raise RequestError(
                "structured_outputs takes exactly one of json, regex, choice, grammar, json_object (true), "
                f"got {' and '.join(given) or 'none'}",
                param="structured_outputs",
            )
        if self.disable_any_whitespace and not given.keys() & {"json", "json_object"}:
            raise UnsupportedFieldError(
                "structured_outputs.disable_any_whitespace goes with structured_outputs.json or json_object: "
                f"a {next(iter(given))} says itself where whitespace stands",
                param="structured_outputs.disable_any_whitespace",
            )
        return self


class ConstrainedBody(GenerationBody):
    """A request whose answer may have to follow a grammar."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, description="Lark or GBNF.")

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = self.constrained_by
        if len(given) > 1:
            raise RequestError(
                f"{given[0]} and {given[1]} cannot both be set: an answer follows one grammar", param=given[1]
            )
        if given and self.min_tokens:
            raise RequestError(
                f"min_tokens cannot be set with {given[0]}: where the grammar ends, so does the answer",
                param="min_tokens",
            )
        return self

    @property
    def constrained_by(self) -> list[str]:
        """The fields that ask for a grammar."""
        fields = ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"]
        given = [name for name in fields if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            given.insert(0, "response_format")
        return given

    @property
    def constraint_of(self) -> Callable[[], Constraint] | None:
        """`constraint`, where the request asks for one."""
        return self.constraint if self.constrained_by else None

    def constraint(self) -> Constraint:
        """The grammar that the field of `constrained_by` asks for. Takes longer for a larger schema.

        Raises:
            RequestError: a schema that is nested too deeply to be written.
        """
        (param,) = self.constrained_by
        if param == "response_format":
            assert self.response_format is not None
            schema = self.response_format.json_schema
            if schema is None:
                return Constraint(JSON_OBJECT, param, param)
            return _constraint("json", schema.schema_, param, "response_format.json_schema.schema")
        if param == "structured_outputs":
            assert self.structured_outputs is not None
            ((kind, value),) = self.structured_outputs.kinds.items()
            place = f"structured_outputs.{kind}"
            if self.structured_outputs.disable_any_whitespace:
                value = _without_whitespace({"type": "object"} if kind == "json_object" else value)
                kind = "json"
            return _constraint(kind, value, param, place)
        return _constraint(param.removeprefix("guided_"), getattr(self, param), param, param)


def _constraint(kind: str, value: Any, param: str, place: str) -> Constraint:
    match kind:
        case "json_object":
            spec = JSON_OBJECT
        case "json":
            # With keys as they came: properties are written in the schema's order.
            spec = GrammarSpec("json_schema", _dumped(value, param, place))
        case "choice":
            spec = GrammarSpec("choice", json.dumps(value))
        case "regex":
            spec = GrammarSpec("regex", value)
        case _:
            spec = GrammarSpec("grammar", value)
    return Constraint(spec, param, place)


def _without_whitespace(schema: _Schema) -> _Schema:
    """The schema of the same values without whitespace around its brackets, commas and colons.

    What else the schema itself asks llguidance for stays, or stays wrong.
    """
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {**own, "whitespace_flexible": False} if isinstance(own, dict) else own}


def _dumped(schema: _Schema, param: str, place: str) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise RequestError(f"{place}: nested too deeply", param=param) from None
