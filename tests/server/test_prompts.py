"""Prompts that are encoded together are each encoded as alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.errors import RequestError
from engine.text import TextProcessor
from server.prompts import Prompts
from tests.server.conftest import TEXT


class Counting(TextProcessor):
    """Notes how many texts each call encodes; fails where one is "fail"."""

    def __init__(self) -> None:
        super().__init__(TEXT.tokenizer)
        self.calls: list[int] = []

    def encode_checked(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        self.calls.append(len(texts))
        if "fail" in texts:
            raise ValueError("fail")
        encoded = super().encode_checked(texts, add_special_tokens=add_special_tokens)
        return [[int(add_special_tokens), *ids] for ids in encoded]  # the tokenizer adds none


def encoded(text: TextProcessor, asked: list[tuple[str, bool]]) -> list[Any]:
    async def at_once() -> list[Any]:
        prompts = Prompts(text)
        return await asyncio.gather(
            *(prompts.encoded(one, add_special_tokens=special, param="prompt") for one, special in asked),
            return_exceptions=True,
        )

    return asyncio.run(at_once())


def test_each_is_what_it_is_alone() -> None:
    text = Counting()
    asked = [(f"prompt {i} é", i % 5 < 3) for i in range(50)]
    assert encoded(text, asked) == [[int(special), *TEXT.encode(one)] for one, special in asked]
    assert text.calls == [3, 2] * 10  # neighbours of one kind


def test_all_that_come_at_once_are_one_call_up_to_a_size() -> None:
    text = Counting()
    assert len(encoded(text, [("x" * 1000, False)] * 40)) == 40
    assert text.calls == [17, 17, 6]


def test_one_that_is_not_text_is_refused_alone() -> None:
    good, bad, other = encoded(Counting(), [("a", False), ("\ud800", False), ("b", False)])
    assert isinstance(bad, RequestError)
    assert bad.param == "prompt"
    assert (good, other) == ([0, *TEXT.encode("a")], [0, *TEXT.encode("b")])


def test_a_failure_is_told_to_those_it_struck() -> None:
    found = encoded(Counting(), [("a", False), ("fail", False), ("b", True)])
    assert [isinstance(one, ValueError) for one in found] == [True, True, False]


def test_who_has_left_holds_nobody_up() -> None:
    async def one_leaves() -> list[int]:
        prompts = Prompts(Counting())
        left, stays = (
            asyncio.create_task(prompts.encoded(one, add_special_tokens=False, param="prompt"))
            for one in "ab"
        )
        asyncio.get_running_loop().call_soon(left.cancel)
        return await asyncio.wait_for(stays, 5)

    assert asyncio.run(one_leaves()) == [0, *TEXT.encode("b")]


@pytest.mark.parametrize("special", [True, False])
def test_several_texts_are_encoded_as_one(special: bool) -> None:
    texts = ["", "a b", "é" * 300]
    assert TEXT.encode_checked(texts, add_special_tokens=special) == [
        TEXT.encode(text, add_special_tokens=special) for text in texts
    ]
