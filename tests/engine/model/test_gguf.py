"""GGUF files written here as llama.cpp's converter writes them, against the models they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from engine.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from engine.model.weights import Checkpoint, load_generation_defaults, load_tokenizer, resolve_model
from engine.text import TextProcessor
from tests.support import greedy, greedy_reference, make_engine, run_all, tiny_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
CASES = {
    "llama": ("llama", {}),
    "llama-3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 5, "tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))


def q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32: a float16 scale and 32 bytes. Returns the bytes and what they stand for."""
    rows, restored = [], np.zeros_like(values)
    for number, row in enumerate(values):
        packed = b""
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            scale = np.float16(np.abs(block).max() / 127)
            q = np.round(block / np.float32(scale)).clip(-127, 127).astype(np.int8)
            packed += scale.tobytes() + q.tobytes()
            restored[number, start : start + 32] = q.astype(np.float32) * np.float32(scale)
        rows.append(np.frombuffer(packed, dtype=np.uint8))
    return np.stack(rows), restored


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def sentencepiece(writer: gguf.GGUFWriter, size: int) -> None:
    pieces = ["\u2581", "a", "b", "c", "ab", "\u2581ab", "abc", "  "]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 1), 4]
    scores = [0.0] * 259 + [-9.0, -10.0, -11.0, -12.0, -3.0, -2.0, -1.0, -20.0]
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores + [-99.0] * (size - len(scores)))
    writer.add_token_types(kinds + [1] * (size - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def byte_level(writer: gguf.GGUFWriter, size: int, pre: str = "qwen2") -> None:
    tokens = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "\u0120ab",
        "12",
        "<|im_start|>",
        "<|im_end|>",
        "<|end_of_text|>",
        "<eos>",
    ]
    kinds = [1] * 259 + [3, 4, 3] + [1] * (size - 262)
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "\u0120 ab", "1 2"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")


def write(path: Path, family: str, overrides: dict[str, Any], **changes: Any) -> Any:
    """A tiny model as a GGUF, its matrices in Q8_0 or F16; returns it with the weights it stands for."""
    arch = changes.get("arch", {"gemma3_text": "gemma3"}.get(family, family))
    model = tiny_model(family, **(SHAPE | overrides))
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if family == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if rope.get("rope_type") == "llama3":
        scaled = ModelConfig.from_hf(config_of(model)).rope.inv_freq
        plain = rope["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    (byte_level if family.startswith("qwen") else sentencepiece)(writer, config.vocab_size)
    state = model.state_dict()
    names = GEMMA_NAMES if family == "gemma3_text" else NAMES
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in state:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        layer = module.split(".")[2] if module.startswith("model.layers.") else None
        part = module.split(".", 3)[3] if layer else module
        target = f"blk.{layer}.{names[part]}.{kind}" if layer else f"{names[part]}.{kind}"
        values = state[name].numpy().copy()
        if arch == "llama" and (count := heads.get(part.rpartition(".")[2])):
            values = permuted(values, count)
        if arch == "gemma3" and part.endswith("norm"):
            values += 1
        if values.ndim == 1:
            writer.add_tensor(target, values)
            continue
        if part.endswith(("v_proj", "down_proj")):
            restored = values.astype(np.float16)
            writer.add_tensor(target, restored)
        else:
            packed, restored = q8_0(values)
            kind_of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, packed, raw_dtype=kind_of)
        restored = torch.from_numpy(restored.astype(np.float32))
        if arch == "llama" and (count := heads.get(part.rpartition(".")[2])):
            dim = len(restored) // count // 2  # the other way round, row by row
            order = [h * 2 * dim + (i % dim) * 2 + i // dim for h in range(count) for i in range(2 * dim)]
            restored = restored[order]
        state[name].copy_(restored)
    for name in changes.get("extra", ()):
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def config_of(model: Any) -> Any:
    model.config.architectures = [type(model).__name__]
    return model.config


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES)
def test_a_gguf_computes_what_its_numbers_stand_for(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    model = write(path, family, overrides)
    checkpoint = Checkpoint(resolve_model(str(path)))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert checkpoint.names == state.keys()
    for name, wanted in state.items():
        assert checkpoint.shape(name) == tuple(wanted.shape)
        torch.testing.assert_close(checkpoint.get(name), wanted, atol=1e-6, rtol=1e-6)
    prompt = [3, 141, 59, 26, 53, 58, 97]
    outputs = run_all(make_engine(path), [greedy("r", prompt, 10, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, prompt, 10)


def test_the_description_is_made_once_and_noticed_when_stale(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "llama", {})
    folder = resolve_model(str(path))
    assert resolve_model(str(path)) == folder
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(WeightsError, match="is not the file"):
        Checkpoint(folder)
    assert resolve_model(str(path)) != folder


def test_sentencepiece_text(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "llama", {})
    tokenizer = load_tokenizer(resolve_model(str(path)))
    assert tokenizer.tokenize("ab abc") == ["\u2581ab", "\u2581", "abc"]  # "abc" ranks before "\u2581ab"
    assert tokenizer("a\u00e9").input_ids == [1, 259, 260, 3 + 0xC3, 3 + 0xA9]
    for text in ("ab abc", " a  b", "\u00e9 \U0001f642\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_gemma_text(tmp_path: Path) -> None:
    """No space is put before it, runs of spaces are one token, and pieces join in the order of ids."""
    path = tmp_path / "tiny.gguf"
    write(path, "gemma3_text", {})
    tokenizer = load_tokenizer(resolve_model(str(path)))
    assert tokenizer.tokenize("ab  c") == ["ab", "\u2581\u2581", "c"]
    assert tokenizer.tokenize(" abc") == ["\u2581ab", "c"]
    assert tokenizer.decode(tokenizer(" a  b\n").input_ids, skip_special_tokens=True) == " a  b\n"


def test_byte_level_text_and_end_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "qwen2", {})
    folder = resolve_model(str(path))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("ab ab12<|im_end|>") == ["ab", "\u0120ab", "1", "2", "<|im_end|>"]
    assert tokenizer.chat_template == "{{ messages }}"
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])  # "<eos>" is an ordinary piece
    assert load_generation_defaults(folder).eos_token_ids == (0, *ends)


def described(tokens: list[str], kinds: dict[str, int] | None = None, **fields: Any) -> dict[str, Any]:
    """A GGUF's metadata of a byte-level tokenizer, or of sentencepiece's with `ggml={"model": "llama"}`."""
    stated = {"model": "gpt2", "pre": "qwen2", "merges": []} | fields.pop("ggml", {})
    return {
        "general.architecture": fields.pop("architecture", "llama"),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [(kinds or {}).get(token, 1) for token in tokens],
        **{f"tokenizer.ggml.{name}": value for name, value in stated.items()},
        **fields,
    }


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["ab", "\u0120", "123", "4", "'S"]),
        ("dbrx", ["ab", "\u0120", "123", "4", "'S"]),
        ("qwen2", ["ab", "\u0120", "1", "2", "3", "4", "'S"]),
        ("tekken", ["ab", "\u0120", "1", "2", "3", "4", "'S"]),
        ("smollm", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("refact", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("deepseek-coder", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("gpt-2", ["ab", "\u01201234", "'", "S"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(described(ALPHABET, ggml={"pre": pre}))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234'S")] == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama3", ["<bos>", "abc"]),
        ("tekken", ["<bos>", "abc"]),
        ("smaug-bpe", ["ab", "c"]),
        ("qwen2", ["ab", "c"]),
    ],
)
def test_words_are_whole_and_texts_begin_as_the_file_says(pre: str, pieces: list[str]) -> None:
    vocabulary = [*ALPHABET, "ab", "bc", "abc", "<bos>"]
    stated = {"pre": pre, "merges": ["a b", "b c", "a bc"], "bos_token_id": 259}
    fields = described(vocabulary, {"<bos>": 3}, ggml=stated)
    assert build_tokenizer(fields).encode("abc").tokens == pieces
    stated["add_bos_token"] = pre == "qwen2"
    fields = described(vocabulary, {"<bos>": 3}, ggml=stated)
    begins = build_tokenizer(fields).encode("abc").tokens[0] == "<bos>"
    assert begins == (pre == "qwen2")


def test_only_qwen_composes_letters_and_accents() -> None:
    ids = {pre: build_tokenizer(described(ALPHABET, ggml={"pre": pre})) for pre in ("qwen2", "llama-bpe")}
    assert ids["qwen2"].encode("e\u0301").ids == ids["qwen2"].encode("\u00e9").ids
    assert ids["llama-bpe"].decode(ids["llama-bpe"].encode("e\u0301").ids) == "e\u0301"


def test_what_fills_the_vocabulary_up_is_no_text() -> None:
    """Whatever kind the converter gave it; the same name at another place is a token like any other."""
    tokens = [*ALPHABET, "[PAD256]", "[PAD257]", "[PAD9]"]
    kinds = dict(zip(tokens[256:], (4, 5, 4), strict=True))
    tokenizer = build_tokenizer(described(tokens, kinds))
    assert tokenizer.encode("[PAD256]").tokens == list("[PAD256]")
    assert tokenizer.encode("[PAD9]").ids == [258]
    assert tokenizer.id_to_token(257) is None


def test_merges_that_do_not_fit_are_refused() -> None:
    for merge in ("a b", "a zz", "a", "a b c"):
        with pytest.raises(ValueError, match=f"the merge '{merge}' does not fit the vocabulary"):
            build_tokenizer(described([*ALPHABET, "abc"], ggml={"merges": [merge]}))


def test_sentencepiece_without_scores_joins_by_id() -> None:
    """As where a converter found no sentencepiece model; spaces join last."""
    tokens = ["<unk>", "\u2581\u2581", "\u2581", "a", "b", "\u2581a", "ab"]
    for scores in ({}, {"scores": [-1000.0] * len(tokens)}):
        fields = described(tokens, {"<unk>": 2}, ggml={"model": "llama"} | scores)
        assert build_tokenizer(fields).encode(" ab").tokens == ["\u2581", "\u2581a", "b"]
    scores = {"scores": [0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0]}
    fields = described(tokens, {"<unk>": 2}, ggml={"model": "llama"} | scores)
    assert build_tokenizer(fields).encode(" ab").tokens == ["\u2581\u2581", "ab"]
    assert build_tokenizer(fields).encode("<unk>").ids == [0]  # spelled out


def test_gemma_takes_the_longest_run_of_spaces_first() -> None:
    runs = [" " * length for length in range(2, 8)]
    tokens = ["<unk>", *runs, "\u2581", "a"]
    stated = {"model": "llama", "scores": [-1000.0] * len(tokens)}
    kinds = {"<unk>": 2} | dict.fromkeys(runs, 4)
    tokenizer = build_tokenizer(described(tokens, kinds, architecture="gemma3", ggml=stated))
    for spaces, lengths in {7: [7], 8: [7, 1], 11: [7, 4], 16: [7, 7, 2]}.items():
        found = tokenizer.encode(f"a{' ' * spaces}a", add_special_tokens=False)
        assert [len(piece) for piece in found.tokens[1:-1]] == lengths
        assert tokenizer.decode(found.ids) == f"a{' ' * spaces}a"
    assert tokenizer.encode("a \u2581\u2581a").tokens == ["a", "\u2581", "\u2581\u2581", "a"]


def test_chat_templates_are_kept_by_name(tmp_path: Path) -> None:
    fields = described(ALPHABET)
    assert "chat_template" not in tokenizer_config(fields, 64)
    fields["tokenizer.chat_template"] = "plain {{ messages }}"
    assert tokenizer_config(fields, 64)["chat_template"] == "plain {{ messages }}"
    fields["tokenizer.chat_templates"] = ["tool_use", "rag"]  # the second is not there
    fields["tokenizer.chat_template.tool_use"] = "with tools {{ messages }}"
    build_tokenizer(fields).save(str(tmp_path / "tokenizer.json"))
    config = json.dumps(tokenizer_config(fields, 64))
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    text = TextProcessor(load_tokenizer(tmp_path))
    assert text.chat_template_for(tools=False) == "plain {{ messages }}"
    assert text.chat_template_for(tools=True) == "with tools {{ messages }}"


def test_what_is_not_covered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write(path, "llama", {}, arch="mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported; supported: llama, qwen2"):
        resolve_model(str(path))
    with pytest.raises(UnsupportedModelError, match=r"'t5' is not supported; supported: gpt2, llama"):
        build_tokenizer({"tokenizer.ggml.model": "t5"})
    with pytest.raises(UnsupportedModelError, match=r"'viking' is not supported; supported: llama-bpe"):
        build_tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"})
    path = tmp_path / "b.gguf"
    write(path, "llama", {}, extra=["blk.0.ffn_gate_exps.weight"])
    with pytest.raises(WeightsError, match=r"unexpected \(1\): blk\.0\.ffn_gate_exps\.weight"):
        make_engine(path)
    for content in (b"", b"GGUF", b"version https://git-lfs.github.com/spec/v1\n" * 4):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"b\.gguf cannot be read as a GGUF"):
            resolve_model(str(path))
    assert not list((tmp_path / "cache").glob(".gguf-*"))
