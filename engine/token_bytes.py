"""What bytes a vocabulary's tokens stand for, where a text is its tokens' bytes joined."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder

__all__ = ["EACH_BYTE", "FALLBACK_BYTE", "Spelling", "spelling_of"]

FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies of characters spell the bytes of those that they do not have."""

EACH_BYTE = "medusa_each_byte"
"""Name of a handler for `bytes.decode`: U+FFFD for each byte that is part of no character."""


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of a vocabulary spell bytes.

    Args:
        bytes_of: of a token's own name (`Ġhello`, `▁hello`).
        errors: the handler, as of `bytes.decode`, for bytes that are no character.
        drops_space: a text's first space, where it begins with one, is not part of it.
    """

    bytes_of: Callable[[str], bytes]
    errors: str = "replace"
    drops_space: bool = False


def spelling_of(decoder: Decoder | None) -> Spelling | None:
    """What a tokenizer's decoder does with its tokens; None where a token's text may depend on others."""
    from tokenizers.decoders import ByteLevel  # late, as transformers is

    if isinstance(decoder, ByteLevel):
        return Spelling(_byte_level)
    steps = _steps(decoder)
    if steps[:3] != _FALLBACK or steps[3:] not in ([], [_STRIP]):
        return None
    return Spelling(_fallback, EACH_BYTE, drops_space=bool(steps[3:]))


def _steps(decoder: Decoder | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return list(described.get("decoders", ()))


_FALLBACK: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
"""Of Llama 2, Mistral, Gemma, Yi; the first and some others then drop the space that encoding adds."""
_STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _fallback(name: str) -> bytes:
    if byte := FALLBACK_BYTE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace("▁", " ").encode()


def _byte_level(name: str) -> bytes:
    """A token that is not spelled in GPT-2's alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF[char] for char in name])
    except KeyError:
        return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
