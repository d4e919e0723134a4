"""The language model inside a checkpoint that holds a vision model too (Gemma 3 from 4B on, Mistral 3)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from engine.model.files import TensorFile

__all__ = ["TextPartFile", "as_text", "has_vision_part", "is_vision"]

log = logging.getLogger(__name__)

_TEXT = {
    "language_model.model.": "model.",  # as published, and as transformers saves it
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",  # transformers' own names in memory, which some tools write
}
"""What a tensor of the language model begins with there, and in a checkpoint of it alone."""

_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def has_vision_part(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a language model among others."""
    return any(name.startswith(tuple(_TEXT)) for name in names)


class TextPartFile:
    """The checkpoint without its vision tensors, the others named as in a checkpoint of text alone.

    Args:
        files: the checkpoint's tensors, by name.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files
        self._stored = {as_text(name): name for name in files if not is_vision(name)}
        log.info(
            "of this model the text part is loaded, not the %d tensors for images",
            len(files) - len(self._stored),
        )

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return self._files[stored].get(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        return self._files[stored].shape(stored)


def is_vision(name: str) -> bool:
    """Whether a tensor is a vision model's, or of what lies between the two."""
    return name.startswith(_VISION)


def as_text(name: str) -> str:
    """The name of a tensor of the language model in a checkpoint of it alone; others keep theirs."""
    for prefix, own in _TEXT.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
