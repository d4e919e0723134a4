"""Small tokenizers, without the models that importing `tests.support` takes seconds for."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letter_tokenizer(letters: str, *words: str) -> PreTrainedTokenizerFast:
    """A byte-level one of these letters in order, these words of them, and what ends an answer, "<end>"."""
    vocab = {text: i for i, text in enumerate([*letters, *words, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(words, vocab)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentencepiece_tokenizer(*words: str, drops_space: bool) -> PreTrainedTokenizerFast:
    """▁ for a space and bytes for what is not in the vocabulary: <unk>, <s>, </s>, all bytes, these words.

    Args:
        words: shorter ones before those that are made of them.
        drops_space: add a space before a text and leave it out of what is decoded, as Llama 2; else as Gemma.
    """
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(ids, _merges(words, ids), unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if drops_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in vocab[:3]])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _merges(words: tuple[str, ...], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """One for each word that is made of two others; of several ways the first."""
    cuts = (((word[:end], word[end:]) for end in range(len(word) - 1, 0, -1)) for word in words)
    made = (next((cut for cut in parts if cut[0] in vocab and cut[1] in vocab), None) for parts in cuts)
    return [cut for cut in made if cut is not None]
