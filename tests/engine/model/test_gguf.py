"""GGUF files written here as llama.cpp's converter writes them, against the models they came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from engine.model.families import RopeConfig
from engine.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from engine.model.weights import Checkpoint, load_generation_defaults, load_tokenizer, resolve_model
from engine.text import TextProcessor
from tests.engine.model.gguf_cases import CASES
from tests.engine.model.gguf_files import config_of, published, write
from tests.support import greedy, greedy_reference, make_engine, run_all


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES)
def test_a_gguf_computes_what_its_numbers_stand_for(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    model = write(path, family, overrides)
    checkpoint = Checkpoint(resolve_model(str(path)))
    state = published(model)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert checkpoint.names == state.keys()
    for name, wanted in state.items():
        assert checkpoint.shape(name) == tuple(wanted.shape)
        torch.testing.assert_close(checkpoint.get(name), wanted, atol=1e-6, rtol=1e-6)
    prompt = [3, 141, 59, 26, 53, 58, 97]
    outputs = run_all(make_engine(path), [greedy("r", prompt, 10, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, prompt, 10)


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES)
def test_a_gguf_says_what_the_models_config_does(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    """What greedy tokens would not show, too: how many positions there are, by what logits are divided."""
    path = tmp_path / "tiny.gguf"
    model = write(path, family, overrides)
    found, wanted = ModelConfig.from_folder(resolve_model(str(path))), ModelConfig.from_hf(config_of(model))
    for field in dataclasses.fields(ModelConfig):
        value, expected = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(expected, RopeConfig):
            torch.testing.assert_close(value.inv_freq, expected.inv_freq)
            assert value.scale == pytest.approx(expected.scale)
        elif field.name != "dtype":
            assert value == expected, field.name


def test_transformers_reads_the_same_from_a_phi3_gguf(tmp_path: Path) -> None:
    """Its own reader, which knows nothing of windows and factors."""
    path = tmp_path / "tiny.gguf"
    write(path, "phi3", {"sliding_window": None, "original_max_position_embeddings": 512})
    config = load_gguf_checkpoint(path)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, pad_token_id=None)).eval()
    model.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"])
    prompt = [3, 141, 59, 26, 53, 58, 97]
    outputs = run_all(make_engine(path), [greedy("r", prompt, 10, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, prompt, 10)


def described_config(path: Path, family: str, overrides: dict[str, Any], **stated: Any) -> ModelConfig:
    write(path, family, overrides, stated={key.replace("__", "."): value for key, value in stated.items()})
    return ModelConfig.from_folder(resolve_model(str(path)))


def test_what_files_leave_to_the_reader(tmp_path: Path) -> None:
    """As converters wrote them at another time, or for a kin of the model."""
    path = tmp_path / "tiny.gguf"
    of_4k = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    assert described_config(path, "phi3", of_4k, attention__sliding_window=None).windows == (2047, 2047)
    of_8k = {"max_position_embeddings": 8192, "original_max_position_embeddings": 8192}
    assert described_config(path, "phi3", of_8k, attention__sliding_window=None).windows == (None, None)
    family, longrope = CASES["phi4-mini"]
    wanted = described_config(path, family, longrope).rope.scale
    unstated = described_config(path, family, longrope, rope__scaling__attn_factor=None)
    assert unstated.rope.scale == pytest.approx(wanted)
    _, olmo3 = CASES["olmo3"]
    olmo3 = olmo3 | {"num_hidden_layers": 5, "layer_types": None}
    for pattern, windows in ((None, (5, 5, 5, None, 5)), (2, (5, None, 5, None, 5))):
        config = described_config(path, "olmo3", olmo3, attention__sliding_window_pattern=pattern)
        assert config.architecture == "Olmo3ForCausalLM"
        assert config.windows == windows
    config = described_config(path, "olmo3", olmo3, rope__freq_base_swa=None)
    assert config.local_rope is not None
    assert float(config.local_rope.inv_freq[1]) == pytest.approx(10000.0 ** (-1 / 8))
    _, exaone4 = CASES["exaone4-windows"]
    exaone4 = exaone4 | {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    windowed = described_config(path, "exaone4", exaone4, attention__sliding_window_pattern=None)
    assert windowed.windows == (5, 5, 5, None, 5)
    assert windowed.local_layers == (False, False, False, True, False)
    whole = described_config(path, "glm4", {}, rope__dimension_count=16)
    assert len(whole.rope.inv_freq) == 8
    granite = described_config(
        path, "granite", {}, attention__head_count_kv=[2, 2], attention__scale=None, residual_scale=None
    )  # the list is Granite 4's
    assert (granite.num_kv_heads, granite.attention_scale, granite.residual_scale) == (2, 0.25, 1.0)


@pytest.mark.parametrize(
    ("family", "stated", "message"),
    [
        ("granite", {"rope__scaling__finetuned": False}, "Granite without rotation is not supported"),
        ("granite", {"attention__head_count_kv": [2, 4]}, "layers differ in K/V heads is not supported"),
        ("granite", {"logit_scale": None}, "no 'logit_scale'"),
        ("llama", {"rope__dimension_count": 8}, "a part of each head is rotated is not supported"),
        ("llama", {"rope__scaling__type": "su", "rope__scaling__factor": 2.0}, "RoPE scaling 'su' is not"),
        ("olmo3", {"attention__sliding_window_pattern": [True]}, "pattern names 1 layers of 2"),
        ("glm4", {"rope__dimension_sections": [2, 3, 3, 0]}, "a GLM that sees images is not supported"),
        ("mistral", {"attention__temperature_scale": 0.1}, "Ministral 3 without YaRN is not supported"),
        (
            "llama",
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 2.0,
                "rope__scaling__yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor other than 1 is not supported",
        ),
    ],
)
def test_metadata_that_is_not_covered_is_refused(
    tmp_path: Path, family: str, stated: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        described_config(tmp_path / "tiny.gguf", family, {}, **stated)


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
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>", "<|observation|>"])
    assert load_generation_defaults(folder).eos_token_ids == (0, *ends)  # "<eos>" is an ordinary piece


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
        ("gpt-4o", ["ab", "\u0120", "123", "4", "'S"]),
        ("smollm", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("refact", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("deepseek-coder", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("deepseek-llm", ["ab", "\u0120", "1", "2", "3", "4", "'", "S"]),
        ("qwen35", ["ab", "\u0120", "1", "2", "3", "4", "'S"]),
        ("seed-coder", ["ab", "\u0120", "1", "2", "3", "4", "'S"]),
        ("gpt-2", ["ab", "\u01201234", "'", "S"]),
        ("olmo", ["ab", "\u01201234", "'", "S"]),
        ("exaone4", ["ab", "\u01201234", "'", "S"]),
        ("glm4", ["ab", "\u0120", "123", "4", "'S"]),
        ("hunyuan-dense", ["ab", "\u0120", "123", "4", "'S"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(described(ALPHABET, ggml={"pre": pre}))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234'S")] == pieces


def test_where_kin_cut_otherwise() -> None:
    """Qwen3.5 leaves marks with their letters, Seed's lines end apart, DeepSeek's words are cased letters,
    Hunyuan's of one script."""
    for pre, text, pieces in [
        ("qwen2", "q\u0303a", ["q", "\u00cc\u0125a"]),
        ("qwen35", "q\u0303a", ["q\u00cc\u0125a"]),
        ("qwen2", "a!\n", ["a", "!\u010a"]),
        ("seed-coder", "a!\n", ["a", "!", "\u010a"]),
        ("glm4", "a\u4e00b", ["a\u00e4\u00b8\u0122b"]),
        ("hunyuan-dense", "a\u4e00b", ["a", "\u00e4\u00b8\u0122", "b"]),
        ("deepseek-coder", "a \u05d0b", ["a", "\u0120\u00d7\u0132b"]),
        ("deepseek-llm", "a \u05d0\u00e9", ["a", "\u0120\u00d7\u0132", "\u00c3\u00a9"]),
        ("deepseek-llm", "\u05d0\U00010400", ["\u00d7\u0132", "\u00f0\u0132\u0132\u0122"]),
        ("deepseek-llm", "\u05d0  ", ["\u00d7\u0132", "\u0120\u0120"]),
        ("deepseek-llm", "\u05d0 \uff0b", ["\u00d7\u0132", "\u0120\u00ef\u00bc\u012d"]),
    ]:
        tokenizer = build_tokenizer(described(ALPHABET, ggml={"pre": pre}))
        assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces, pre


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama3", ["<bos>", "abc"]),
        ("tekken", ["<bos>", "abc"]),
        ("glm4", ["abc"]),
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


def test_runs_of_spaces_that_were_added_are_tokens() -> None:
    """As in OLMoE; of a sentencepiece model they are pieces, which join as others do."""
    tokens = [*ALPHABET, "  ", "   "]
    tokenizer = build_tokenizer(described(tokens, {"  ": 4, "   ": 4}, ggml={"pre": "olmo"}))
    ids = tokenizer.encode("a      b a").ids
    assert [tokens[index] for index in ids] == ["a", "   ", "   ", "b", "\u0120", "a"]
    assert tokenizer.decode(ids) == "a      b a"


def test_only_qwen_and_olmo_compose_letters_and_accents() -> None:
    names = ("qwen2", "olmo", "llama-bpe")
    ids = {pre: build_tokenizer(described(ALPHABET, ggml={"pre": pre})) for pre in names}
    for pre in ("qwen2", "olmo"):
        assert ids[pre].encode("e\u0301").ids == ids[pre].encode("\u00e9").ids
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


def test_phi3_takes_spaces_behind_its_tokens_along() -> None:
    """As its template has them, `<|user|>` and a newline; not behind what begins and ends texts."""
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>", "\u2581", "a", "\n"]
    kinds = {"<unk>": 3, "<s>": 3, "</s>": 4, "<|endoftext|>": 3, "<|user|>": 3, "<|end|>": 3}
    stated = {"model": "llama", "scores": [float(-i) for i in range(len(tokens))]}
    text = "<|user|>\na<|end|> \n</s> a<s>\n<|endoftext|>\na"
    found = {}
    for architecture in ("phi3", "llama"):
        tokenizer = build_tokenizer(described(tokens, kinds, architecture=architecture, ggml=stated))
        found[architecture] = [tokens[index].replace("\u2581", "_") for index in tokenizer.encode(text).ids]
    assert "".join(found["phi3"]) == "<|user|>_a<|end|></s>_a<s>_\n<|endoftext|>_\na"
    assert "".join(found["llama"]) == "<|user|>_\na<|end|>__\n</s>__a<s>_\n<|endoftext|>_\na"


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
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported; supported: ") as refusal:
        resolve_model(str(path))
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    supported = str(refusal.value).rpartition(": ")[2].split(", ")
    assert len(supported) == 23
    assert all(f"`{architecture}`" in readme for architecture in supported)
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
