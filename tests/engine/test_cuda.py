"""The whole engine on a GPU: in float32 its greedy text is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import (
    greedy,
    greedy_reference,
    make_engine,
    run_all,
    save_model,
    save_random_heads,
    tiny_llama,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PROMPTS = [[1, 2, 3], [7, 7, 9, 11, 2], [30, 4], [5, 6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize(
    "settings",
    [{"tree": "off"}, {"tree": 16, "lookup": "off"}, {"tree": 33, "lookup": 8}, {"tree": "auto"}],
    ids=str,
)
def test_greedy_text_is_the_references(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save_model(model, tmp_path)
    heads = save_random_heads(folder / "heads.safetensors", hidden=32, vocab=61)
    if settings["tree"] != "off":
        settings = {**settings, "heads": str(heads)}
    engine = make_engine(folder, device="cuda", dtype="float32", max_model_len=128, **settings)
    requests = [greedy(f"r{i}", prompt, 24) for i, prompt in enumerate(PROMPTS)]
    outputs = run_all(engine, requests, arrive_every=3)
    for i, prompt in enumerate(PROMPTS):
        assert outputs[f"r{i}", 0] == greedy_reference(model, prompt, 24), (i, settings)
