"""Random models under published tokenizers, served: with vocabularies padded or not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from engine import LLM, SamplingParams, warmup
from engine.config import EngineConfig
from engine.grammar import GrammarSpec
from engine.loop import EngineLoop
from engine.text import TextProcessor
from server.cli import app as command_line
from tests.published.sources import tokenizer_dir
from tests.server.conftest import MODEL, RunningServer
from tests.support import save_random_heads, tiny_model

torch.set_num_threads(1)
SIZES: dict[str, Any] = {"max_num_seqs": 4, "kv_cache_tokens": 4096, "max_model_len": 1024}
KINDS = {
    "qwen3": ("qwen3", 151936, [151645, 151643]),
    "gemma3": ("gemma3_text", 262208, [1, 106]),
    "yi": ("llama", 64000, [2, 7]),
}
"""Of each tokenizer the family, the model's vocabulary, and what ends an answer.

Qwen's and Gemma's vocabularies go on 267 and 63 ids behind the tokenizer's.
"""
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

SCHEMA = {
    "type": "object",
    "properties": {
        "größe": {"enum": ["klein", "日本", "<b>"]},
        "n": {"type": "integer", "minimum": -9, "maximum": 99},
        "text": {"type": "string", "maxLength": 9},
    },
    "required": ["größe", "n", "text"],
    "additionalProperties": False,
}
EXACT = json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}, ensure_ascii=False)


@dataclass
class Served:
    """A model's folder, two ways to run it, and a server."""

    name: str
    folder: Path
    off: LLM
    tree: LLM
    server: RunningServer

    @property
    def text(self) -> TextProcessor:
        return self.off.text


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, size, ends = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(family, vocab_size=size, max_position_embeddings=1024).save_pretrained(folder)
    for file in tokenizer_dir(request.param).iterdir():
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    heads = save_random_heads(folder / "heads.safetensors", hidden=32, vocab=size, heads=2, own_lm_head=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_WARM_S", 0.02), ("_ROUNDS", 1), ("_IN_A_ROW", 1)):
            patch.setattr(warmup, name, value)
        off = LLM(str(folder), tree="off", lookup="off", **SIZES)
        tree = LLM(str(folder), tree=16, heads=str(heads), **SIZES)
        config = EngineConfig(model=str(folder), tree=8, chat_template=TEMPLATE, **SIZES)
        engine: Any = EngineLoop.load(config, progress=False)
    defaults: Any = engine.generation_defaults
    with RunningServer(engine, defaults, {"model": str(folder)}, engine.text) as server:
        yield Served(request.param, folder, off, tree, server)


def told(text: str) -> str:
    """A broken character may be told by one replacement or by one for each of its bytes."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_a_tree_changes_no_text(served: Served) -> None:
    prompts = ["Hello <|im_end|> <end_of_turn>", "日本語 😀 the cat sat on the mat, the cat sat on the"]
    for sampling in (
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1, top_k=99, seed=3, max_tokens=40, skip_special_tokens=False),
    ):
        for plain, drafted in zip(
            served.off.generate(prompts, sampling, progress=False),
            served.tree.generate(prompts, sampling, progress=False),
            strict=True,
        ):
            assert plain.token_ids == drafted.token_ids
            assert plain.text == drafted.text
            shown = not sampling.skip_special_tokens
            read = (served.text.token_text(token, special_is_text=shown).data for token in plain.token_ids)
            assert told(plain.text) == told(b"".join(data or b"" for data in read).decode("utf-8", "replace"))


def test_ids_behind_the_tokenizers_are_nothing(served: Served) -> None:
    size = served.off.info.vocab_size
    if size == served.text.vocab_size:
        pytest.skip("this one is not padded")
    last = size - 1
    sampling = SamplingParams(temperature=0, max_tokens=6, logit_bias={last: 100.0}, logprobs=2)
    [output] = served.tree.generate(["Hi"], sampling, progress=False)
    assert (output.token_ids, output.text) == ([last] * 6, "")
    [output] = served.tree.generate([[5, last, 6]], SamplingParams(max_tokens=9, seed=1), progress=False)
    assert len(output.token_ids) == 9
    # None of them follows a grammar, whatever speaks for it.
    sampling = SamplingParams(seed=1, max_tokens=200, logit_bias={last: 100.0})
    grammar = GrammarSpec("json_schema", EXACT)
    [output] = served.tree.generate(["Hi"], sampling, progress=False, grammar=grammar)
    jsonschema.validate(json.loads(output.text), SCHEMA)
    fields = {"prompt": "Hi", "logprobs": 2, "max_tokens": 3, "logit_bias": {last: 100}}
    [choice] = served.server.http.post("/v1/completions", json={"model": MODEL, **fields}).json()["choices"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [""] * 3
    answer = served.server.http.post("/detokenize", json={"model": MODEL, "tokens": [last]})
    assert answer.json() == {"prompt": ""}


@pytest.mark.parametrize("seed", range(2))
def test_a_random_models_answer_follows_its_grammar(served: Served, seed: int) -> None:
    sampling, grammar = SamplingParams(seed=seed, max_tokens=300), GrammarSpec("json_schema", EXACT)
    [plain] = served.off.generate(["Hi"], sampling, progress=False, grammar=grammar)
    [drafted] = served.tree.generate(["Hi"], sampling, progress=False, grammar=grammar)
    jsonschema.validate(json.loads(plain.text), SCHEMA)
    assert drafted.text == plain.text
    assert plain.finish_reason == drafted.finish_reason == "stop"


def test_streamed_and_whole_with_logprobs(served: Served) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 4, "max_tokens": 40, "seed": 5}
    fields |= {"messages": [{"role": "user", "content": "日本 😀"}], "skip_special_tokens": False}
    whole = served.server.chat(**fields).json()
    choice = whole["choices"][0]
    entries = choice["logprobs"]["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert told(data.decode("utf-8", "replace")) == told(choice["message"]["content"])
    assert whole["usage"]["completion_tokens"] == len(entries)
    for entry in entries:
        for one in (entry, *entry["top_logprobs"]):
            assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"]
    events = served.server.events(**fields, stream_options={"include_usage": True})
    chunks = [event for event in events if event != "[DONE]"]
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(d["delta"].get("content") or "" for d in deltas) == choice["message"]["content"]
    found = [entry for d in deltas if d["logprobs"] for entry in d["logprobs"]["content"]]
    assert [entry["token"] for entry in found] == [entry["token"] for entry in entries]
    assert chunks[-1]["usage"]["completion_tokens"] == len(entries)


def test_echo_tells_where_tokens_begin(served: Served) -> None:
    prompt = "Hello 日本 <b>wörld</b>  x\n"
    fields = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 20, "prompt_logprobs": 1}
    answer = served.server.http.post("/v1/completions", json={"model": MODEL, **fields}).json()
    [choice] = answer["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    assert text.startswith(prompt)
    count = answer["usage"]["prompt_tokens"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == answer["usage"]["total_tokens"]
    names = set(served.text.tokenizer.all_special_tokens)
    for token, start in zip(logprobs["tokens"][:count], logprobs["text_offset"], strict=False):
        assert token in names or token.startswith("bytes:") or text.startswith(token, start)
    assert len(choice["prompt_logprobs"]) == count
    told_ids = served.server.http.post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()
    assert told_ids["count"] == count
    back = served.server.http.post("/detokenize", json={"model": MODEL, "tokens": told_ids["tokens"]}).json()
    assert back["prompt"].endswith(prompt)


def test_words_and_tokens_that_a_request_speaks_of(served: Served) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 30, "temperature": 0}

    def ask(**more: Any) -> Any:
        answer = served.server.http.post("/v1/completions", json=fields | more)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    paris = served.text.encode(" Paris", add_special_tokens=False)
    biased = {"logit_bias": {paris[0]: 100}, "max_tokens": 1}
    assert ask(**biased)["text"] == served.text.decode(paris[:1])
    assert " Paris" not in ask(**biased, bad_words=["Paris"])["text"]
    stopped = ask(**biased, stop_token_ids=[paris[0]])
    assert (stopped["text"], stopped["stop_reason"]) == ("", paris[0])
    size = served.off.info.vocab_size
    refused = served.server.http.post("/v1/completions", json=fields | {"logit_bias": {size: 1}})
    assert refused.status_code == 400
    assert f"it has {size}" in refused.text


def test_info_tells_the_models_vocabulary(served: Served) -> None:
    shown = CliRunner().invoke(command_line, ["info", str(served.folder)])
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"vocabulary +{served.off.info.vocab_size}\n", shown.output)
