"""What a chat template's source says of it: whether it is Jinja, and what it reads of what it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
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
    """The messages with their thoughts where the template looks for them."""
    if not any(REASONING in message for message in messages):
        return messages
    names = _reasoning_names(template) or {REASONING}
    in_blocks = names == {"thinking"} and _reads_blocks_of_thought(template)
    placed = []
    for message in messages:
        others = {name: value for name, value in message.items() if name != REASONING}
        if REASONING not in message:
            placed.append(others)
        elif in_blocks:
            thought = {"type": "thinking", "thinking": message[REASONING]}
            placed.append({**others, "content": [thought, {"type": "text", "text": message["content"]}]})
        else:
            placed.append({**others, **dict.fromkeys(names, message[REASONING])})
    return placed


@functools.lru_cache(maxsize=8)
def _reasoning_names(template: str) -> frozenset[str]:
    from jinja2 import nodes

    parsed = _parsed(template)
    found = {node.attr for node in parsed.find_all(nodes.Getattr)}
    found |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(found & _REASONING_NAMES)


@functools.lru_cache(maxsize=8)
def _reads_blocks_of_thought(template: str) -> bool:
    """Whether a template looks for thoughts in a content of several blocks, as Mistral's do."""
    from jinja2 import nodes

    return any(
        isinstance(compared.expr, nodes.Getattr | nodes.Getitem)
        and _last_name(compared.expr) == "type"
        and any(isinstance(to.expr, nodes.Const) and to.expr.value == "thinking" for to in compared.ops)
        for compared in _parsed(template).find_all(nodes.Compare)
    )


def _last_name(node: nodes.Getattr | nodes.Getitem) -> Any:
    """What `a.b` or `a['b']` reads of `a`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


@functools.lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """What a request may set: the variables the template reads, less those that are ours to give."""
    from jinja2 import meta
    from transformers import PreTrainedTokenizerBase

    parsed = _parsed(template)
    found = meta.find_undeclared_variables(parsed)
    ours = {"messages", "tools", "raise_exception", "strftime_now"}
    ours |= set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
    ours |= {name for name in found if name.endswith("_token")}  # bos_token and the like
    return frozenset(found) - ours - _its_own(parsed)


def _its_own(parsed: nodes.Template) -> set[str]:
    """Variables to which a template gives values, and asks for none: what else would set them is lost."""
    from jinja2 import nodes

    first: dict[str, str] = {}
    for name in _in_order(parsed):
        if name.ctx != "param":  # a macro's, which outside of it has no value
            first.setdefault(name.name, name.ctx)
    asking = ("defined", "undefined", "default", "d")
    asked = [test.node for test in parsed.find_all((nodes.Test, nodes.Filter)) if test.name in asking]
    asked_for = {node.name for node in asked if isinstance(node, nodes.Name)}
    return {name for name, how in first.items() if how != "load"} - asked_for


def _in_order(node: nodes.Node) -> Iterator[nodes.Name]:
    """The names in it, a value's before the name that it is given to."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign | nodes.AssignBlock):
        children = [*children[1:], children[0]]
    elif isinstance(node, nodes.For):
        children[:2] = node.iter, node.target
    for child in children:
        yield from _in_order(child)


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
