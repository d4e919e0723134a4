"""The promises of the same text with a model whose heads have attention sinks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.types import Request
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.sinks import model_with_sinks
from tests.engine.test_engine import check_settings, seeded
from tests.support import make_engine, run_all, save_model, save_random_heads


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Of 12 tokens; a layer with a window and one without."""
    folder = tmp_path_factory.mktemp("sinking")
    with pytest.MonkeyPatch.context() as patches:
        windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        reference = model_with_sinks("qwen2", patches, vocab_size=12, **windows)
        save_model(reference, folder)
        heads = save_random_heads(folder / "heads.safetensors", hidden=32, vocab=12)
        yield TinyModel(reference, folder, heads)


@pytest.mark.parametrize(
    "settings",
    [{"tree": 33, "max_step_tokens": 67}, {"tree": 8, "max_model_len": 128, "kv_cache_tokens": 200}],
)
def test_greedy_is_transformers_greedy(sinking: TinyModel, settings: dict) -> None:
    check_settings(sinking, settings, 0)


@pytest.mark.parametrize("captured", [False, True])
def test_a_seeded_text_is_the_same_tree_on_or_off_alone_or_batched(
    sinking: TinyModel, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(support.MODE, "captured", captured)
    texts = set()
    for tree in ({"tree": "off"}, {"tree": 33, "heads": str(sinking.heads)}):
        engine = make_engine(sinking.folder, **tree)
        for neighbours in (0, 5):
            asked = [Request(f"n{i}", (i, 4), seeded(20, seed=i)) for i in range(neighbours)]
            asked.append(Request("me", (1, 2, 3), seeded(40, temperature=0.8)))
            texts.add(tuple(run_all(engine, asked, arrive_every=1)["me", 0]))
    assert engine.stats.acceptance_length > 1.5
    assert len(texts) == 1
