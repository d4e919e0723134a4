"""What is asked: prompts, OpenAI messages, ShareGPT conversations, or nothing but a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.text import TextProcessor

__all__ = ["Asked", "hash64", "read_asked", "self_prompted", "user_turn_start"]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}

_MARK = "\N{BLACK SQUARE FOR STOP}"


@dataclass(frozen=True, slots=True)
class Asked:
    """One conversation's side of the user.

    Args:
        key: 64-bit hash of it.
        system: the system message; None leaves it to the chat template.
        users: user turns in order; empty where the model samples them.
    """

    key: int
    system: str | None
    users: tuple[str, ...]


def hash64(*parts: object) -> int:
    """A 64-bit hash of these parts' text, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def self_prompted(number: int, seed: int) -> Asked:
    """The number-th conversation that the model asks itself."""
    return Asked(hash64("self-prompt", seed, number), None, ())


def read_asked(paths: Sequence[Path]) -> list[Asked]:
    """The distinct conversations of JSONL files, in order. Answers in them are left out.

    A line is {"prompt": text}, {"turns": [text, …]}, {"messages": [{"role", "content"}, …]} or
    {"conversations": [{"from", "value"}, …]} (ShareGPT).

    Raises:
        ConfigError: a file cannot be read, or a line is none of these; the text names it.
    """
    found: dict[int, Asked] = {}
    for path in paths:
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                system, users = _parse(json.loads(line))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: {error}; give 'prompt', 'turns', 'messages' or 'conversations'"
                ) from None
            key = hash64(system or "", *users)
            found.setdefault(key, Asked(key, system, users))
    return list(found.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _parse(item: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    if "prompt" in item:
        messages = [("user", item["prompt"])]
    elif "turns" in item:
        messages = [("user", turn) for turn in item["turns"]]
    elif "messages" in item:
        messages = [(message["role"], _text(message["content"])) for message in item["messages"]]
    else:
        messages = [(_SHAREGPT_ROLES[message["from"]], message["value"]) for message in item["conversations"]]
    system = next((text for role, text in messages if role in ("system", "developer")), None)
    users = tuple(text for role, text in messages if role == "user")
    if unknown := {role for role, _ in messages} - {"system", "developer", "user", "assistant", "tool"}:
        raise ValueError(f"unknown role {', '.join(sorted(map(str, unknown)))}")
    if not users or not all(isinstance(text, str) and text.strip() for text in users):
        raise ValueError("no user turn, or an empty one")
    return system, users


def _text(content: Any) -> Any:
    """OpenAI's content is a text or a list of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content


def user_turn_start(text: TextProcessor, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of the conversation up to where the user's next turn begins.

    Raises:
        ConfigError: the chat template changes what the user says, so that its place cannot be found.
    """
    rendered = str(
        text.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": _MARK}], add_generation_prompt=False, tokenize=False
        )
    )
    start, found, _ = rendered.partition(_MARK)
    if not found:
        raise ConfigError("--self-prompt: the model's chat template does not write the user's turn as it is")
    return text.encode(start, add_special_tokens=False)
