"""A tiny chat model for the training tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support import save_model, tiny_llama

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}"
    "{{ 't1 ' if m.role == 'user' else 't4 ' if m.role == 'system' else 't3 ' }}{{ m.content }} t2 "
    "{% endfor %}{% if add_generation_prompt %}t3{% endif %}"
)
"""t1 opens a user's turn, t3 the assistant's, t4 the system's; t2 ends them and is EOS."""


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers end after a few tokens, or not at all: some greedy ones go round in circles."""
    folder = save_model(tiny_llama(eos_token_id=2, vocab_size=24), tmp_path_factory.mktemp("chat"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATE, "eos_token": "t2"}))
    return folder
