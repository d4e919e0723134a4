"""Mixtures of experts in GGUF files: the older form, what is refused, and what damaged files are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from engine.model.experts_config import Gate, Shared
from engine.model.gguf import GgufFile, _end_tokens
from engine.model.gguf_experts import expert_tensors, experts_config
from engine.model.gguf_header import GgufTensor
from engine.model.mxfp4 import dequantized
from engine.model.weights import Checkpoint, resolve_model
from tests.engine.model.gguf_cases import CASES
from tests.engine.model.gguf_files import published, write
from tests.support import greedy, greedy_reference, make_engine, run_all

MIXTRAL = {"num_local_experts": 3}
QWEN = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))


GPT_OSS = CASES["gpt_oss"][1]


def described(path: Path, family: str, overrides: dict[str, Any], **stated: Any) -> ModelConfig:
    write(path, family, overrides, stated={key.replace("__", "."): value for key, value in stated.items()})
    return ModelConfig.from_folder(resolve_model(str(path)))


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    """As Mixtral was converted up to March 2024."""
    path = tmp_path / "tiny.gguf"
    model = write(path, "mixtral", MIXTRAL, split=True)
    folder = resolve_model(str(path))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mixtral"
    checkpoint = Checkpoint(folder)
    wanted = published(model)
    assert checkpoint.names == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(checkpoint.get(name), tensor, atol=1e-6, rtol=1e-6)
    outputs = run_all(make_engine(path), [greedy("r", [3, 141, 59], 8, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, [3, 141, 59], 8)


def test_an_expert_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the tensor of all, which in a model of 128 would be dequantised 128 times."""
    path = tmp_path / "tiny.gguf"
    write(path, "qwen3_moe", QWEN)
    read: list[GgufTensor] = []

    def recording(data: Any, tensor: GgufTensor) -> Any:
        read.append(tensor)
        return original(data, tensor)

    from engine.model import gguf

    original = gguf.dequantized
    monkeypatch.setattr(gguf, "dequantized", recording)
    file = GgufFile(resolve_model(str(path)) / gguf.GGUF_INDEX)
    sizes = {}
    for projection in ("gate_proj", "down_proj"):
        for expert in range(QWEN["num_experts"]):
            file.get(f"model.layers.1.mlp.experts.{expert}.{projection}.weight")
        sizes[projection] = {tensor.bytes for tensor in read}
        ends = [tensor.offset + tensor.bytes for tensor in read]
        assert [tensor.offset for tensor in read[1:]] == ends[:-1]
        read.clear()
    assert sizes == {"gate_proj": {32 * 64 // 32 * 34}, "down_proj": {64 * 32 * 2}}  # Q8_0 and F16


def test_what_files_leave_out_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    for family, overrides, stated, renormalised in (
        ("qwen3_moe", QWEN, {}, True),
        ("qwen3_moe", QWEN, {"expert_weights_norm": False}, False),
        ("olmoe", OLMOE, {}, False),
        ("olmoe", OLMOE, {"expert_weights_norm": True}, True),
        ("mixtral", MIXTRAL, {"expert_weights_scale": 1.0, "expert_gating_func": 1}, True),
    ):
        config = described(path, family, overrides, **stated)
        assert config.experts is not None
        assert config.experts.renormalised is renormalised
        assert all(config.experts.layers)
    stated = {"expert_feed_forward_length": None, "expert_used_count": [3, 3]}  # 96 is that of all three
    config = described(path, "qwen3_moe", QWEN, **stated)
    assert config.experts is not None
    assert (config.experts.width, config.experts.chosen) == (96 // 3, 3)
    assert described(path, "llama", {}, expert_count=0, expert_used_count=0).experts is None


def test_what_files_leave_out_of_what_is_beside_experts(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    family, glm = CASES["glm4_moe"]
    names = ("leading_dense_block_count", "expert_gating_func", "expert_group_count", "nextn_predict_layers")
    more = ("expert_weights_scale", "expert_weights_norm", "expert_group_used_count")
    unsaid = dict.fromkeys((*names, *more))
    config = described(path, family, glm, block_count=2, **unsaid)
    assert config.experts is not None
    assert config.num_layers == 2
    assert config.experts.layers == (True, True)
    assert config.experts.gate == Gate(sigmoid=True, corrected=True, least=1e-20)
    assert not config.experts.renormalised
    family, qwen = CASES["qwen2_moe"]
    experts = described(path, family, qwen, expert_shared_feed_forward_length=None).experts
    assert experts is not None
    assert experts.shared == Shared(96, gated=True)
    assert not experts.renormalised
    experts = described(path, family, qwen, expert_weights_norm=True).experts
    assert experts is not None
    assert experts.renormalised
    family, ernie = CASES["ernie4_5-moe"]
    unsaid = dict.fromkeys(("interleave_moe_layer_step", "leading_dense_block_count", "expert_shared_count"))
    experts = described(path, family, ernie | {"moe_layer_start_index": 0}, **unsaid).experts
    assert experts is not None
    assert experts.layers == (True, True, True)
    assert experts.shared is None
    family, hunyuan = CASES["hunyuan_moe"]
    experts = described(path, family, hunyuan, feed_forward_length=128).experts
    assert experts is not None
    assert (experts.width, experts.shared) == (96, Shared(96))


@pytest.mark.parametrize(
    ("case", "stated", "message"),
    [
        ("glm4_moe", {"expert_gating_func": 1}, "weights of experts that are no sigmoids"),
        ("glm4_moe", {"nextn_predict_layers": 3}, "it names 3 layers, of which 3 guess further ahead"),
        ("glm4_moe", {"rope.dimension_sections": [2, 2, 2, 2]}, "a GLM that sees images"),
        ("dots1", {"expert_shared_count": None}, "no 'expert_shared_count'"),
        ("ernie4_5-moe", {"expert_gating_func": 2}, "weights of experts that are no softmax"),
        (
            "hunyuan_moe",
            {"expert_shared_feed_forward_length": 64},
            r"\(64\) is not as wide as they are \(96\)",
        ),
        ("hunyuan_moe", {"expert_weights_norm": False}, "whose weights of experts do not sum to one"),
    ],
)
def test_what_is_beside_experts_and_not_covered_is_refused(
    tmp_path: Path, case: str, stated: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        described(tmp_path / "tiny.gguf", *CASES[case], **stated)


@pytest.mark.parametrize(
    ("family", "stated", "message"),
    [
        ("granitemoe", {"expert_shared_feed_forward_length": 64}, r"that see every token \(granitemoe\.exp"),
        ("mixtral", {"expert_shared_count": 1}, "experts that see every token"),
        ("mixtral", {"expert_group_count": 2}, "groups of experts"),
        ("mixtral", {"expert_gating_func": 2}, "weights of experts that are no softmax"),
        ("mixtral", {"expert_weights_scale": 2.5}, "a factor on the weights of experts"),
        ("mixtral", {"expert_weights_norm": False}, "whose weights of experts do not sum to one"),
        ("mixtral", {"expert_used_count": [1, 2]}, "whose layers differ in experts of a token"),
        ("mixtral", {"expert_used_count": 4}, "num_experts_per_tok is 4 of 3 experts"),
        ("olmoe", {"attention.clamp_kqv": 8.0}, "a bound on queries, keys and values"),
        ("granitemoe", {"expert_count": None}, "a GGUF of granitemoe without experts is not supported"),
        ("qwen3", {"expert_count": 4}, "a GGUF of qwen3 with experts is not supported"),
    ],
)
def test_mixtures_that_are_not_covered_are_refused(
    tmp_path: Path, family: str, stated: dict[str, Any], message: str
) -> None:
    overrides = {"olmoe": OLMOE, "qwen3": {}}.get(family, MIXTRAL)
    with pytest.raises(UnsupportedModelError, match=message):
        described(tmp_path / "tiny.gguf", family, overrides, **stated)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"expert_count": 4}, r"it names 4 experts, and blk\.0\.ffn_gate_inp\.weight has 3 rows"),
        ({"expert_count": 2**31 - 1}, "it names 2147483647 experts"),
        ({"expert_used_count": None}, "no 'expert_used_count'"),
        ({"expert_used_count": -1}, r"llama\.expert_used_count must be a whole number, or a list of these"),
        ({"expert_weights_norm": 1}, r"llama\.expert_weights_norm must be true or false"),
    ],
)
def test_metadata_that_does_not_fit_is_named(tmp_path: Path, stated: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"cannot be read as a GGUF model: {message}"):
        described(tmp_path / "tiny.gguf", "mixtral", MIXTRAL, **stated)


def test_experts_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    expert = r"model\.layers\.{}\.mlp\.experts\.{}\.{}_proj\.weight"
    write(path, "mixtral", MIXTRAL, split=True, without="blk.1.ffn_up.2.weight")
    with pytest.raises(WeightsError, match=rf"missing \(1\): {expert.format(1, 2, 'up')}$"):
        make_engine(path)
    write(path, "mixtral", MIXTRAL, split=True, extra=["blk.1.ffn_down.3.weight"])
    with pytest.raises(WeightsError, match=rf"unexpected \(1\): {expert.format(1, 3, 'down')}$"):
        make_engine(path)
    write(path, "mixtral", MIXTRAL, extra=["blk.0.ffn_down.1.weight"])
    with pytest.raises(ModelError, match=r"experts of blk\.0\.ffn_down\.1\.weight are in another tensor too"):
        resolve_model(str(path))
    write(path, "mixtral", MIXTRAL, extra=["blk.0.ffn_gate_shexp.weight", "blk.0.ffn_up_exps.scale"])
    shown = r"blk\.0\.ffn_gate_shexp\.weight, blk\.0\.ffn_up_exps\.scale"
    with pytest.raises(WeightsError, match=rf"unexpected \(2\): {shown}$"):
        make_engine(path)


def test_experts_in_4_bits_are_read_as_kernels_take_them(tmp_path: Path) -> None:
    """The file's numbers in another order, none of them dequantised; what is not in 4 bits as ever."""
    path = tmp_path / "tiny.gguf"
    model = write(path, "gpt_oss", GPT_OSS)
    folder = resolve_model(str(path))
    whole, packed = Checkpoint(folder), Checkpoint(folder, mxfp4=True)
    experts = "model.layers.1.mlp.experts.4."
    assert packed.names - whole.names == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{kind}"
        for layer in range(2)
        for expert in range(5)
        for part in ("gate", "up", "down")
        for kind in ("blocks", "scales")
    }
    codes, words = (packed.get(f"{experts}up_proj.{kind}") for kind in ("blocks", "scales"))
    for name, tensor in (("blocks", codes), ("scales", words)):
        assert packed.shape(f"{experts}up_proj.{name}") == tuple(tensor.shape)
    scales = torch.stack((words[0] & 255, words[0] >> 16 & 255), dim=1)
    found = dequantized(torch.cat((codes & 15, codes >> 4), 1), scales)
    assert torch.equal(found, published(model)[f"{experts}up_proj.weight"])
    assert torch.equal(packed.get(f"{experts}up_proj.bias"), whole.get(f"{experts}up_proj.bias"))


def test_experts_in_4_bits_and_others_are_all_dequantised(tmp_path: Path) -> None:
    """And what other mixtures have in MXFP4 is as good as gpt-oss's."""
    path = tmp_path / "tiny.gguf"
    write(path, "gpt_oss", GPT_OSS)
    folder = resolve_model(str(path))
    index = json.loads((folder / "gguf.json").read_text())
    experts = {name: each for name, each in index["tensors"].items() if ".experts." in name}
    header = {f"blk.0.ffn_{part}_exps.weight": GgufTensor("MXFP4", (4, 64, 64), 0, 8704) for part in "abc"}
    header["blk.0.ffn_gate_inp.weight"] = GgufTensor("F32", (4, 64), 0, 1024)
    own = {"block_count": 1, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    assert experts_config(own, "qwen3moe", header)["quantization_config"] == {"quant_method": "mxfp4"}
    header["blk.0.ffn_a_exps.weight"] = GgufTensor("Q8_0", (4, 64, 64), 0, 17408)
    assert "quantization_config" not in experts_config(own, "qwen3moe", header)
    one = next(name for name in experts if name.endswith(".weight"))
    index["tensors"][one]["type"] = "Q8_0"
    (folder / "gguf.json").write_text(json.dumps(index))
    assert not any(name.endswith(".blocks") for name in Checkpoint(folder, mxfp4=True).names)


def test_gpt_oss_has_what_its_metadata_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    config = described(path, "gpt_oss", GPT_OSS)
    assert config.windows == (5, None)
    assert config.experts is not None
    assert config.experts.clamp == (7.0, 1.702)
    config = described(path, "gpt_oss", GPT_OSS, attention__sliding_window_pattern=[False, True])
    assert config.windows == (None, 5)
    config = described(path, "gpt_oss", GPT_OSS, attention__sliding_window_pattern=1)
    assert config.windows == (None, None)
    with pytest.raises(ModelError, match="sliding_window_pattern names 1 layers of 2"):
        described(path, "gpt_oss", GPT_OSS, attention__sliding_window_pattern=[True])


@pytest.mark.parametrize("harmony", [True, False])
def test_a_message_of_gpt_oss_ends_without_ending_the_answer(harmony: bool) -> None:
    tokens = ["a", "<|end|>", "<|return|>", "<|call|>" if harmony else "b", "<|endoftext|>"]
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 3, 3, 3, 3],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 1,
    }
    assert set(_end_tokens(fields)) == ({2, 3} if harmony else {2, 1, 4})


def test_what_is_not_stacked_keeps_its_name() -> None:
    for shape, size in (((4,), 16), ((2, 4), 32), ((0, 4, 2), 0), ((2, 4, 0), 0), ((2, 2, 4, 2), 128)):
        assert expert_tensors("l", "ffn_up_exps.weight", GgufTensor("F32", shape, 0, size)) == {}
    tensor = GgufTensor("F32", (2, 4, 2), 0, 64)
    assert list(expert_tensors("l", "ffn_up_exps.weight", tensor)) == [
        "l.mlp.experts.0.up_proj.weight",
        "l.mlp.experts.1.up_proj.weight",
    ]
    others = ("ffn_up.weight", "ffn_up.x.weight", "ffn_up.0.bias", "ffn_up_exps.bias", "ffn_norm_exps.weight")
    for part in (*others, "ffn_gate_up_exps.weight"):
        assert expert_tensors("l", part, tensor) == {}
