"""The short way to render usual messages gives what transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from engine.model.embedded import ensure_converted
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor

TEMPLATES = [
    None,
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ tools is none }}{{ documents is none }}{{ undefined is defined }}{{ add_generation_prompt }}",
    "{% for m in messages -%}\n  {{ m.content }}\n  {% if loop.last %}!{% endif %}\n{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("begins", [True, False])
def test_both_ways_render_alike(template: str | None, begins: bool) -> None:
    text = TextProcessor(load_tokenizer(ensure_converted()), template)
    for count in (1, 3):
        roles = ["user", "assistant", "user"][:count]
        messages = [{"role": role, "content": f" <b>{role} é\n"} for role in roles]
        short = text.render_chat(messages, add_generation_prompt=begins)
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": begins}
        assert short == text.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_a_tokenizer_with_a_way_of_its_own_is_asked() -> None:
    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def apply_chat_template(self, *_: Any, **_options: Any) -> Any:
            return "own"

    backend = load_tokenizer(ensure_converted()).backend_tokenizer
    text = TextProcessor(Own(tokenizer_object=backend), "theirs")
    assert text.render_chat([{"role": "user", "content": "hi"}]) == "own"


def test_a_transformers_that_compiles_otherwise_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the short way takes is private."""
    text = TextProcessor(load_tokenizer(ensure_converted()))
    messages = [{"role": "user", "content": "hi"}]
    short = text.render_chat(messages)
    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    asked: list[Any] = []

    def note(*_: Any, **options: Any) -> str:
        asked.append(options)
        return short

    for kind in (PreTrainedTokenizerBase, type(text.tokenizer)):  # not a way of its own
        monkeypatch.setattr(kind, "apply_chat_template", note)
    assert TextProcessor(text.tokenizer).render_chat(messages) == short
    assert len(asked) == 1
