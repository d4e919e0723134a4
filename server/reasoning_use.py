"""One request's reasoning: what its template is told of it, and what of it may stand before the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

from engine.harmony import HarmonyThought
from engine.harmony_format import HarmonyFormat
from engine.reasoning import AnyThoughtFormat
from engine.text import TextProcessor
from engine.thought import Thought
from server.errors import UnsupportedFieldError
from server.harmony_calls import HarmonyCalls
from server.schemas.chat import ChatRequest, Conversation
from server.schemas.structured import Constraint
from server.tool_formats import AnyToolFormat

__all__ = ["AnyThought", "begun_content", "check_effort", "template_variables", "thought_of", "with_thought"]

AnyThought = Thought | HarmonyThought

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thinking on and off: Qwen3's and most others, Granite's, DeepSeek's."""


def template_variables(body: Conversation, known: Set[str]) -> dict[str, Any]:
    """The request's variables of the chat template, those that `reasoning_effort` stands for among them.

    Args:
        known: what the template reads.

    Raises:
        UnsupportedFieldError: it reads nothing that an effort could be told by, or is told otherwise.
    """
    given, effort = body.chat_template_kwargs or {}, body.reasoning_effort
    if effort is None:
        return given
    told: dict[str, Any] = {name: effort != "none" for name in _SWITCHES if name in known}
    if "reasoning_effort" in known and (effort != "none" or not told):
        told["reasoning_effort"] = effort
    if not told and effort != "none":
        message = "reasoning_effort: this model's chat template has neither that variable nor " + " or ".join(
            _SWITCHES
        )
        raise UnsupportedFieldError(message, param="reasoning_effort")
    if other := [name for name, value in told.items() if given.get(name, value) != value]:
        message = f"reasoning_effort {effort!r} and chat_template_kwargs.{other[0]} say different things"
        raise UnsupportedFieldError(message, param="reasoning_effort")
    return {**told, **given}


def thought_of(
    body: ChatRequest,
    form: AnyThoughtFormat | None,
    text: TextProcessor,
    prompt: Sequence[int],
    *,
    calls: AnyToolFormat,
) -> AnyThought | None:
    """What the answers may begin with; None where nothing is told from content.

    Args:
        calls: how the model writes them; those of harmony are told from other messages where thoughts are.

    Raises:
        UnsupportedFieldError: there is to be none of it, and that cannot be had.
    """
    if form is None:
        if body.include_reasoning is False:
            raise UnsupportedFieldError(
                "include_reasoning: this server tells no reasoning from content (see --reasoning-parser)",
                param="include_reasoning",
            )
        if isinstance(calls, HarmonyCalls) and body.callable_tools:
            messages = calls.marks.thought(text, prompt, body.begun_text)
            return replace(messages, calls=True, told_apart=False)
        return None
    thought = form.thought(text, prompt, body.begun_text)
    check_effort(body, thought)
    if isinstance(thought, HarmonyThought):
        return replace(thought, calls=isinstance(calls, HarmonyCalls) and bool(body.callable_tools))
    return thought


def check_effort(body: Conversation, thought: AnyThought) -> None:
    """Raises UnsupportedFieldError where there is to be no thought, and the prompt has opened one."""
    if body.reasoning_effort == "none" and thought.place == "within":
        message = "reasoning_effort: this model's chat template opens a thought whatever is asked for"
        raise UnsupportedFieldError(message, param="reasoning_effort")


def begun_content(body: ChatRequest, form: AnyThoughtFormat | None) -> str:
    """The content that the answers go on with; empty where they have it all."""
    begun = body.begun_text
    return begun if form is None else form.behind_thought(begun)


def with_thought(
    constraint_of: Callable[[], Constraint] | None,
    form: AnyThoughtFormat | None,
    thought: AnyThought | None,
    effort: str | None,
    *,
    calls: bool,
) -> Callable[[], Constraint] | None:
    """What writes the grammar of answers, which begins behind their thoughts: these are free.

    Args:
        effort: `reasoning_effort`; with "none" no thought may come before what follows the grammar.
        calls: the grammar is of calls.

    Raises:
        RequestError: as `HarmonyFormat.lead`.
    """
    if constraint_of is None:
        return None
    lead = ""
    if isinstance(form, HarmonyFormat):
        assert isinstance(thought, HarmonyThought)
        lead = form.lead(thought, thinks=effort != "none", calls=calls)
    elif form is not None and isinstance(thought, Thought) and effort != "none":
        lead = form.lead(thought)
    if not lead:
        return constraint_of
    write = constraint_of

    def led() -> Constraint:
        constraint = write()
        return constraint._replace(spec=constraint.spec._replace(lead=lead))

    return led
