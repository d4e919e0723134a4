"""Adapters merged at load against PEFT's own merge, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import lora_sources
from engine.errors import AdapterError, WeightsError
from engine.model.adapter_files import read_adapters
from engine.model.weights import Checkpoint
from tests.engine.model.adapters import LINEAR, adapted, edit_tensors, merged, save_adapter
from tests.engine.model.gguf_cases import CASES as GGUF_CASES
from tests.engine.model.gguf_files import published, write
from tests.engine.model.mxfp4_files import published as published_in_mxfp4
from tests.engine.model.test_prequantized import CASES as QUANTIZED_CASES, quantized_model
from tests.engine.model.test_text_part import gemma, save as save_with_vision
from tests.support import (
    greedy,
    greedy_reference,
    make_engine,
    run_all,
    save_model,
    save_random_heads,
    tiny_model,
)

PROMPT = [3, 41, 59, 26, 53, 58, 9]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "every linear layer": ("llama", {}, {}),
    "rsLoRA and patterns": (
        "qwen2",
        {},
        {
            "use_rslora": True,
            "rank_pattern": {
                "k_proj": 2,
                r"layers\.1\.mlp\.up_proj": 6,
                "^model.layers.0.self_attn.q_proj": 3,
            },
            "alpha_pattern": {"o_proj": 1, r"^model\.layers\.0\..*down_proj": 0.5},
        },
    ),
    "embeddings and output": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "whole modules": (
        "qwen3",
        {},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head", "q_norm", "norm"]},
    ),
    "trained biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
    "biases of the layers alone": (
        "llama",
        {"attention_bias": True},
        {"bias": "lora_only", "target_modules": ["v_proj", "up_proj"]},
    ),
    "biases of the factors": (
        "llama",
        {"attention_bias": True},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    ),
    "DoRA": ("gemma3_text", {}, {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens"]}),
    "tokens": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 41, 60]}),
    "one matrix for q, k and v": (
        "phi3",
        {"head_dim": 8},
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
    "neighbouring channels rotated": ("glm", {}, {"target_modules": ["q_proj", "k_proj", "gate_up_proj"]}),
    "the MLP beside experts": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
        {"target_modules": r".*(shared_expert\.(up|down)_proj|q_proj)"},
    ),
    "attention beside experts": (
        "mixtral",
        {"num_local_experts": 3},
        {"target_modules": ["q_proj", "o_proj"]},
    ),
}


def checkpoint_of(folder: Path, lora: str, *, tied: bool = False) -> Checkpoint:
    return Checkpoint(folder, adapters=read_adapters(lora_sources(lora)), tied=tied)


def check(model: Any, folder: Path, lora: str, reference: Any, *, exact: bool = True) -> None:
    """Weights are the reference's, and so is the text, with a tree and without."""
    tied = model.config.tie_word_embeddings
    checkpoint, state = checkpoint_of(folder, lora, tied=tied), published(reference)
    if tied and not checkpoint.untied:
        del state["lm_head.weight"]
    assert checkpoint.names == state.keys()
    for name, wanted in state.items():
        got = checkpoint.get(name)
        assert checkpoint.shape(name) == tuple(got.shape)
        if exact:
            assert torch.equal(got, wanted), name
        else:
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    heads = save_random_heads(folder / "heads.safetensors", hidden=hidden, vocab=vocab)
    wanted_text = greedy_reference(reference, PROMPT, 12)
    assert wanted_text != greedy_reference(model, PROMPT, 12)
    for settings in ({"tree": "off"}, {"heads": str(heads), "tree": 12}):
        outputs = run_all(make_engine(folder, lora=lora, **settings), [greedy("r", PROMPT, 12)])
        assert outputs["r", 0] == wanted_text


@pytest.mark.parametrize(("family", "overrides", "config"), CASES.values(), ids=CASES)
def test_the_merged_model_is_pefts(
    family: str, overrides: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **overrides)
    folder = save_model(model, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    reference = merged(model, (adapter, 1.0))
    # The lengths of an embedding's columns are summed in another order there.
    check(model, folder, str(adapter), reference, exact=not config.get("use_dora"))


def test_several_are_merged_one_after_the_other_each_with_its_factor(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = save_model(model, tmp_path / "model")
    first = save_adapter(model, tmp_path / "first", seed=1)
    other = save_adapter(
        model, tmp_path / "other@2", seed=2, r=3, use_dora=True, target_modules=["q_proj", "up_proj"]
    )
    plain = save_adapter(model, tmp_path / "plain", seed=3, r=3, use_rslora=True)
    check(model, folder, f"{first}@0.3,{plain}@-1.7", merged(model, (first, 0.3), (plain, -1.7)))
    lora = f"{first}@0.5, {other}@-1.25"
    check(model, folder, lora, merged(model, (first, 0.5), (other, -1.25)), exact=False)
    weight = checkpoint_of(folder, f"{other}@1,{first}").get("model.layers.0.self_attn.q_proj.weight")
    wanted = merged(model, (other, 1.0), (first, 1.0)).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_tied_matrices_part_as_they_did_in_training(config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's own merge would put into both what was trained for one, and warns of that."""
    model = tiny_model("llama", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    checkpoint = checkpoint_of(folder, str(adapter), tied=True)
    assert checkpoint.untied
    embedding, lm_head = checkpoint.get("model.embed_tokens.weight"), checkpoint.get("lm_head.weight")
    assert torch.equal(embedding, lm_head) is bool(config.get("ensure_weight_tying"))
    reference = adapted(model, (adapter, 1.0))
    wanted = greedy_reference(reference, PROMPT, 12)
    assert wanted != greedy_reference(model, PROMPT, 12)
    engine = make_engine(folder, lora=str(adapter), tree=8)
    assert run_all(engine, [greedy("r", PROMPT, 12)])["r", 0] == wanted


def test_tied_matrices_stay_tied_where_neither_is_changed_or_both_in_the_same_rows(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "model")
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 41, 60]}
    for config in ({}, rows):
        adapter = save_adapter(model, tmp_path / f"adapter-{len(config)}", **config)
        check(model, folder, str(adapter), merged(model, (adapter, 1.0)))
    # And where another adapter parts them, they begin with the same rows.
    other = save_adapter(model, tmp_path / "other", target_modules=["lm_head"])
    checkpoint = checkpoint_of(folder, f"{adapter},{other}", tied=True)
    embedding, lm_head = checkpoint.get("model.embed_tokens.weight"), checkpoint.get("lm_head.weight")
    alone = checkpoint_of(folder, str(other), tied=True).get("lm_head.weight")
    same = torch.ones(61, dtype=torch.bool).index_fill(
        0, torch.tensor(rows["trainable_token_indices"]), False
    )
    assert torch.equal(lm_head[same], alone[same])
    trained = lm_head[~same] - alone[~same]
    torch.testing.assert_close(trained, (embedding - model.lm_head.weight)[~same], atol=1e-6, rtol=1e-6)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """As releases of transformers before 5 named them, whether the checkpoint is so or has them stacked."""
    model = tiny_model("mixtral", num_local_experts=3)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["o_proj"], r=2, lora_alpha=2)
    state = published(merged(model, (adapter, 1.0)))
    part = "model.layers.1.block_sparse_moe"
    generator = torch.Generator().manual_seed(3)
    sizes = {"experts.2.w1": (48, 32), "experts.0.w2": (32, 48), "gate": (3, 32)}
    factors = {
        f"{part}.{name}.lora_{kind}.weight": torch.randn(shape, generator=generator)
        for name, (outputs, inputs) in sizes.items()
        for kind, shape in (("A", (2, inputs)), ("B", (outputs, 2)))
    }
    edit_tensors(adapter, **factors)
    own = {"experts.2.w1": "experts.2.gate_proj", "experts.0.w2": "experts.0.down_proj", "gate": "gate"}
    for name in sizes:
        a, b = (factors[f"{part}.{name}.lora_{kind}.weight"] for kind in "AB")
        state[f"model.layers.1.mlp.{own[name]}.weight"] += b @ a
    folder = save_model(model, tmp_path / "model")
    assert any(".experts.2.w1." in name for name in load_file(folder / "model.safetensors"))
    stacked = tmp_path / "stacked"
    shutil.copytree(folder, stacked)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        stacked / "model.safetensors",
    )
    for each in (folder, stacked):
        checkpoint = checkpoint_of(each, str(adapter))
        assert checkpoint.names == state.keys()
        for name, wanted in state.items():
            torch.testing.assert_close(checkpoint.get(name), wanted, atol=1e-6, rtol=1e-6)


def test_a_gguf_and_weights_of_awq_are_merged_as_they_are_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    model = write(path, *GGUF_CASES["llama"])
    adapter = save_adapter(model, tmp_path / "adapter")
    reference = merged(model, (adapter, 1.0))
    prompt = [3, 141, 59, 26, 53, 58, 97]
    outputs = run_all(make_engine(path, lora=str(adapter)), [greedy("r", prompt, 10, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(reference, prompt, 10) != greedy_reference(model, prompt, 10)

    model = quantized_model(tmp_path / "awq", "llama", *QUANTIZED_CASES["awq"])
    adapter = save_adapter(model, tmp_path / "another")
    reference = merged(model, (adapter, 1.0))
    outputs = run_all(make_engine(tmp_path / "awq", lora=str(adapter)), [greedy("r", PROMPT, 10)])
    assert outputs["r", 0] == greedy_reference(reference, PROMPT, 10) != greedy_reference(model, PROMPT, 10)


def test_whatever_the_dtypes_of_both_are_the_sum_is_float32(tmp_path: Path) -> None:
    """Weights in float16 and factors in bfloat16, served in float32: as PEFT merges them into that model."""
    model = tiny_model("llama").half()
    folder = save_model(model, tmp_path / "model")
    adapter = save_adapter(model.float(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    reference = merged(model, (adapter, 1.0))
    checkpoint = checkpoint_of(folder, str(adapter))
    for name, wanted in published(reference).items():
        assert torch.equal(checkpoint.get(name).float(), wanted), name
    engine = make_engine(folder, lora=str(adapter), dtype="float32")
    assert run_all(engine, [greedy("r", PROMPT, 12)])["r", 0] == greedy_reference(reference, PROMPT, 12)


def test_int8_is_of_the_merged_weights(tmp_path: Path) -> None:
    """The same as of a checkpoint that holds them."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    folder = save_model(model, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    whole = save_model(merged(model, (adapter, 1.0)), tmp_path / "whole")
    texts = []
    for each, lora in ((folder, str(adapter)), (whole, None), (folder, None)):
        engine = make_engine(each, lora=lora, quantization="int8", tree="off")
        texts.append(run_all(engine, [greedy("r", PROMPT, 24)])["r", 0])
    assert texts[0] == texts[1] != texts[2]


def test_experts_in_4_bits_take_none(tmp_path: Path) -> None:
    model = published_in_mxfp4(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    reference = merged(model, (adapter, 1.0))
    for packed in (True, False):
        checkpoint = Checkpoint(
            tmp_path / "model", mxfp4=packed, adapters=read_adapters([(str(adapter), 1.0)])
        )
        wanted = reference.model.layers[1].self_attn.o_proj.weight
        assert torch.equal(checkpoint.get("model.layers.1.self_attn.o_proj.weight"), wanted)
    factors = {"lora_A.weight": torch.ones(4, 64), "lora_B.weight": torch.ones(128, 4)}
    name = "model.layers.1.mlp.experts.2.up_proj"
    edit_tensors(adapter, **{f"{name}.{part}": tensor for part, tensor in factors.items()})
    for packed in (True, False):
        with pytest.raises(AdapterError, match=rf"changes .*{name}.lora_A.weight: experts in MXFP4 stay"):
            Checkpoint(tmp_path / "model", mxfp4=packed, adapters=read_adapters([(str(adapter), 1.0)]))


def test_a_bias_that_says_nothing_may_not_be_changed_either(tmp_path: Path) -> None:
    """Quantisers write zeros beside layers without bias, and loading passes over them."""
    model = quantized_model(tmp_path / "awq", "llama", *QUANTIZED_CASES["awq"])
    file, name = tmp_path / "awq" / "model.safetensors", "model.layers.0.mlp.up_proj.bias"
    save_file(load_file(file) | {name: torch.zeros(64)}, file)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["up_proj"])
    make_engine(tmp_path / "awq", lora=str(adapter))
    edit_tensors(adapter, **{name.replace("bias", "base_layer.bias"): torch.ones(64)})
    with pytest.raises(WeightsError, match=rf"unexpected \(1\): {name}"):
        make_engine(tmp_path / "awq", lora=str(adapter))


def test_of_a_model_that_sees_images_the_text_part_is_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gemma(tied=False)
    folder = save_with_vision(model, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    assert any("vision" in name for name in load_file(adapter / "adapter_model.safetensors"))
    reference = merged(model, (adapter, 1.0))
    caplog.set_level("INFO")
    outputs = run_all(make_engine(folder, lora=str(adapter)), [greedy("r", PROMPT, 10)])
    assert outputs["r", 0] == greedy_reference(reference, PROMPT, 10) != greedy_reference(model, PROMPT, 10)
    assert "changes to what sees images are left out" in caplog.text
    alone = save_adapter(model, tmp_path / "alone", target_modules=r".*vision_tower.*(q|v)_proj")
    with pytest.raises(AdapterError, match="changes what sees images alone"):
        make_engine(folder, lora=str(alone))
