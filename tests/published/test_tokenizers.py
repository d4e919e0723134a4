"""Published tokenizers in a TextProcessor."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from engine.model.weights import load_tokenizer
from engine.text import TextProcessor, TokenText
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


def test_text_comes_back_from_its_tokens(folder: Path, text: TextProcessor) -> None:
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in TEXTS:
        ids = text.encode(sample, add_special_tokens=False)
        assert ids == published.encode(sample, add_special_tokens=False).ids
        detokenizer = text.detokenizer([])
        streamed = "".join(detokenizer.push([token]).text for token in ids)
        assert streamed + detokenizer.push([], final=True).text == published.decode(ids)


def test_it_is_what_its_files_say(folder: Path, text: TextProcessor) -> None:
    """BOS as tokenizer.json has it, since transformers 5 no longer asks `add_bos_token`."""
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in TEXTS:
        assert text.encode(sample) == published.encode(sample).ids
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    assert text.tokenizer.chat_template == template
    special = {i for i, token in published.get_added_tokens_decoder().items() if token.special}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        content = token["content"] if isinstance(token, dict) else token
        assert getattr(text.tokenizer, name) == content
        if content is not None:  # special by this alone in some
            special.add(published.token_to_id(content))
    ids = {*range(text.vocab_size), *published.get_added_tokens_decoder()}  # which may begin behind a gap
    assert {i for i in ids if text.token_text(i).data is None} == special


def test_random_tokens_stream_as_their_bytes_whatever_the_cuts(text: TextProcessor) -> None:
    """Of every id, most of them rare: parts of characters, added and special tokens, some of no token."""
    rng = random.Random(1)
    size = text.vocab_size
    odd = [token for token in range(size) if _is_odd(text.token_text(token))]
    for turn in range(150):
        skip, aligned = bool(turn % 2), turn % 3 == 0
        prompt, ids = (
            [rng.choice((rng.randrange(size + 9), rng.choice(odd))) for _ in range(rng.randrange(40))]
            for _ in range(2)
        )
        detokenizer = text.detokenizer(prompt, skip_special_tokens=skip, aligned=aligned)
        streamed, starts, place = "", [], 0
        while place < len(ids):
            push = ids[place : place + rng.randrange(1, 6)]
            delta = detokenizer.push(push)
            streamed, starts, place = streamed + delta.text, [*starts, *delta.starts], place + len(push)
        delta = detokenizer.push([], final=True)
        streamed, starts = streamed + delta.text, [*starts, *delta.starts]
        read = [text.token_text(token, special_is_text=not skip) for token in ids]
        expected = b"".join(token.data or b"" for token in read).decode("utf-8", "replace")
        assert _squeezed(streamed) == _squeezed(expected)
        whole = text.decode(ids, skip_special_tokens=skip)
        if "\ufffd" not in streamed or isinstance(text.tokenizer.backend_tokenizer.decoder, ByteLevel):
            assert streamed == whole
        if aligned:
            assert len(starts) == len(ids)
            assert starts == sorted(starts)
            if "\ufffd" not in streamed:
                before = [b"".join(token.data or b"" for token in read[:n]) for n in range(len(ids))]
                assert starts == [len(data.decode("utf-8", "ignore")) for data in before]


def _is_odd(token: TokenText) -> bool:
    return token.data is None or "\ufffd" in token.text or token.text.startswith("<")


def _squeezed(text: str) -> str:
    """A decoder may write one for a broken character or one for each of its bytes."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_text_needs_no_window(text: TextProcessor) -> None:
    """Ten times the time a token, and text of broken bytes that depends on how it is cut."""
    assert text._spelling is not None


def test_a_stop_string_is_found_across_tokens_and_within_characters(text: TextProcessor) -> None:
    sample = "The answer: 日本語 😀👩‍👩‍👧 <stop> more"
    ids = text.encode(sample, add_special_tokens=False)
    for stop in ("本", "😀👩", "\u200d👧 <", "wer: 日", "<stop>", "op> m"):
        for include in (False, True):
            detokenizer = text.detokenizer([], stop=(stop,), include_stop=include)
            deltas = [detokenizer.push([token]) for token in ids]
            joined = "".join(delta.text for delta in deltas) + detokenizer.push([], final=True).text
            before = sample.index(stop)
            assert joined == sample[: before + (len(stop) if include else 0)]
            used = sum(delta.num_tokens for delta in deltas)
            bytes_used = b"".join(text.token_text(token).data or b"" for token in ids[:used])
            assert sample[: before + len(stop)].encode() in bytes_used
            least = text.detokenizer([], stop=(stop,), min_tokens=used)
            assert least.push(ids, final=True).text == sample


def test_a_bad_word_covers_how_the_word_is_written_in_a_sentence(text: TextProcessor) -> None:
    for word in ("Paris", "naïve", "日本", "New York", "déjà vu", "straightforwardly"):
        sequences = text.encode_bad_words([word])
        for sentence in (f"I say {word}", f"{word} it is", f"A line.\n{word}!", f"{word}, or {word}."):
            ids = text.encode(sentence, add_special_tokens=False)
            assert any(
                tuple(ids[at : at + len(sequence)]) == sequence
                for sequence in sequences
                for at in range(len(ids))
            ), (sentence, sequences)
