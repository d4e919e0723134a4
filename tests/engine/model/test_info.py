"""What `info` says of a model, against transformers' own count and the memory the engine allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.adjust import table_bytes
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.errors import ConfigError, ModelError
from engine.loader import load
from engine.model import info as module
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.info import describe
from engine.model.weights import resolve_model
from tests.engine.model.mxfp4_files import published
from tests.support import make_engine, save_model, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma3_text", {"tie_word_embeddings": True}),
        ("phi3", {"hidden_size": 64}),
        ("olmo2", {}),
        ("olmo3", {}),
        ("smollm3", {}),
        ("exaone4", {}),
        ("hunyuan_v1_dense", {}),
        ("glm", {}),
        ("glm4", {}),
        ("ernie4_5", {"use_bias": True}),
        ("seed_oss", {"attention_bias": True}),
        ("granite", {}),
        ("mixtral", {"num_local_experts": 5}),
        ("qwen3_moe", {"mlp_only_layers": [1], "num_experts": 9, "moe_intermediate_size": 24}),
        ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "hidden_size": 64}),
        ("granitemoe", {"num_local_experts": 5}),
        ("gpt_oss", {"num_local_experts": 5}),
        ("ernie4_5_moe", {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 24}),
        ("glm4_moe", {"n_routed_experts": 5, "num_experts_per_tok": 2, "use_qk_norm": True}),
        ("qwen2_moe", {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
        ("hunyuan_v1_moe", {"num_experts": 5}),
    ],
)
def test_parameters_are_counted_as_transformers_does(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **overrides)
    found = describe(save_model(model, tmp_path), CPU)
    # Of what corrects the choice of experts, which is no parameter in some of transformers.
    buffers = (buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    assert found.parameters == model.num_parameters() + sum(buffers)
    assert found.architecture == type(model).__name__
    for memory, dtype in zip(found.memory, (torch.float32, torch.bfloat16), strict=True):
        config = ModelConfig.from_folder(tmp_path)
        decoder = Decoder(config, dtype, 64)
        again = decoder.embed.nbytes if config.tie_word_embeddings else 0
        if config.qk_norm == "head":  # of which the decoder holds one for each head
            repeated = config.num_heads + config.num_kv_heads - 2
            again -= config.num_layers * repeated * config.head_dim * dtype.itemsize
        assert memory.weight_bytes == sum(weight.nbytes for weight in decoder.parameters()) + again
    if family == "mistral":
        assert (found.window, found.num_windowed) == (32, 2)


def test_experts_in_4_bits_are_counted_so_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = published(tmp_path)
    monkeypatch.setattr(module, "device_memory", lambda device: ("a GPU", 1 << 30))
    found, config = describe(tmp_path, torch.device("cuda")), ModelConfig.from_folder(tmp_path)
    assert found.stored_as == "mxfp4"
    assert found.parameters == model.num_parameters()
    experts = model.model.layers[0].mlp.experts
    idle = sum(each[0].numel() for each in experts.parameters()) * 2
    assert found.active_parameters == found.parameters - 2 * idle  # of five experts two, in two layers
    for memory, dtype in zip(found.memory, (torch.float32, torch.bfloat16), strict=True):
        decoder = Decoder(config, dtype, 64, mxfp4=True)
        assert memory.weight_bytes == sum(parameter.nbytes for parameter in decoder.parameters())
    assert [memory.weight_bytes for memory in describe(tmp_path, CPU).memory] == [
        found.parameters * 4,
        found.parameters * 2,
    ]


def test_memory_is_what_the_engine_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("llama", max_position_embeddings=8192), tmp_path)
    engine = make_engine(tmp_path, kv_cache_tokens=256, max_model_len=64)
    pool = engine._runner._pool.data
    tokens = pool.shape[2] * pool.shape[3]
    whole = describe(tmp_path, CPU)
    full, half = whole.memory
    assert (full.dtype, half.dtype) == ("float32", "bfloat16")
    assert full.kv_bytes_per_token == 2 * half.kv_bytes_per_token == pool.numel() * 4 // tokens
    assert full.weight_bytes == 2 * half.weight_bytes == 4 * whole.parameters

    set_aside = 512 * 61 * 20 + table_bytes(32, 61)
    room = full.weight_bytes + set_aside + 3 * (2048 + 64) * full.kv_bytes_per_token
    monkeypatch.setattr(module, "device_memory", lambda device: ("a GPU", room))
    assert describe(tmp_path, torch.device("cuda")).memory[0].fits == {2048: 3, 4096: 1, 8192: 0}


@pytest.mark.parametrize("available", [1 << 20, 3 << 20, 8 << 20, 32 << 20, 512 << 20])
def test_on_the_cpu_as_many_fit_as_a_servers_pool_holds(
    available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little for all, or for the longest, half of it, the cap, and all that 32 sequences fill."""
    save_model(tiny_model("llama", max_position_embeddings=8192), tmp_path)
    monkeypatch.setattr(module, "CPU_POOL_BYTES", 64 << 20)
    room = available + table_bytes(32, 61)  # beside the weights
    weights = describe(tmp_path, CPU).memory[0].weight_bytes
    monkeypatch.setattr(module, "available_bytes", lambda: weights + room)
    monkeypatch.setattr("engine.loader.available_bytes", lambda: room)
    fits = describe(tmp_path, CPU).memory[0].fits
    assert list(fits) == [2048, 4096, 8192]
    for length, count in fits.items():
        config = EngineConfig(model=str(tmp_path), device="cpu", max_model_len=length)
        if count:
            tokens = load(config, progress=False).info.kv_cache_tokens
            assert tokens // (length + MAX_TREE_NODES) == count
        else:
            with pytest.raises(ConfigError, match="lower max_model_len"):
                load(config, progress=False)


def test_the_cap_of_a_pool_on_the_cpu_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    cap = f"at most {module.CPU_POOL_BYTES >> 30} GiB"
    operations = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert cap in operations.partition("Tokens needed")[2].partition("Example")[0]
    assert cap in (EngineConfig.model_fields["kv_cache_tokens"].description or "")
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 40)
    config = ModelConfig.from_folder(resolve_model("smollm2-135m"))
    block_bytes = 16 * module.kv_bytes_per_token(config, torch.float32)
    tokens = 16 * module.cpu_pool_blocks(1 << 40, block_bytes, module.blocks_of_sequence(8192, 16), 32)
    assert f"({tokens:,} tokens of SmolLM2-135M in float32)" in operations
    fits = describe(resolve_model("smollm2-135m"), CPU).memory[0].fits
    assert fits == {length: tokens // (length + MAX_TREE_NODES) for length in (2048, 4096, 8192)}


def test_the_sizing_table_and_info_differ_by_the_packed_copy() -> None:
    whole = describe(resolve_model("smollm2-135m"), CPU)
    table, here = (4 * whole.parameters / 2**20, whole.memory[0].weight_bytes / 2**20)
    operations = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"is {table:.0f} MiB, as in the table, and {here:.0f} MiB there, as `info` says" in operations


def test_no_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config"):
        describe(tmp_path, CPU)
