"""The decoder with attention sinks against transformers, and what counts and loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import loader
from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.errors import WeightsError
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.info import describe
from engine.model.weights import Checkpoint, load_weights
from tests.engine.model.test_decoder import check_against_transformers
from tests.engine.model.test_quantize import needs_int8
from tests.engine.sinks import model_with_sinks
from tests.support import greedy, make_engine, run_all, save_model, tiny_llama, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", [CpuAttention, SdpaAttention])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma3_text", {"sliding_window": 21, "sliding_window_pattern": 2}),
        ("qwen2", {"num_attention_heads": 8}),
    ],
    ids=["windows", "full"],
)
def test_prompts_and_every_tree_path_agree(
    backend: type[CpuAttention] | type[SdpaAttention],
    family: str,
    overrides: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_with_sinks(family, monkeypatch, **overrides)
    check_against_transformers(model, backend, tmp_path, prompts=(23, 300, 58))


def test_sinks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_sinks("qwen2", monkeypatch)
    assert describe(save_model(model, tmp_path), CPU).parameters == model.num_parameters()


@torch.inference_mode()
def test_layers_of_triton_pass_them_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To attention that rotates, to attention that does not, and to torch's, which knows nothing of that."""
    pytest.importorskip("triton")
    from engine.attention.triton import TritonAttention
    from tests.engine.attention.test_triton import SMALL
    from tests.engine.model.test_fused_triton import DEVICE, run_both

    save_model(model_with_sinks("mistral", monkeypatch, sliding_window=9), tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    decoder = Decoder(config, torch.float32, 512)
    load_weights(Checkpoint(tmp_path), dict(decoder.named_parameters()), decoder.weight_map())
    decoder.to(DEVICE)
    windows = config.windows_within(512)
    wanted = run_both(decoder, SdpaAttention(config.group, windows=windows))
    decoder.fuse_triton()
    tiles = [
        {kind: tile._replace(rotates=rotates) for kind, tile in SMALL.items()} for rotates in (True, False)
    ]
    ways = [TritonAttention(config.group, windows=windows, tiles=each, processors=4) for each in tiles]
    for attention in (*ways, SdpaAttention(config.group, windows=windows)):
        for found, one in zip(run_both(decoder, attention), wanted, strict=True):
            torch.testing.assert_close(found, one, atol=5e-5, rtol=5e-5)


def test_attention_is_measured_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from engine.attention import triton_tuning

    asked: list[bool] = []
    monkeypatch.setattr(loader, "_why_not_triton", lambda device: None)
    monkeypatch.setattr(triton_tuning, "tuned_tiles", lambda shape, *_, **__: asked.append(shape.sinks) or {})
    save_model(model_with_sinks("qwen2", monkeypatch), tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    for model in (config, replace(config, sinks=False)):
        loader._attention(EngineConfig(), model, torch.float32, torch.device("cuda"), None, 8)
    assert asked == [True, False]


@needs_int8
def test_layers_in_int8_with_sinks_are_not_made_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(save_model(tiny_llama(), tmp_path / "plain"), quantization="int8")
    assert engine._runner._decoder.fused is not None
    folder = save_model(model_with_sinks("llama", monkeypatch), tmp_path / "sinks")
    engine = make_engine(folder, quantization="int8")
    assert engine._runner._decoder.fused is None


def test_dummy_weights_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(model_with_sinks("qwen2", monkeypatch), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    engine = make_engine(folder, load_format="dummy")
    decoder = engine._runner._decoder
    assert all(0 < layer.sinks.abs().max() < 1 for layer in decoder.layers)
    assert len(run_all(engine, [greedy("a", [1, 2, 3], 4)])["a", 0]) == 4


def test_a_checkpoint_without_them_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_with_sinks("qwen2", monkeypatch)
    save_model(tiny_model("qwen2"), tmp_path)
    with pytest.raises(WeightsError, match=r"missing \(2\): model.layers.0.self_attn.sinks"):
        make_engine(tmp_path)
