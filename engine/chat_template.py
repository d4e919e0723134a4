"""What a chat template's source says of it: whether it is Jinja, and which variables it reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError, RequestError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

__all__ = ["REASONING", "check_template", "check_variables", "reads_tools", "variables", "with_reasoning"]

REASONING = "reasoning_content"
"""What an assistant's message calls its thought."""

_REASONING_NAMES = {REASONING, "reasoning", "thinking"}
"""Under which templates look for it: Qwen3's and most others, a few newer ones, OpenAI's."""


def check_template(template: str) -> None:
    """Raises ModelError if a template cannot be parsed."""
    from jinja2 import TemplateSyntaxError

    try:
        _parsed(template)
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja, line {error.lineno}: {error}") from error


def check_variables(template: str, given: Iterable[str]) -> None:
    """Raises RequestError for a variable that would have no effect, or is not the request's to give."""
    if unknown := sorted(set(given) - variables(template)):
        param = f"chat_template_kwargs.{unknown[0]}"
        raise RequestError(f"{param}: this model's chat template has no such variable", param=param)


@functools.lru_cache(maxsize=8)
def reads_tools(template: str) -> bool:
    """Whether a template writes the tools that it is given."""
    from jinja2 import nodes

    # Not its undeclared variables: some give themselves the tools anew, from another variable or none.
    return any(name.name == "tools" and name.ctx == "load" for name in _parsed(template).find_all(nodes.Name))


def with_reasoning(template: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their thoughts under the names that the template looks for."""
    if not any(REASONING in message for message in messages):
        return messages
    names = _reasoning_names(template) or {REASONING}
    renamed = []
    for message in messages:
        others = {name: value for name, value in message.items() if name != REASONING}
        thought = dict.fromkeys(names, message[REASONING]) if REASONING in message else {}
        renamed.append({**others, **thought})
    return renamed


@functools.lru_cache(maxsize=8)
def _reasoning_names(template: str) -> frozenset[str]:
    from jinja2 import nodes

    parsed = _parsed(template)
    found = {node.attr for node in parsed.find_all(nodes.Getattr)}
    found |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(found & _REASONING_NAMES)


@functools.lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """What a request may set: the variables the template reads, less those that are ours to give."""
    from jinja2 import meta
    from transformers import PreTrainedTokenizerBase

    found = meta.find_undeclared_variables(_parsed(template))
    ours = {"messages", "tools", "documents", "raise_exception", "strftime_now"}
    ours |= set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    ours |= {name for name in found if name.endswith("_token")}  # bos_token and the like
    return frozenset(found) - ours


def _parsed(template: str) -> nodes.Template:
    from jinja2 import Environment

    return Environment(extensions=_extensions()).parse(template)


@functools.cache
def _extensions() -> tuple[type[Extension] | str, ...]:
    """What chat templates may use beyond Jinja: break and continue, and transformers' generation block."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as the base class declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return (Generation, loopcontrols)
