"""What a call in a model's text is to the one who reads it, whatever its form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

__all__ = ["Call", "Functions"]

Functions = Mapping[str, Mapping[str, Any] | None]
"""Those that may be called: by name the JSON schema of their arguments, None for a function without."""


class Call(ABC):
    """A call, as it arrives.

    Attributes:
        opening: with what a call begins, if that is enough to open calls; empty if it is not.
        behind: the form of those that stand behind this one in a list; None if that is the same.
        ended: nothing more belongs to it.
        failed: it is no call.
        name: the function's, once it is known that this is a call: with its first arguments.
        arguments: what the last `feed` brought of them, in JSON.
        alone: only what opens calls may bring another one.
    """

    opening: ClassVar[str] = ""
    behind: ClassVar[type[Call] | None] = None

    def __init__(self) -> None:
        self.ended = self.failed = self.alone = False
        self.name = self.arguments = ""

    @classmethod
    @abstractmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        """The call that a text begins with, and how much of the text was read for that.

        Args:
            text: not empty.
            functions: that may be called.

        Returns:
            True where more text is needed to tell, False where no call begins so.
        """

    @abstractmethod
    def feed(self, text: str) -> int:
        """Read what belongs to the call; returns how many characters that is.

        What is left comes again, with more text behind it, unless the call has ended or failed.
        """

    def last(self, text: str) -> str:  # noqa: ARG002 - for forms that hold text back
        """More arguments, where this text is what is left of the answer."""
        return ""
