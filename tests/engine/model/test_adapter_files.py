"""What is said of adapters that cannot be merged: each names what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from engine.config import EngineConfig, LoraSource, lora_sources
from engine.errors import AdapterError, ModelError
from engine.loader import load
from engine.model.adapter_files import read_adapters
from engine.model.weights import Checkpoint, resolve_model
from tests.engine.conftest import TinyModel
from tests.engine.model.adapters import edit_config, edit_tensors, save_adapter

Q = "model.layers.0.self_attn.q_proj"
NONE = "model.layers.7.mlp.up_proj"  # there are two layers


@pytest.fixture
def adapter(tiny: TinyModel, tmp_path: Path) -> Path:
    """Of queries, rank 4; the model's heads of 16 make 64 of hidden 32."""
    return save_adapter(tiny.reference, tmp_path / "adapter", target_modules=["q_proj"])


def read(folder: Path, adapter: Path, scale: str = "") -> Checkpoint:
    return Checkpoint(folder, adapters=read_adapters(lora_sources(f"{adapter}{scale}")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "adapters of type LOHA are not supported; supported is LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "adapters of type PROMPT_TUNING"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"kasa_config": {"beta": 1}}, "KaSA is not supported"),
        ({"use_qalora": True}, "QA-LoRA is not supported"),
        ({"use_something_new": True}, "use_something_new is not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "OLoRA"}, "path_initial_model_for_weight_conversion"),
        ({"r": None}, "r must be a number, got None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, got '16'"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": 0}}, "the rank of model.layers.0.self_attn.q_proj is 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern has '8' for q_proj"),
        ({"alpha_pattern": {"q_[proj": 8}}, r"alpha_pattern has 'q_\[proj'"),
        ({"r": 8}, r"\[4, 32\] and .*lora_B.weight \[64, 4\] are not of the rank that the config says, 8"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector, and use_dora is True"),
    ],
    ids=str,
)
def test_what_a_config_asks_for_and_is_not_done(
    tiny: TinyModel, adapter: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        read(tiny.folder, edit_config(adapter, **values))


def test_what_asks_for_nothing_passes(tiny: TinyModel, adapter: Path) -> None:
    plain = read(tiny.folder, adapter).get(f"{Q}.weight")
    values = {
        "use_something_new": False,
        "another": [],
        "init_lora_weights": "gaussian",
        "fan_in_fan_out": True,
    }
    assert torch.equal(read(tiny.folder, edit_config(adapter, **values)).get(f"{Q}.weight"), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NONE}.lora_A.weight": (4, 32)}, f"{NONE}.lora_B is missing"),
        (
            {f"{NONE}.lora_A.weight": (4, 32), f"{NONE}.lora_B.weight": (48, 4)},
            f"fits nothing in the model with base_model.model.{NONE}.lora_A.weight",
        ),
        ({"score.weight": (2, 32)}, "fits nothing in the model with base_model.model.score.weight"),
        ({f"{Q}.bias": (64,)}, f"fits nothing in the model with base_model.model.{Q}.bias"),
        ({f"{Q}.lora_B.bias": (64,)}, f"fits nothing in the model with base_model.model.{Q}.lora_B.bias"),
        ({f"{Q}.lora_A.bias": (4,)}, f"{Q}.lora_A.bias is not known here"),
        ({f"{Q}.lora_E": (4, 1)}, f"fits nothing in the model with base_model.model.{Q}.lora_E"),
        ({f"{Q}.lora_A.weight": (4, 31)}, r"q_proj.lora_A.weight is \[4, 31\], the model needs \[4, 32\]"),
        ({f"{Q}.lora_B.weight": (63, 4)}, r"q_proj.lora_B.weight is \[63, 4\], the model needs \[64, 4\]"),
        ({f"{Q}.lora_B.weight": (64, 3)}, "are not of the rank that the config says, 4"),
        ({f"{Q}.lora_B.weight": (64, 4, 1)}, "are not of the rank that the config says, 4"),
        ({f"{Q}.lora_magnitude_vector": (64,)}, "q_proj has a lora_magnitude_vector, and use_dora is False"),
        ({"lm_head.weight": (64, 32)}, r"the model needs \[61, 32\]; if it was trained with tokens"),
        (
            {"model.norm.lora_A.weight": (4, 32), "model.norm.lora_B.weight": (32, 4)},
            r"is of model.norm.weight \[32\], no matrix",
        ),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32)}, "trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_tensor_is_used_or_named(
    tiny: TinyModel, adapter: Path, changes: dict[str, tuple[int, ...]], message: str
) -> None:
    edit_tensors(adapter, **{name: torch.ones(shape) for name, shape in changes.items()})
    with pytest.raises(AdapterError, match=message):
        read(tiny.folder, adapter)


def test_rows_that_there_are_not(tiny: TinyModel, adapter: Path) -> None:
    edit_tensors(adapter, **{"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)})
    edit_config(adapter, trainable_token_indices={"lm_head": [1, 2], "embed_tokens": [5, 61]})
    with pytest.raises(
        AdapterError, match=r"trainable_token_indices has 61, and model.embed_tokens.weight 61 rows"
    ):
        read(tiny.folder, adapter)
    edit_config(adapter, trainable_token_indices=[5, 6, 7])
    with pytest.raises(AdapterError, match=r"trainable_tokens_delta is \[2, 32\], the model needs \[3, 32\]"):
        read(tiny.folder, adapter)


def test_names_of_another_format(tiny: TinyModel, adapter: Path) -> None:
    save_file(
        {"transformer.q_proj.lora_down.weight": torch.ones(4, 32)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match=r"does not begin with base_model\.model"):
        read(tiny.folder, adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds no tensors"):
        read(tiny.folder, adapter)


def test_values_that_are_not_finite(tiny: TinyModel, adapter: Path) -> None:
    edit_tensors(adapter, **{f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)})
    with pytest.raises(AdapterError, match=r"is damaged: .*lora_A.weight holds values that are not finite"):
        read(tiny.folder, adapter).get(f"{Q}.weight")


def test_a_factor_scales_what_is_added_alone(tiny: TinyModel, adapter: Path, tmp_path: Path) -> None:
    edit_tensors(adapter, **{"model.norm.weight": torch.ones(32)})
    assert torch.equal(read(tiny.folder, adapter).get("model.norm.weight"), torch.ones(32))
    with pytest.raises(AdapterError, match=r"model.norm.weight takes a tensor's place, which the factor 0.5"):
        read(tiny.folder, adapter, "@0.5")
    # PEFT saves embeddings beside their adapters, trained or not: these are only the base.
    beside = save_adapter(tiny.reference, tmp_path / "beside", target_modules=["lm_head"])
    whole, half = (read(tiny.folder, beside, scale).get("lm_head.weight") for scale in ("", "@0.5"))
    base = tiny.reference.lm_head.weight
    torch.testing.assert_close(2 * (half - base), whole - base, atol=1e-5, rtol=1e-5)


def test_two_that_take_one_tensors_place(tiny: TinyModel, adapter: Path, tmp_path: Path) -> None:
    other = save_adapter(tiny.reference, tmp_path / "other", target_modules=["k_proj"])
    for folder, value in ((adapter, 1.0), (other, 1.0)):
        edit_tensors(folder, **{"model.norm.weight": torch.full((32,), value)})
    adapters = read_adapters(lora_sources(f"{adapter},{other}"))
    assert torch.equal(Checkpoint(tiny.folder, adapters=adapters).get("model.norm.weight"), torch.ones(32))
    edit_tensors(other, **{"model.norm.weight": torch.full((32,), 2.0)})
    with pytest.raises(AdapterError, match=r"both take the place of model.norm.weight, with other values"):
        Checkpoint(tiny.folder, adapters=read_adapters(lora_sources(f"{adapter},{other}")))


def rename(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"no")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, r"holds adapter_model.bin, not adapter_model.safetensors; load it in PEFT and save it"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "holds no adapter_model.safetensors",
        ),
        (truncate, "cannot read the adapter: .* is damaged or incomplete"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_files_that_are_not_there_or_damaged(
    tiny: TinyModel, adapter: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(adapter)
    with pytest.raises(AdapterError, match=message):
        read(tiny.folder, adapter)


def test_where_an_adapter_may_be(tiny: TinyModel, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in (
        ("./nowhere", "adapter folder ./nowhere does not exist"),
        ("a/b/c", "adapter folder a/b/c does not exist"),
        ("nowhere", "adapter folder nowhere does not exist"),
        (str(adapter / "adapter_config.json"), "is a file; name the folder that PEFT saved"),
        ("some one/adapter", "adapter 'some one/adapter' is neither a local folder, nor a hub id"),
        ("someone/adapter", "adapter someone/adapter is neither a local folder nor in the hub's cache"),
    ):
        with pytest.raises(ModelError, match=message):
            read_adapters(lora_sources(source))
    with pytest.raises(
        ModelError, match=f"is an adapter: name the model it is for, and it as --lora {adapter}"
    ):
        resolve_model(str(adapter))
    (checked,) = read_adapters([LoraSource(str(adapter), 0.5)])
    assert checked.identity.startswith("adapter@0.5 sha256:")
    edit_config(adapter, base_model_name_or_path="someone/model")
    (other,) = read_adapters([LoraSource(str(adapter), 1.0)])
    assert (other.ranks, other.base_model) == ((4,), "someone/model")
    edit_tensors(adapter, **{"model.norm.weight": torch.ones(32)})
    (third,) = read_adapters([LoraSource(str(adapter), 1.0)])
    assert len({checked.digest, other.digest, third.digest}) == 3


@pytest.mark.parametrize(
    ("setting", "sources"),
    [
        ("a/b", [("a/b", 1.0)]),
        ("a/b@0.5, ./c@-2", [("a/b", 0.5), ("./c", -2.0)]),
        (["a/b", "runs@home/c@1e-1"], [("a/b", 1.0), ("runs@home/c", 0.1)]),
        ("runs@home/c", [("runs@home/c", 1.0)]),
        (None, []),
    ],
)
def test_the_setting(setting: Any, sources: list[tuple[str, float]]) -> None:
    assert list(lora_sources(EngineConfig(lora=setting).lora)) == [LoraSource(*source) for source in sources]


@pytest.mark.parametrize("setting", ["", "a/b,", "@0.5", "a/b@0", "a/b@nan", ["a,b"], [1], 3])
def test_no_setting(setting: Any) -> None:
    with pytest.raises(ValidationError):
        EngineConfig(lora=setting)


def test_random_weights_take_none(tiny: TinyModel, adapter: Path) -> None:
    with pytest.raises(ValidationError, match="no effect on the random weights of load_format dummy"):
        EngineConfig(model=str(tiny.folder), lora=str(adapter), load_format="dummy")


def test_what_is_loaded_says_so(tiny: TinyModel, adapter: Path) -> None:
    config = EngineConfig(model=str(tiny.folder), lora=str(adapter), device="cpu", kv_cache_tokens=1024)
    digest = read_adapters(lora_sources(str(adapter)))[0].digest
    assert load(config, progress=False).info.lora == (f"adapter@1 sha256:{digest[:16]}",)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4


def test_a_magnitude_for_every_row(tiny: TinyModel, tmp_path: Path) -> None:
    adapter = save_adapter(tiny.reference, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    read(tiny.folder, edit_tensors(adapter, **{f"{Q}.lora_magnitude_vector": torch.ones(64)}))
    edit_tensors(adapter, **{f"{Q}.lora_magnitude_vector": torch.ones(1)})
    with pytest.raises(AdapterError, match=r"lora_magnitude_vector is \[1\], the model needs \[64\]"):
        read(tiny.folder, adapter)
