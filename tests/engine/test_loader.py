"""Loading without a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from engine.adjust import table_bytes
from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError, WeightsError
from engine.harmony import Marks
from engine.loader import _device, _dtype, _why_not_triton, load
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.info import count_parameters
from tests.chat_templates import HARMONY
from tests.support import greedy, make_engine, run_all, save_model, save_random_heads, tiny_model
from training.setup import training_dtype


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


def test_what_loading_took_is_given_back_before_the_pool_is_sized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is asked for then, and would not count what malloc keeps."""
    seen: list[str] = []
    monkeypatch.setattr("engine.loader.give_back_memory", lambda: seen.append("given back"))
    monkeypatch.setattr("engine.loader.available_bytes", lambda: seen.append("asked") or 1 << 34)
    load(EngineConfig(model=str(save_model(tiny_model("llama"), tmp_path)), device="cpu"), progress=False)
    assert seen[-2:] == ["given back", "asked"]


def test_a_model_that_writes_harmony_ends_with_a_call_too(tmp_path: Path) -> None:
    """Whatever its files say, of which some know the end of an answer alone."""
    model = tiny_model("llama")
    folder = save_model(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in Marks.ALL])
    tokenizer.chat_template = HARMONY
    tokenizer.save_pretrained(folder)
    last, call, end = tokenizer.convert_tokens_to_ids([Marks.RETURN, Marks.CALL, Marks.END])
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [5, {end}, {last}]}}')
    config = EngineConfig(model=str(folder), device="cpu")
    assert load(config, progress=False).generation_defaults.eos_token_ids == (5, last, call)
    other = config.model_copy(update={"chat_template": "{{ messages }}"})
    assert load(other, progress=False).generation_defaults.eos_token_ids == (5, end, last)


def test_a_numbered_gpu_becomes_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert _device("cuda:1") == torch.device("cuda:1")
    assert _device("cuda") == torch.device("cuda")
    assert _device("cpu:0") == torch.device("cpu:0")
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("stored", "capability", "taken"),
    [
        (torch.bfloat16, (7, 5), torch.float16),
        (torch.bfloat16, (8, 0), torch.bfloat16),
        (torch.float16, (7, 0), torch.float16),
        (torch.float32, (7, 5), torch.float32),
    ],
)
def test_a_gpu_without_bfloat16_takes_float16(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stored: torch.dtype,
    capability: tuple[int, int],
    taken: torch.dtype,
) -> None:
    model = replace(ModelConfig.from_folder(save_model(tiny_model("llama"), tmp_path)), dtype=stored)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    caplog.set_level(logging.WARNING)  # the server's tests leave another
    assert _dtype("auto", model, torch.device("cuda")) == taken
    assert ("dtype is float16" in caplog.text) == (stored != taken)
    assert _dtype("bfloat16", model, torch.device("cuda")) == torch.bfloat16  # asked for
    assert _dtype("auto", model, torch.device("cpu")) == torch.float32
    trained = torch.bfloat16 if stored is torch.float32 else stored
    expected = torch.float16 if trained is torch.bfloat16 and capability < (8, 0) else trained
    assert training_dtype("auto", model, torch.device("cuda")) == expected


def test_attention_is_the_devices_own_unless_it_is_named(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama"), tmp_path)

    def attention(**settings: str) -> object:
        return load(EngineConfig(model=str(folder), device="cpu", **settings), progress=False).attention

    assert isinstance(attention(), CpuAttention)
    assert isinstance(attention(attention="sdpa"), SdpaAttention)
    with pytest.raises(ConfigError, match=r"attention triton needs an NVIDIA GPU.*cpu"):
        attention(attention="triton")


def test_attention_that_cannot_run_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="attention triton needs an NVIDIA GPU and the device is cpu; set"):
        load(EngineConfig(model="/no/such/folder", device="cpu", attention="triton"), progress=False)


@pytest.mark.parametrize(
    ("tied", "value", "dtype"),
    [(False, float("nan"), "float32"), (True, -float("inf"), "bfloat16"), (False, 1e5, "float16")],
)
def test_an_output_layer_that_is_not_finite_is_refused(
    tied: bool, value: float, dtype: str, tmp_path: Path
) -> None:
    """Or every answer would be one token again and again, without a word."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight[17, 3] = value
    folder = save_model(model, tmp_path)
    config = EngineConfig(model=str(folder), device="cpu", dtype=dtype, kv_cache_tokens=1024)
    with pytest.raises(WeightsError, match=rf"lm_head\) hold values that are not finite: .*{dtype}"):
        load(config, progress=False)


def test_weights_that_the_memory_does_not_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are loaded: in a container the process would be killed meanwhile."""
    folder = save_model(tiny_model("llama"), tmp_path)
    size = 4 * count_parameters(ModelConfig.from_folder(folder))
    monkeypatch.setattr("engine.loader.available_bytes", lambda: size - 1)
    with pytest.raises(ConfigError, match=r"the weights take 1 MiB and 0 MiB are available"):
        load(EngineConfig(model=str(folder), device="cpu", kv_cache_tokens=1024), progress=False)


def test_memory_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tiny_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"pool of 1000000000000000 tokens .* lower kv_cache_tokens"):
        load(EngineConfig(model=str(folder), device="cpu", kv_cache_tokens=10**15), progress=False)

    def full(decoder: Decoder, device: torch.device) -> Decoder:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "to", full)
    for kind in ("auto", "dummy"):
        with pytest.raises(ConfigError, match="smaller model"):
            load(EngineConfig(model=str(folder), device="cpu", load_format=kind), progress=False)


@pytest.mark.parametrize(
    ("installed", "capability", "compiler", "reason"),
    [
        (False, (9, 0), True, "not installed"),
        (True, (7, 5), True, "8.0 or higher and this one has 7.5"),
        (True, (9, 0), False, "C compiler"),
        (True, (9, 0), True, None),
    ],
)
def test_why_triton_cannot_run_is_said(
    installed: bool,
    capability: tuple[int, int],
    compiler: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if compiler else None)
    monkeypatch.delenv("CC", raising=False)
    why = _why_not_triton(torch.device("cuda"))
    assert (why is None) if reason is None else (reason in str(why))


def test_a_pass_over_prompts_is_larger_on_a_gpu() -> None:
    assert EngineConfig(model="m").prefill_tokens("cpu") == 512
    assert EngineConfig(model="m").prefill_tokens("cuda") == 2048
    assert EngineConfig(model="m", max_step_tokens=4096).prefill_tokens("cuda") == 4096
    assert EngineConfig(model="m", max_prefill_tokens=64).prefill_tokens("cuda") == 64
