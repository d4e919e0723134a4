"""A model that writes harmony: its marks' tokens, where its prompts leave an answer, grammars of messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from engine.errors import RequestError
from engine.harmony import HarmonyThought, Marks, is_harmony

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["HarmonyFormat", "ends_of", "writes_harmony"]

_ROLE = "assistant"
_LONGEST_TAIL = 64
"""Tokens of a prompt's end in which a message is looked for that begins with no token of its own."""

_SPELLED = "|".join(re.escape(mark.strip("<|>")) for mark in Marks.ALL)


@dataclass(frozen=True, slots=True)
class HarmonyFormat:
    """The marks of a model's messages: what `engine.reasoning.ThoughtFormat` is to other models.

    Args:
        ids: of `Marks.ALL`, in order; None for one that is no token of its own.
        text_ids: other tokens that are no text to a grammar, and are text.
    """

    ids: tuple[int | None, ...] = (None,) * len(Marks.ALL)
    text_ids: tuple[int, ...] = ()

    name: ClassVar[Literal["harmony"]] = "harmony"

    @classmethod
    def of(cls, text: TextProcessor) -> HarmonyFormat:
        """With the tokens of this vocabulary."""
        ids = tuple(map(text.own_token_id, Marks.ALL))
        return cls(ids, tuple(token for token in text.own_text_ids if token not in ids))

    @property
    def shown(self) -> frozenset[int]:
        """Tokens that have to be in the text for messages to be found there, also where they are special."""
        return frozenset(token for token in self.ids if token is not None)

    def thought(self, text: TextProcessor, prompt: Sequence[int], begun: str = "") -> HarmonyThought:
        """Where the answer to a prompt begins: see `ThoughtFormat.thought`."""
        if begun.strip():
            return HarmonyThought(f"{_ROLE}{Marks.CHANNEL}final{Marks.MESSAGE}")
        start = self.ids[Marks.ALL.index(Marks.START)]
        behind = next((i for i, token in enumerate(reversed(prompt), 1) if token == start), _LONGEST_TAIL)
        written = text.decode(prompt[-behind:], skip_special_tokens=False)
        _, mark, message = written.rpartition(Marks.START)
        ended = any(each in message for each in Marks.CLOSING)
        if not mark:  # such as of a template without any
            return HarmonyThought(_ROLE)
        return HarmonyThought(None if ended else message)

    def behind_thought(self, begun: str) -> str:
        """What of an answer's beginning is no thought: all, for templates refuse marks in a message."""
        return begun

    def lead(self, thought: HarmonyThought, *, thinks: bool, calls: bool) -> str:
        """What may stand before an answer that has to follow a grammar: `GrammarSpec.lead`.

        Args:
            thought: where the answer begins.
            thinks: there may be thoughts.
            calls: the grammar is of whole messages, as those of calls are; else of the last one's text.

        Raises:
            RequestError: messages cannot begin where the answer does, or marks are no tokens.
        """
        place, rules = thought.place, self.rules()
        if place == "behind":
            if calls:
                param = "continue_final_message"
                reason = "calls that follow a grammar are messages of their own with this model"
                raise RequestError(f"{param}: {reason}", param=param)
            return ""
        begun = thought.begun
        first = f"said {self.following}" if place == "within" else ""
        if begun is None:
            first = f'{self.token(Marks.START)} "{_ROLE}"'
        elif not first and begun.strip() != _ROLE:
            reason = (
                "this chat template leaves the answer in the middle of a header, where no grammar can begin"
            )
            raise RequestError(reason)
        thoughts = "analysis*" if thinks else ""
        answer = "@answer" if calls else f"{self.header('final')} @answer"
        return "\n".join(["%llguidance {}", f"start: {first} {thoughts} {answer}", *rules])

    def rules(self) -> list[str]:
        """Of a grammar in llguidance's form of Lark: `analysis`, a thought and what opens the next message;
        `said`, text of a message; `TYPE`, of content."""
        more = f"(TEXT <[{','.join(map(str, self.text_ids))}]>)* " if self.text_ids else ""
        return [
            f"analysis: {self.header('analysis')} said {self.following}",
            f"said: {more}TEXT",
            # Marks that are spelled with letters would be read as such.
            rf"TEXT: /(.|\n)*/ & ~/(.|\n)*<\|({_SPELLED})\|>(.|\n)*/",
            "TYPE: /[a-zA-Z_]{1,16}/",
        ]

    def header(self, channel: str) -> str:
        """In such a grammar what stands before a message's text, from the channel on."""
        typed = f' (" "? {self.token(Marks.CONSTRAIN)} TYPE)?' if channel == "final" else ""
        return f'{self.token(Marks.CHANNEL)} "{channel}"{typed} {self.token(Marks.MESSAGE)}'

    @property
    def following(self) -> str:
        """In such a grammar what ends a message and begins another."""
        return f'{self.token(Marks.END)} {self.token(Marks.START)} "{_ROLE}"'

    def token(self, mark: str) -> str:
        """In such a grammar. Raises RequestError where it is none of the vocabulary's own."""
        token = self.ids[Marks.ALL.index(mark)]
        if token is None:
            raise RequestError(
                f"this model's vocabulary has no token {mark}, and so no answer can follow a grammar"
            )
        return f"<[{token}]>"


def writes_harmony(text: TextProcessor) -> bool:
    """Whether a model's chat template shows the format."""
    return any(is_harmony(text.chat_template_for(tools=tools) or "") for tools in (False, True))


def ends_of(text: TextProcessor, stated: Iterable[int]) -> tuple[int, ...]:
    """The tokens that end an answer: what a model's files state, and what its format says.

    A call ends one as the answer's end does, and the end of a message, which some files state, does not.
    """
    if not writes_harmony(text):
        return tuple(stated)
    call, last, end = (text.own_token_id(mark) for mark in (Marks.CALL, Marks.RETURN, Marks.END))
    ends = [*stated, *(token for token in (last, call) if token is not None)]
    return tuple(dict.fromkeys(token for token in ends if token != end))
