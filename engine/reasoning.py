"""Ways in which models write what they think before they answer, and where a prompt leaves that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from engine.harmony_format import HarmonyFormat, writes_harmony
from engine.thought import Place, Thought, ThoughtReader

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["THOUGHT_FORMATS", "AnyThoughtFormat", "ThoughtFormat", "thought_format_of"]

_PROMPT_END = 32
"""Tokens of a prompt's end in which a mark is looked for, with the white space behind it: a mark that is no
token of its own is a few, a letter each at most."""


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """One way of marking a thought.

    Args:
        name: as the setting has it.
        begin: what opens a thought, text or a token of its own.
        end: what closes it.
        begin_id, end_id: of `begin` and `end`, where they are tokens of their own, which are no text to a
            grammar and, where they are special, are left out of texts otherwise.
        text_ids: other tokens that are no text to a grammar, and are text.
    """

    name: Literal["think", "mistral", "seed_oss"]
    begin: str
    end: str
    begin_id: int | None = None
    end_id: int | None = None
    text_ids: tuple[int, ...] = ()

    @property
    def shown(self) -> frozenset[int]:
        """Tokens that have to be in the text for thoughts to be found there, also where they are special."""
        return frozenset(token for token in (self.begin_id, self.end_id) if token is not None)

    def thought(self, text: TextProcessor, prompt: Sequence[int], begun: str = "") -> Thought:
        """Where the answer to a prompt stands in its thought.

        Templates open a thought for the model, leave that to it, or close it at once where none is wanted;
        only the end of what they wrote tells.

        Args:
            text: that the prompt was encoded with.
            prompt: its tokens.
            begun: the answer's beginning, where that is the last of the messages: an answer that has begun
                has its thought behind it, unless it has begun with one and not closed it.
        """
        return Thought(self.begin, self.end, self._place(text, prompt, begun))

    def behind_thought(self, begun: str) -> str:
        """What of an answer's beginning is no thought."""
        return ThoughtReader(self.begin, self.end, within=False).feed(begun, final=True)[1]

    def _place(self, text: TextProcessor, prompt: Sequence[int], begun: str) -> Place:
        if begun.strip():
            reader = ThoughtReader(self.begin, self.end, within=False)
            reader.feed(begun, final=True)
            return "within" if reader.within else "behind"
        end = text.decode(prompt[-_PROMPT_END:], skip_special_tokens=False).rstrip()
        if end.endswith(self.begin):
            return "within"
        return "behind" if end.endswith(self.end) else "before"

    def lead(self, thought: Thought) -> str:
        """What may stand before an answer that has to follow a grammar: `GrammarSpec.lead`."""
        if thought.place == "behind":
            return ""
        opening, end = json.dumps(self.begin), ""
        if self.begin_id is not None:
            opening = f"(<[{self.begin_id}]> | {opening})"
        if self.end_id is not None:
            end = f" | TEXT <[{self.end_id}]>"
        thinks = "thought SPACE"
        return "\n".join(
            [
                "%llguidance {}",
                f"start: {thinks if thought.place == 'within' else f'({opening} {thinks})?'} @answer",
                # Lazy: as soon as the text spells what closes it, it is closed. A token is no part of text.
                f"thought: said (closed{end})",
                f"said: (TEXT <[{','.join(map(str, self.text_ids))}]>)*" if self.text_ids else 'said: ""',
                rf"closed[lazy]: /(.|\n)*/ {json.dumps(self.end)}",
                r"TEXT: /(.|\n)*/",
                rf"SPACE: /\s{{0,{_MOST_SPACE}}}/",
            ]
        )


_MOST_SPACE = 4
"""White space between a thought and an answer that follows a grammar: models have learnt to write some."""

THOUGHT_FORMATS: dict[str, ThoughtFormat] = {
    each.name: each
    for each in (
        ThoughtFormat("think", "<think>", "</think>"),
        ThoughtFormat("mistral", "[THINK]", "[/THINK]"),
        ThoughtFormat("seed_oss", "<seed:think>", "</seed:think>"),
    )
}
"""By name: of DeepSeek-R1, which nearly all others share, of Magistral, and of ByteDance's Seed-OSS."""


AnyThoughtFormat = ThoughtFormat | HarmonyFormat


def thought_format_of(text: TextProcessor, name: str = "auto") -> AnyThoughtFormat | None:
    """The way a model marks its thoughts; None where it is not known to have any.

    Args:
        text: has the model's template and tokens.
        name: of a format, "none", or "auto" for the one that the template shows or, else, the vocabulary has.
    """
    if name == "none":
        return None
    if name == HarmonyFormat.name or (name == "auto" and writes_harmony(text)):
        return HarmonyFormat.of(text)
    added = text.tokenizer.get_added_vocab()
    if name == "auto":
        templates = "".join(text.chat_template_for(tools=tools) or "" for tools in (False, True))
        known = [
            form for form in THOUGHT_FORMATS.values() if form.begin in templates or form.end in templates
        ]
        known += [form for form in THOUGHT_FORMATS.values() if form.begin in added and form.end in added]
        if not known:
            return None
        name = known[0].name
    chosen = THOUGHT_FORMATS[name]
    begin, end = text.own_token_id(chosen.begin), text.own_token_id(chosen.end)
    others = tuple(token for token in text.own_text_ids if token != end)
    return replace(chosen, begin_id=begin, end_id=end, text_ids=others)
