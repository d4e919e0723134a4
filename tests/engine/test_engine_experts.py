"""The promises of the same text with a model whose layers have experts, which rows of a step share or not."""

from __future__ import annotations

import pytest

from engine.types import Request
from tests.engine.conftest import TinyModel
from tests.engine.model.test_quantize import needs_int8
from tests.engine.test_engine import check_settings, seeded
from tests.support import make_engine, run_all, save_model, save_random_heads, tiny_model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Of 12 tokens; layers with experts, and MLPs beside them, behind others without."""
    folder = tmp_path_factory.mktemp("mixed")
    reference = tiny_model(
        "ernie4_5_moe",
        vocab_size=12,
        num_hidden_layers=4,
        moe_layer_interval=2,
        moe_num_experts=7,
        moe_k=2,
        moe_intermediate_size=24,
    )
    save_model(reference, folder)
    return TinyModel(reference, folder, save_random_heads(folder / "heads.safetensors", hidden=32, vocab=12))


@pytest.mark.parametrize(
    "settings",
    [
        {"tree": "off"},
        {"tree": "auto"},
        {"tree": 33, "max_step_tokens": 67, "block_size": 8},
        {"tree": 8, "max_model_len": 128, "kv_cache_tokens": 200},
    ],
    ids=str,
)
def test_greedy_is_transformers_greedy(mixed: TinyModel, settings: dict) -> None:
    check_settings(mixed, settings, 0)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [({}, 0.8), pytest.param({"quantization": "int8"}, 0.0, marks=needs_int8)],
    ids=str,
)
def test_a_text_is_the_same_tree_on_or_off_alone_or_batched(
    mixed: TinyModel, settings: dict, temperature: float
) -> None:
    texts = set()
    for tree in ({"tree": "off"}, {"tree": 33, "heads": str(mixed.heads)}):
        engine = make_engine(mixed.folder, **tree, **settings)
        for neighbours in (0, 7):
            asked = [Request(f"n{i}", (i, 4), seeded(30, seed=i)) for i in range(neighbours)]
            asked.append(Request("me", (1, 2, 3), seeded(40, temperature=temperature)))
            texts.add(tuple(run_all(engine, asked, arrive_every=1)["me", 0]))
    assert engine.stats.acceptance_length > 1.5
    assert len(texts) == 1
