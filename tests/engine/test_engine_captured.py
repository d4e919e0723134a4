"""The promises of test_engine.py and test_features.py for captured steps that are launched ahead.

That is how a GPU runs them; a recorded graph stands in place of CUDA's.
"""

# ruff: noqa: F403
from __future__ import annotations

import pytest

from engine.attention.sdpa import SdpaAttention
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_engine import LOOKUP, SETTINGS, check_greedy, with_heads
from tests.engine.test_engine_ahead import *


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "captured", True)
    monkeypatch.setitem(support.MODE, "ahead", True)
    # As the attention of a GPU: prompts are computed together.
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)


# With one model and one order of arrival: repeating operators one by one takes its time.


@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_is_transformers_greedy(narrow: TinyModel, settings: dict) -> None:
    engine = support.make_engine(narrow.folder, **with_heads(narrow, settings))
    check_greedy(narrow, engine, 2)
    assert settings["tree"] in ("off", "auto") or engine.stats.accepted_tokens > 0


@pytest.mark.parametrize("settings", LOOKUP)
def test_greedy_with_lookup_alone_is_transformers_greedy(certain: TinyModel, settings: dict) -> None:
    engine = support.make_engine(certain.folder, **settings)
    check_greedy(certain, engine, 2)
    assert engine.stats.accepted_by_source["head"] == 0
