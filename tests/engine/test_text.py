"""The detokenizer against plain decoding, stop strings against a search in the whole text."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import TextDelta
from engine.errors import RequestError
from engine.model.embedded import ensure_converted
from engine.model.weights import load_tokenizer
from engine.sampling_params import MAX_BAD_WORDS
from engine.text import TextProcessor, TokenText
from tests.letters import sentencepiece_tokenizer

EOS = 2
EMOJI = (10813, 242, 218)  # 😀 in SmolLM2's tokens
FIRST_BYTE, FIRST_WORD = 3, 3 + 256  # of the sentencepiece-like vocabulary
LLAMA2_WORDS = ["▁", "▁Hello", "▁world", "lo", "He", "a", "b", "▁a", "!", "é"]


@functools.cache
def smol() -> TextProcessor:
    """The embedded model's byte-level tokenizer. Not a fixture: strategies need it too."""
    return TextProcessor(load_tokenizer(ensure_converted()))


@functools.cache
def windowed() -> TextProcessor:
    """The same without the byte-level shortcut: what any other kind of vocabulary goes through."""
    tokenizer = load_tokenizer(ensure_converted())
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return TextProcessor(tokenizer)


@functools.cache
def byte_ids() -> list[int]:
    """Its tokens of one byte; those above 127 come last."""
    vocab = smol().tokenizer.get_vocab()
    return sorted(vocab[token] for token in pre_tokenizers.ByteLevel.alphabet() if token in vocab)


@functools.cache
def llama2() -> TextProcessor:
    """Llama 2's decoder: ▁ for a space, bytes for what is not in the vocabulary, the first space dropped."""
    return TextProcessor(sentencepiece_tokenizer(*LLAMA2_WORDS, drops_space=True))


@functools.cache
def llama2_windowed() -> TextProcessor:
    """The same, with a decoder that is not recognised."""
    tokenizer = sentencepiece_tokenizer(*LLAMA2_WORDS, drops_space=True)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([tokenizer.backend_tokenizer.decoder])
    return TextProcessor(tokenizer)


class Counting(TextProcessor):
    """Counts the tokens it decodes."""

    decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def stream(
    processor: TextProcessor,
    prompt: Sequence[int],
    pushes: Sequence[Sequence[int]],
    *,
    stop: tuple[str, ...] = (),
    skip: bool = True,
) -> tuple[str, int, str | None]:
    """All text, the tokens that count, and the stop string, of an output that arrives as `pushes`."""
    detokenizer = processor.detokenizer(prompt, stop=stop, skip_special_tokens=skip)
    last = len(pushes) - 1
    deltas = [detokenizer.push(push, final=index == last) for index, push in enumerate(pushes)]
    return "".join(d.text for d in deltas), sum(d.num_tokens for d in deltas), deltas[-1].stop


def flat(pushes: Sequence[Sequence[int]]) -> list[int]:
    return [token for push in pushes for token in push]


def pieces(*kinds: st.SearchStrategy[list[int]], max_size: int = 60) -> st.SearchStrategy[list[int]]:
    return st.lists(st.one_of(*kinds), max_size=max_size).map(flat)


@st.composite
def cuts(draw: st.DrawFn, tokens: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """A list of ids, cut into pushes, of which some may be empty."""
    ids = draw(tokens)
    places = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids) + 1)))
    return [ids[a:b] for a, b in itertools.pairwise([0, *places, len(ids)])]


WORDS = [
    "😀",
    "a",
    "ab",
    " ab",
    "\n",
    "é",
    "日本",
    " the",
    "\ufffd",
    "👩‍👩‍👧",
    "def f(x):\n    return 5",
    "  7",
]
ANY_ID = st.integers(0, 49151).map(lambda token: [token])
BYTE = st.integers(0, 234).map(lambda index: [byte_ids()[index]])
SPECIAL = st.integers(0, 16).map(lambda token: [token])
WORD = st.sampled_from(WORDS).map(lambda text: smol().encode(text))
IDS = pieces(ANY_ID, BYTE, SPECIAL, WORD)
# Few characters, whole and open, and a token without text: stop strings are met and parted.
FEW = pieces(
    st.sampled_from(["a", "b", "ab", "ba", "aba", "é", "\n"]).map(lambda text: smol().encode(text)),
    st.sampled_from([[EOS], [EMOJI[0]], [*EMOJI]]),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(cuts(IDS), IDS, st.booleans())
def test_pushes_joined_are_the_decoded_output(pushes: list[list[int]], prompt: list[int], skip: bool) -> None:
    expected = smol().tokenizer.decode(flat(pushes), skip_special_tokens=skip)
    for processor in (smol(), windowed()):
        assert stream(processor, prompt, pushes, skip=skip) == (expected, len(flat(pushes)), None)


@settings(deadline=None, max_examples=60)
@given(cuts(st.lists(st.integers(100, 235), min_size=40, max_size=150)))
def test_bytes_that_are_no_utf8_survive_the_window(pushes: list[list[int]]) -> None:
    ids = [[EOS if index == 235 else byte_ids()[index] for index in push] for push in pushes]
    for processor in (smol(), windowed()):
        assert stream(processor, [], ids)[0] == smol().tokenizer.decode(flat(ids), skip_special_tokens=True)


@st.composite
def stops_of(draw: st.DrawFn, whole: str) -> list[str]:
    """Stop strings that may be in the text, may begin in it, or repeat themselves."""
    within = st.tuples(st.integers(0, len(whole)), st.integers(1, 8)).map(lambda at: whole[at[0] : sum(at)])
    tail = st.text("abé", max_size=2)
    kinds = st.one_of(st.builds(str.__add__, within, tail), st.text("ab", min_size=1, max_size=6))
    return draw(st.lists(kinds.filter(lambda s: s and "\ufffd" not in s), min_size=1, max_size=4))


@settings(deadline=None, max_examples=60)
@given(cuts(FEW), st.data())
def test_stop_strings_are_found_as_in_the_whole_text(pushes: list[list[int]], data: st.DataObject) -> None:
    ids = flat(pushes)
    whole = smol().decode(ids)
    stops = data.draw(stops_of(whole))
    expected: tuple[str, int, str | None] = (whole, len(ids), None)
    for end in range(1, len(whole) + 1):
        if complete := [stop for stop in stops if whole[:end].endswith(stop)]:
            stop = max(complete, key=len)
            used = next(n for n in range(len(ids) + 1) if smol().decode(ids[:n]).startswith(whole[:end]))
            expected = (whole[: end - len(stop)], used, stop)
            break
    # The prompt ends in every stop string's beginning: none of it may count.
    for processor in (smol(), windowed()):
        assert stream(processor, smol().encode("ab\naba"), pushes, stop=tuple(stops)) == expected


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_sentencepiece_output_keeps_the_space_the_prompt_earns_it(data: st.DataObject) -> None:
    character = st.sampled_from("日é😀").map(lambda c: [FIRST_BYTE + byte for byte in c.encode()])
    word = st.integers(FIRST_WORD, FIRST_WORD + 9).map(lambda token: [token])
    tokens = pieces(word, character, st.sampled_from([[1], [2]]), max_size=80)
    prompt, pushes = data.draw(tokens), data.draw(cuts(tokens))

    before, both = llama2().decode(prompt), llama2().decode(prompt + flat(pushes))
    for processor in (llama2(), llama2_windowed()):
        assert stream(processor, prompt, pushes)[0] == both[len(before) :]


@pytest.mark.parametrize("of", [llama2, llama2_windowed])
def test_sentencepiece_spaces_by_example(of: Callable[[], TextProcessor]) -> None:
    hello, world = of().tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert stream(of(), [], [[hello], [world]])[0] == "Hello world"
    assert stream(of(), [1], [[hello, world]])[0] == "Hello world"
    assert stream(of(), [1, hello], [[world]])[0] == " world"
    # More special tokens at the prompt's end than any fixed context would hold.
    assert stream(of(), [1, hello, *[1] * 50], [[world]])[0] == " world"


def test_ids_without_text_do_not_cost_a_space() -> None:
    hello, world = llama2().tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    beyond = [llama2().vocab_size + 1] * 100  # a model's logits may be padded beyond the vocabulary
    pushes = [[token] for token in [hello, *beyond, world]]
    for processor in (llama2(), llama2_windowed()):
        assert stream(processor, [], pushes)[0] == "Hello world"


def test_a_stop_string_that_repeats_its_own_beginning_is_found() -> None:
    ids = [smol().encode(char) for char in "aabaabaac"]
    assert stream(smol(), [], ids, stop=("aabaac",))[::2] == ("aab", "aabaac")


def test_an_open_character_is_held_and_what_is_before_it_is_not() -> None:
    detokenizer = smol().detokenizer([])
    see = smol().encode("see ")
    assert detokenizer.push([*see, *EMOJI[:1]]) == TextDelta("see ", 3, None)
    assert detokenizer.push(EMOJI[1:2]) == TextDelta("", 1, None)
    assert detokenizer.push(EMOJI[2:]) == TextDelta("😀", 1, None)

    bytes_of = [FIRST_BYTE + byte for byte in "é😀".encode()]
    for of in (llama2(), llama2_windowed()):
        assert of.detokenizer([1]).push(bytes_of[:4]).text == "é"
        detokenizer = of.detokenizer([1])
        assert [detokenizer.push([token]).text for token in bytes_of] == ["", "é", "", "", "", "😀"]


def test_an_open_character_at_the_end_is_replaced() -> None:
    detokenizer = smol().detokenizer([])
    assert detokenizer.push(EMOJI[:2]).text == ""
    assert detokenizer.push([], final=True) == TextDelta("\ufffd", 0, None)


def test_a_prompt_that_ends_inside_a_character_leaves_the_output_alone() -> None:
    ids = [*EMOJI[1:], *smol().encode("a")]
    assert stream(smol(), EMOJI[:1], [ids])[0] == smol().decode(ids)


def test_text_that_may_begin_a_stop_string_is_held() -> None:
    detokenizer = smol().detokenizer([], stop=("\n\nUser", "END"))
    assert detokenizer.push(smol().encode("yes\n\nUs")) == TextDelta(
        "yes", len(smol().encode("yes\n\nUs")), None
    )
    assert detokenizer.push(smol().encode("e it.E")).text == "\n\nUse it."
    assert detokenizer.push(smol().encode("N")).text == ""
    assert detokenizer.push([], final=True).text == "EN"


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = smol().detokenizer([], stop=("\n\nUser",))
    assert detokenizer.push(smol().encode("yes\n\nUs")).text == "yes"
    ids = smol().encode("er: and more")
    assert detokenizer.push(ids) == TextDelta("", 1, "\n\nUser")
    assert detokenizer.push(ids, final=True) == TextDelta("", 0, "\n\nUser")


def test_tokens_after_the_stop_string_in_one_push_do_not_count() -> None:
    ids = smol().encode("one two three four")
    assert len(ids) == 4
    assert smol().detokenizer([], stop=("thr", "four")).push(ids) == TextDelta("one two ", 3, "thr")


def test_of_two_stop_strings_the_first_complete_wins_and_then_the_longer() -> None:
    for pushes in (["abcd"], list("abcd")):
        ids = [smol().encode(text) for text in pushes]
        assert stream(smol(), [], ids, stop=("abcd", "bc"))[::2] == ("a", "bc")
        assert stream(smol(), [], ids, stop=("bc", "abc"))[::2] == ("", "abc")


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = [*smol().encode("Hi"), EOS]
    assert stream(smol(), [], [ids])[0] == "Hi"
    assert stream(smol(), [], [ids], skip=False)[0] == "Hi<|im_end|>"
    assert stream(smol(), [], [ids], skip=False, stop=("<|im",)) == ("Hi", 2, "<|im")


@pytest.mark.parametrize(
    "kind", ["text", "special", "invalid", "window", "window special", "window invalid", "bytes"]
)
@pytest.mark.parametrize("step", [1, 3, 4])
def test_cost_per_token_does_not_grow_with_the_output(kind: str, step: int) -> None:
    of, unit = {
        "text": (smol(), smol().encode("Once upon a 日本 time 😀, ")),
        "special": (smol(), [EOS]),
        "invalid": (smol(), byte_ids()[-1:]),
        "window": (windowed(), smol().encode("Once upon a 日本 time 😀, ")),
        "window special": (windowed(), [EOS]),
        "window invalid": (windowed(), byte_ids()[-1:]),
        "bytes": (llama2_windowed(), [FIRST_BYTE + byte for byte in "日".encode()]),
    }[kind]
    processor = Counting(of.tokenizer)
    detokenizer = processor.detokenizer(unit * 1000, stop=("never met",))
    ids = (unit * 3000)[:3000]
    processor.decoded = 0
    texts = [detokenizer.push(ids[start : start + step]).text for start in range(0, len(ids), step)]
    assert processor.decoded <= 160 * len(ids)
    assert "".join(texts) + detokenizer.push([], final=True).text == of.decode(ids)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty") as caught:
        smol().detokenizer([], stop=("a", ""))
    assert caught.value.param == "stop"


def test_encode_and_its_names() -> None:
    assert smol().token_strings(smol().encode("x   5")) == ["x", "ĠĠĠ", "5"]
    assert smol().token_strings([49152 + 5]) == [""]
    assert smol().vocab_size == 49152
    assert llama2().encode("a") == llama2().tokenizer.convert_tokens_to_ids(["▁a"])
    assert smol().decode([*smol().encode("a , b"), EOS]) == "a , b"  # no cleaning up of spaces
    assert smol().decode([EOS], skip_special_tokens=False) == "<|im_end|>"


@settings(deadline=None)  # the first example loads the tokenizers
@given(
    st.lists(st.text() | st.sampled_from([*WORDS, "<|im_start|>", "</s>", "▁"]), max_size=8).map("".join),
    st.booleans(),
)
def test_encode_is_the_tokenizers_own(text: str, special: bool) -> None:
    for processor in (smol(), llama2(), with_bos()):
        assert processor._plain is not None
        own = processor.tokenizer.encode(text, add_special_tokens=special, verbose=False)
        assert processor.encode(text, add_special_tokens=special) == own


@functools.cache
def with_bos() -> TextProcessor:
    """A tokenizer that adds tokens, and whose file asks for truncation and padding."""
    raw = Tokenizer.from_str(smol().tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    return TextProcessor(PreTrainedTokenizerFast(tokenizer_object=raw))


def test_a_tokenizer_with_an_encoder_of_its_own_keeps_it() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **options):  # type: ignore[no-untyped-def]
            return super()._encode_plus(text + "!", *args, **options)

    tokenizer = Own(tokenizer_object=smol().tokenizer.backend_tokenizer)
    assert TextProcessor(tokenizer).encode("a") == smol().encode("a!")


def test_encode_refuses_text_that_is_not_unicode() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        smol().encode("half an emoji: \ud83d")
    with pytest.raises(RequestError, match="surrogate") as caught:
        smol().encode_chat([{"role": "user", "content": "\ud83d"}])
    assert caught.value.param == "messages"


def test_encode_chat_follows_the_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = smol().encode_chat(messages)
    assert ids[0] == 1
    assert ids.count(1) == 3
    assert smol().decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompt = smol().encode_chat(messages, add_generation_prompt=False)
    assert prompt + smol().encode("<|im_start|>assistant\n") == ids


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, [{"role": "user", "content": "Hi"}], "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user"}], "roles must alternate"),
        ("{{ messages[0]['content'] + '!' }}", [{"role": "user", "content": None}], "refuses the messages"),
        ("{{ messages[0].name.first }}", [{"role": "user"}], "refuses the messages"),
        ("{% for %}", [{"role": "user"}], "refuses the messages"),
    ],
)
def test_messages_the_template_refuses(
    template: str | None, messages: list[dict[str, object]], reason: str
) -> None:
    processor = TextProcessor(PreTrainedTokenizerFast(tokenizer_object=llama2().tokenizer.backend_tokenizer))
    processor.tokenizer.chat_template = template
    with pytest.raises(RequestError, match=reason) as caught:
        processor.encode_chat(messages)
    assert caught.value.param == "messages"


@settings(deadline=None, max_examples=60)
@given(cuts(FEW), st.data())
def test_released_tokens_are_those_whose_text_is_out(pushes: list[list[int]], data: st.DataObject) -> None:
    ids = flat(pushes)
    stops = tuple(data.draw(stops_of(smol().decode(ids))))
    # For each token the first character that has a byte of it, and the one behind the last, open or not.
    places, decoder, start = [], codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token in ids:
        text = decoder.decode(smol().token_text(token).data or b"")
        places.append((start, start + len(text) + bool(decoder.getstate()[0])))
        start += len(text)
    for processor in (smol(), windowed()):
        detokenizer = processor.detokenizer([], stop=stops, aligned=True)
        plain, single = (processor.detokenizer([], stop=stops) for _ in range(2))
        out, known, starts, taken = 0, [0], [], 0
        exact = processor is smol() or "\ufffd" not in smol().decode(ids)  # see `WindowText`
        for count, token in enumerate(ids, 1):
            if (one := single.push([token])).num_tokens:
                out += len(one.text)
                # With the stop string's cut inside a token, that token counts, and none after it.
                ended = [end <= out if one.stop is None else start < out for start, end in places[:count]]
                known.append(max(known[-1], sum(ended)))
        for index, push in enumerate(pushes):
            final = index == len(pushes) - 1
            delta, expected = detokenizer.push(push, final=final), plain.push(push, final=final)
            assert dataclasses.replace(delta, starts=()) == expected
            starts += delta.starts
            taken += delta.num_tokens
            over = final and delta.stop is None
            if exact or over:
                assert len(starts) == (len(ids) if over else known[taken])
        assert not exact or starts == [start for start, _ in places[: len(starts)]]


def test_min_tokens_lets_stop_strings_pass_that_are_complete_before() -> None:
    ids = [smol().encode(char)[0] for char in "a.b.c"]
    for least, expected in ((0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c")):
        detokenizer = smol().detokenizer([], stop=(".",), min_tokens=least)
        assert detokenizer.push(ids, final=True).text == expected
    # A stop string that overlaps itself is met again from its own end.
    detokenizer = smol().detokenizer([], stop=("aba",), min_tokens=3)
    assert detokenizer.push([smol().encode(char)[0] for char in "ababa"]) == TextDelta("ab", 5, "aba")


@pytest.mark.parametrize("processor", [smol, llama2])
def test_the_bytes_of_tokens_joined_are_the_text(processor: Callable[[], TextProcessor]) -> None:
    of = processor()
    text = " a日 b😀" if of is llama2() else "a日 b😀\n\tx  ünï<|im_end"
    ids = (
        of.encode(text)
        if of is not llama2()
        else [
            of.tokenizer.convert_tokens_to_ids("▁a"),
            *(FIRST_BYTE + byte for byte in "日".encode()),
            *of.tokenizer.convert_tokens_to_ids(["▁", "b"]),
            *(FIRST_BYTE + byte for byte in "😀".encode()),
        ]
    )
    assert b"".join(of.token_text(token).data or b"" for token in ids).decode() == text


def test_a_token_by_itself() -> None:
    first = smol().token_text(EMOJI[0])
    assert first.text == "\ufffd"
    assert first.data
    assert "😀".encode().startswith(first.data)
    assert smol().token_text(EOS) == TokenText("<|im_end|>", None)
    assert smol().token_text(49152 + 5) == TokenText("", b"")
    assert llama2().token_text(llama2().tokenizer.convert_tokens_to_ids("▁Hello")) == TokenText(
        " Hello", b" Hello"
    )


def test_bad_words_are_encoded_with_and_without_a_space() -> None:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(smol().encode(text))

    assert smol().encode_bad_words(["the", " cat"]) == [encode(t) for t in ("the", " the", "cat", " cat")]
    assert smol().encode_bad_words([]) == []
    long = "colourless green ideas"
    assert smol().encode_bad_words([long]) == [encode(long), encode(" " + long)]
    for words, reason in (
        ([" "], "0 tokens"),
        (["word " * 17], "tokens; it must have"),
        (["the"] * (MAX_BAD_WORDS // 2 + 1), f"make {MAX_BAD_WORDS + 2} token sequences"),
    ):
        with pytest.raises(RequestError, match=reason) as caught:
            smol().encode_bad_words(words)
        assert caught.value.param == "bad_words"


@settings(deadline=None, max_examples=60)
@given(cuts(FEW), st.data())
def test_an_included_stop_string_ends_the_text_and_starts_are_where_tokens_begin(
    pushes: list[list[int]], data: st.DataObject
) -> None:
    ids = flat(pushes)
    stops = tuple(data.draw(stops_of(smol().decode(ids))))
    for processor in (smol(), windowed()):
        bare = processor.detokenizer([], stop=stops)
        whole = processor.detokenizer([], stop=stops, include_stop=True, aligned=True)
        texts, starts = ["", ""], []
        for index, push in enumerate(pushes):
            final = index == len(pushes) - 1
            one, other = bare.push(push, final=final), whole.push(push, final=final)
            assert (one.num_tokens, one.stop) == (other.num_tokens, other.stop)
            texts[0] += one.text
            texts[1] += other.text
            starts += other.starts
        assert texts[1] == texts[0] + (bare.push([]).stop or "")
        for count, start in enumerate(starts):
            assert smol().decode(ids[:count])[:start].rstrip("\ufffd") == texts[1][:start].rstrip("\ufffd")
        assert starts == sorted(starts)
