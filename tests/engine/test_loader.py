"""Loading without a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.adjust import table_bytes
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.loader import load
from tests.support import greedy, make_engine, run_all, save_model, save_random_heads, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_dummy_weights_need_a_configuration_and_a_tokenizer_only(family: str, tmp_path: Path) -> None:
    folder = save_model(tiny_model(family), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights"):
        make_engine(folder)
    loaded = load(EngineConfig(model=str(folder), load_format="dummy", device="cpu"), progress=False)
    norms = [p for name, p in loaded.decoder.named_parameters() if "norm" in name]
    assert all(torch.all(norm == (0.0 if family == "gemma3_text" else 1.0)) for norm in norms)
    assert 0.01 < float(loaded.decoder.embed.std()) < 0.03
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=32, vocab=61, own_lm_head=False)
    engine = make_engine(folder, load_format="dummy", heads=str(heads), tree=8, lookup="off")
    assert engine.info.num_heads == 4
    outputs = run_all(engine, [greedy(f"r{i}", [i, 2, 3], 9) for i in range(3)])
    assert [len(tokens) for tokens in outputs.values()] == [9, 9, 9]


def test_the_pool_leaves_room_for_the_tables_of_adjustments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024 slots could take 10 MB of tables: a pool of all that is free would end in a later failure."""
    folder = save_model(tiny_model("llama"), tmp_path)
    available = 12 << 20
    monkeypatch.setattr("engine.loader.available_bytes", lambda: available)
    config = EngineConfig(model=str(folder), device="cpu", max_num_seqs=1024, max_step_tokens=1024)
    loaded = load(config, progress=False)
    tables = table_bytes(1024, 61)
    assert tables > available // 2
    assert loaded.pool.data.nbytes + tables <= available
