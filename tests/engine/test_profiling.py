"""The passes whose memory is measured on CUDA: they run, and they are the largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention.base import AttentionInput
from engine.attention.sdpa import SdpaAttention
from engine.cache.pool import KVPool
from engine.config import EngineConfig
from engine.loader import Loaded, load
from engine.profiling import WorstCase
from tests.support import save_model, save_random_heads, tiny_llama

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.cuda


class Counting(SdpaAttention):
    """The reference backend, which notes the rows of each pass."""

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        self.rows_seen: list[int] = [*getattr(self, "rows_seen", []), batch.rows.numel()]
        super().plan(batch, pool)


def loaded(folder: Path, **settings: object) -> Loaded:
    save_model(tiny_llama(), folder)
    heads = save_random_heads(folder / "heads.safetensors", hidden=32, vocab=61)
    config = EngineConfig(model=str(folder), heads=str(heads), device=str(DEVICE), **settings)
    return load(config, progress=False)


def worst_case(made: Loaded, attention: SdpaAttention, **limits: int) -> WorstCase:
    return WorstCase(
        made.decoder,
        attention,
        made.heads,
        tree_size=made.info.tree_size,
        block_size=4,
        dtype=torch.float32,
        device=DEVICE,
        **limits,
    )


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("max_num_seqs", "max_step_tokens", "rows"), [(8, 64, 64), (32, 512, 8 * 64), (2, 512, 2 * 64)]
)
def test_they_are_as_large_as_the_settings_allow(
    max_num_seqs: int, max_step_tokens: int, rows: int, kernels: bool, tmp_path: Path
) -> None:
    made = loaded(tmp_path, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens, kv_cache_tokens=1024)
    assert made.info.tree_size == 64
    attention = Counting(2)
    limits = {"max_num_seqs": max_num_seqs, "max_step_tokens": max_step_tokens, "max_prefill_tokens": 3000}
    worst = worst_case(made, attention, kernels=kernels, **limits)
    worst.prefill()
    for step in worst.steps:
        worst.decode(*step)
    assert attention.rows_seen == [3000, rows, max_num_seqs], "trees, and many roots"


@pytest.mark.parametrize("kernels", [False, True])
def test_steps_are_profiled_with_the_logits_that_they_keep(
    kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 bits where kernels read them: others would take more memory, and a kernel nobody needs."""
    made = loaded(tmp_path, dtype="bfloat16", attention="sdpa", max_num_seqs=2, kv_cache_tokens=1024)
    seen: list[torch.dtype] = []
    name = "engine.sampler_triton.TreeSampler.draw" if kernels else "engine.profiling.verify_all"
    logits = 2 if kernels else 0
    monkeypatch.setattr(name, lambda *given: seen.append(given[logits].dtype))
    worst = WorstCase(
        made.decoder,
        SdpaAttention(2),
        made.heads,
        tree_size=4,
        max_num_seqs=2,
        max_step_tokens=64,
        max_prefill_tokens=64,
        block_size=4,
        dtype=torch.bfloat16,
        device=DEVICE,
        kernels=kernels,
    )
    worst.decode(2, 4)
    assert seen == [made.decoder.logits_dtype if kernels else torch.float32]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_pool_sized_by_it_leaves_what_steps_take(tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    # Other tests may be using the device, now and while this one starts.
    to_be_had = 0.5 * total - (total - free)
    if to_be_had < 0.1 * total:
        pytest.skip(f"other processes hold {total - free} of the device's {total} bytes")
    made = loaded(tmp_path, gpu_memory_utilization=0.5, max_model_len=512)
    assert 0.5 * to_be_had < made.pool.data.nbytes < 0.5 * total
    worst = worst_case(made, SdpaAttention(2), max_num_seqs=32, max_step_tokens=512, max_prefill_tokens=2048)
    # At least the logits of a full step.
    assert 512 * 61 * 4 < worst.measure() < 0.1 * total
