"""The layers with Triton kernels between their products against the plain ones, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.attention.base import AttentionBackend, AttentionInput
from engine.attention.sdpa import SdpaAttention
from engine.attention.triton import TritonAttention
from engine.cache.pool import KVPool
from engine.config import EngineConfig
from engine.loader import load
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import Checkpoint, load_weights
from tests.engine.attention.test_triton import SMALL
from tests.engine.model.family_cases import FAMILIES, VARIANTS
from tests.engine.model.test_decoder import check_against_transformers
from tests.support import save_model, tiny_llama, tiny_model

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Recorder:
    """Attention that mixes nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        self.given += [q.clone(), k.clone(), v.clone()]
        return (q + k.sum(1, keepdim=True) - v.mean(1, keepdim=True)).flatten(1) / (1 + layer)


def decoder(family: str, overrides: dict[str, Any], folder: Path, dtype: torch.dtype) -> Decoder:
    model = tiny_model(family, **overrides)
    config = ModelConfig.from_folder(save_model(model, folder))
    decoder = Decoder(config, dtype, 512)
    load_weights(
        Checkpoint(folder),
        dict(decoder.named_parameters()),
        decoder.weight_map(),
        ignored=set(),
        progress=False,
    )
    return decoder.to(DEVICE)


@pytest.mark.parametrize(
    ("family", "overrides"), [*(("llama", variant) for variant in VARIANTS), *FAMILIES], ids=str
)
@torch.inference_mode()
def test_every_family_gives_the_same(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    plain = decoder(family, overrides, tmp_path, torch.float32)
    tokens = torch.arange(7, device=DEVICE) * 5 % 61
    positions = torch.tensor([0, 1, 2, 2, 9, 300, 301], device=DEVICE)
    wanted, got = Recorder(), Recorder()
    hidden = plain(tokens, positions, wanted)
    plain.fuse_triton()
    given = torch.empty_like(hidden)
    assert plain(tokens, positions, got, given) is given
    torch.testing.assert_close(given, hidden, atol=2e-5, rtol=2e-5)
    assert len(got.given) == len(wanted.given)
    for ours, theirs in zip(got.given, wanted.given, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "overrides"), [*(("llama", variant) for variant in VARIANTS), *FAMILIES], ids=str
)
@torch.inference_mode()
def test_attention_that_rotates_gives_the_same(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """A tree behind the chunk of a prompt: what the tree sees, and what it leaves in the pool.

    Where attention does not rotate it is given what the test above compares, so that one family will do.
    """
    plain = decoder(family, overrides, tmp_path, torch.float32)
    config = plain.config
    options: dict[str, Any] = {"scale": config.attention_scale, "windows": config.windows_within(512)}
    found = run_both(plain, SdpaAttention(config.group, **options))
    plain.fuse_triton()
    for rotates in (True, False) if family == "mistral" or DEVICE.type == "cuda" else (True,):
        tiles = {kind: tile._replace(rotates=rotates) for kind, tile in SMALL.items()}
        attention = TritonAttention(config.group, tiles=tiles, processors=4, **options)
        got = run_both(plain, attention)
        assert attention.rotates == rotates
        for ours, theirs in zip(got, found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=5e-5)


def run_both(decoder: Decoder, attention: AttentionBackend) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a prompt and of a tree of 5 behind it, and the pool."""
    config, count, size = decoder.config, 37, 5
    pool = KVPool(
        num_layers=config.num_layers,
        num_blocks=5,
        block_size=16,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=DEVICE,
    )
    tables = torch.tensor([[3, 1, 4]], device=DEVICE)
    depths = torch.tensor([[0, 1, 1, 2, 2]], device=DEVICE)
    ancestors = torch.tensor([[0b1, 0b11, 0b101, 0b1011, 0b10101]], device=DEVICE)

    def forward(start: int, size: int, **tree: Tensor) -> Tensor:
        row = torch.arange(start, start + size, device=DEVICE)
        rows = tables[:, row // 16] * 16 + row % 16
        lengths = torch.tensor([start], device=DEVICE)
        batch = AttentionInput(tables, lengths, rows, start + size, **tree)
        attention.plan(batch, pool)
        return decoder(row * 7 % 61, batch.positions().flatten(), attention)

    return forward(0, count), forward(count, size, depths=depths, ancestors=ancestors), pool.data


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_bfloat16_stays_as_near_as_the_plain_layers(family: str, tmp_path: Path) -> None:
    overrides = {"sliding_window": 21} if family == "gemma3_text" else {}
    exact = decoder(family, overrides, tmp_path, torch.float32)
    short = decoder(family, overrides, tmp_path, torch.bfloat16)
    tokens, positions = torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE)
    wanted = exact(tokens, positions, Recorder())

    def error() -> float:
        return float((short(tokens, positions, Recorder()).float() - wanted).norm() / wanted.norm())

    plain = error()
    short.fuse_triton()
    assert error() < max(1.5 * plain, 0.01)


def test_only_cuda_takes_them(tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path)
    loaded = load(EngineConfig(model=str(tmp_path), device=str(DEVICE), kv_cache_tokens=1024), progress=False)
    assert (loaded.decoder.fused_cuda is not None) == (DEVICE.type == "cuda")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the reference's cases are on the CPU")
def test_with_the_attention_kernel_it_is_transformers_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, decode and every tree path, all that lies between the products and attention by Triton."""

    def backend(group: int, **options: Any) -> TritonAttention:
        return TritonAttention(group, tiles=SMALL, processors=2, **options)

    monkeypatch.setattr(Decoder, "pack", Decoder.fuse_triton)
    check_against_transformers(tiny_model("qwen3"), backend, tmp_path, prompts=(13, 5, 20))
