"""Mistral's own tokenizer file, `tekken.json`: where a model has no other, and where its other is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["convert", "find_tekken", "split_as_stated"]

log = logging.getLogger(__name__)


def find_tekken(folder: Path) -> Path | None:
    """A model folder's tekken.json, if it has one."""
    path = folder / "tekken.json"
    return path if path.is_file() else None


def convert(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a tekken.json by transformers' conversion, with the chat template that lies beside it.

    Raises:
        ModelError: the file is not one, or it is of an older form and mistral-common is not installed.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral import convert_tekken_tokenizer

    try:
        tokenizer: Any = convert_tekken_tokenizer(str(path))
    except ImportError as error:
        raise ModelError(f"{path} does not name its special tokens; pip install mistral-common") from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    found: PreTrainedTokenizerBase = tokenizer
    return found


def split_as_stated(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Have a byte-level tokenizer cut text where the model's tekken.json says.

    The tokenizer.json of some (Mistral Small 3.1 and others that early conversions made) cuts elsewhere, and
    its tokens are then not those of the training:
    https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503/discussions/84

    Raises:
        ModelError: the file cannot be read.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    try:
        pattern = str(json.loads(path.read_text(encoding="utf-8"))["config"]["pattern"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    parts = tokenizer.backend_tokenizer.pre_tokenizer
    if not isinstance(parts, Sequence) or not isinstance(parts[0], Split):
        return
    if json.loads(parts[0].__getstate__())["pattern"] == {"Regex": pattern}:
        return
    parts[0] = Split(Regex(pattern), behavior="isolated")
    log.warning("tokenizer.json cuts text elsewhere than tekken.json beside it; tekken.json's way is taken")
