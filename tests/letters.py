"""A tokenizer for grammars, without the models that importing `tests.support` takes seconds for."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letter_tokenizer(letters: str, *words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these letters in order, these words of them, and what ends an answer, "<end>"."""
    vocab = {text: i for i, text in enumerate([*letters, *words, "<end>"])}
    merges = [(word[:-1], word[-1]) if word[:-1] in vocab else (word[0], word[1:]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
