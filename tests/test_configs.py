"""The shipped configs: settings that load, files that exist, and a template that writes what Vicuna knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from server.settings import load_settings

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_names_files_that_exist(file: Path) -> None:
    settings = load_settings({}, file)
    assert settings.model == yaml.safe_load(file.read_text())["model"]
    assert file.read_text().startswith("#")
    for name in ("tree_file", "chat_template"):
        path = getattr(settings, name, None)
        assert path is None or (CONFIGS.parent / path).is_file()  # their paths start at the root


def test_vicunas_template_writes_fastchats_prompt() -> None:
    """Expected: `get_prompt` of FastChat's conversation.py, style ADD_COLON_TWO, sep " ", sep2 "</s>"."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    template = (CONFIGS / "templates" / "vicuna.jinja").read_text()

    def write(*messages: tuple[str, str], prompt: bool = True) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    said = [("user", "Hello!"), ("assistant", "Hi!"), ("user", "How are\nyou?")]
    ours = "USER: Hello! ASSISTANT: Hi!</s>USER: How are\nyou? ASSISTANT:"
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert write(*said) == f"<s>{system} {ours}"
    assert write(("system", "Be brief."), *said) == f"<s>Be brief. {ours}"
    assert write(*said[:2], prompt=False) == f"<s>{system} USER: Hello! ASSISTANT: Hi!</s>"
    with pytest.raises(TemplateError, match="not tool"):
        write(("user", "Hello!"), ("tool", "42"))
