"""Published tokenizers in a TextProcessor."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from tests.published.sources import TOKENIZERS, tokenizer_dir

TEXTS = (
    "Hello, world!",
    "  two spaces,\ttab\n\n\nand lines\r\n",
    "Ünïcode: 日本語, русский, ไทย, עברית, हिन्दी 😀👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x ** 2  # 1234567.89\n",
    "don't we'll I'M <|not_special|> </s <think",
)


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def folder(request: pytest.FixtureRequest) -> Path:
    return tokenizer_dir(request.param)


@pytest.fixture(scope="module")
def text(folder: Path) -> TextProcessor:
    return TextProcessor(load_tokenizer(folder))


@pytest.mark.parametrize("sample", TEXTS)
def test_text_comes_back_from_its_tokens(folder: Path, text: TextProcessor, sample: str) -> None:
    ids = text.encode(sample, add_special_tokens=False)
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ids == published.encode(sample, add_special_tokens=False).ids
    detokenizer = text.detokenizer([])
    streamed = (
        "".join(detokenizer.push([token]).text for token in ids) + detokenizer.push([], final=True).text
    )
    assert streamed == published.decode(ids)
