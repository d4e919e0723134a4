"""Prompts in every shape they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from engine.errors import ConfigError
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from training.conversations import read_asked, self_prompted, user_turn_start


def write(path: Path, *items: Any) -> Path:
    path.write_text(
        "\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n", encoding="utf-8"
    )
    return path


def test_all_shapes_give_the_users_side(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "one\u2028line", "source": "x"},
        {"turns": ["first", "second"]},
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "left out"},
                {"role": "user", "content": "c"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "left out"}]},
    )
    assert [(asked.system, asked.users) for asked in read_asked([file])] == [
        (None, ("one\u2028line",)),
        (None, ("first", "second")),
        ("be brief", ("ab", "c")),
        (None, ("hello",)),
    ]


def test_what_is_asked_twice_counts_once_and_has_one_key_in_every_shape(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "same"}, {"prompt": "same"}, {"prompt": "other"})
    second = write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "same"}]})
    both = read_asked([first, second])
    assert [asked.users for asked in both] == [("same",), ("other",)]
    assert read_asked([second])[0].key == both[0].key
    assert both[0].key == 0xBDD2AF5C1CA981C4  # on every machine: the held-out part hangs on it


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"text": "x"}, "'conversations'"),
        (["x"], "list indices"),
        ({"prompt": " "}, "no user turn, or an empty one"),
        ({"prompt": 3}, "no user turn, or an empty one"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role robot"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "alien"),
        ({"turns": []}, "no user turn"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, item: Any, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "fine"}, item)
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 2: .*{reason}"):
        read_asked([file])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.jsonl"):
        read_asked([tmp_path / "none.jsonl"])


def test_the_users_turn_begins_where_the_template_says(chat_model: Path) -> None:
    text = TextProcessor(load_tokenizer(chat_model))
    assert user_turn_start(text, []) == [1]
    talk = [{"role": "user", "content": "t7"}, {"role": "assistant", "content": "t8 t9"}]
    assert user_turn_start(text, talk) == [1, 7, 2, 3, 8, 9, 2, 1]
    text.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "t5 $A", special_tokens=[("t5", 5)]
    )
    assert text.encode("t7") == [5, 7]
    assert user_turn_start(text, []) == [1], "a BOS is the template's to write"
    text.tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {% endfor %}"
    with pytest.raises(ConfigError, match="does not write the user's turn as it is"):
        user_turn_start(text, [])


def test_sampled_conversations_differ_by_number_and_seed() -> None:
    keys = {self_prompted(number, seed).key for number in range(50) for seed in range(3)}
    assert len(keys) == 150
