"""Heads for a model with an adapter: each tool works on the merged model, and tells it from the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.errors import AdapterError, ConfigError
from engine.llm import LLM
from tests.engine.model.adapters import edit_config, merged, save_adapter
from tests.support import greedy, save_model, save_random_heads, tiny_llama
from tests.training.support import random_rows, train_config, write_rows
from tests.training.test_distill import config, items, options
from training.backbone import make_backbone, open_base, read_lm_head
from training.cli import app
from training.distill import hash_weights, run
from training.export import export
from training.measure import measure
from training.setup import model_identity, prepare, read_rows

VOCAB = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder, an adapter for it, and a folder of both merged by PEFT."""
    where = tmp_path_factory.mktemp("adapted")
    base = tiny_llama(vocab_size=VOCAB, max_position_embeddings=128)
    adapter = save_adapter(base, where / "adapter", target_modules=["q_proj", "up_proj", "lm_head"])
    whole = merged(base, (adapter, 1.0))
    folder, other = save_model(base, where / "base"), save_model(whole, where / "whole")
    return {"folder": str(folder), "lora": str(adapter), "whole": str(other), "lm_head": whole.lm_head.weight}


def test_the_backbone_and_its_lm_head_are_the_merged_models(model: dict[str, Any]) -> None:
    sequences = [row.prompt.tolist() for row in random_rows(2, VOCAB, prompt=11)]
    settings = {"device": "cpu", "dtype": "float32", "bits": 16, "pack_tokens": 64, "longest": 30}
    plain, ours, theirs = (
        make_backbone(name, lora=lora, **settings).hidden(sequences)
        for name, lora in ((model["folder"], None), (model["folder"], model["lora"]), (model["whole"], None))
    )
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)
    rows = torch.tensor([3, 1])
    assert torch.equal(read_lm_head(model["folder"], rows, lora=model["lora"]), model["lm_head"][rows])
    with pytest.raises(AdapterError, match=r"adapter folder \./nowhere"):
        read_lm_head(model["folder"], lora="./nowhere")


def test_a_backbone_in_fewer_bits_takes_none(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match="in 8 or 4 bits takes no lora"):
        make_backbone(
            model["folder"], lora=model["lora"], device="auto", dtype="auto", bits=4, pack_tokens=8, longest=8
        )


def test_what_is_computed_with_it_is_kept_apart(model: dict[str, Any], tmp_path: Path) -> None:
    def identities(lora: str | None) -> tuple[str, str]:
        checkpoint = open_base(model["folder"], lora)[1]
        return model_identity(checkpoint), hash_weights(checkpoint.folder, checkpoint.adapters)

    settings = [None, model["lora"], f"{model['lora']}@0.5"]
    for found in zip(*map(identities, settings), strict=True):
        assert len(set(found)) == 3
    again = tmp_path / "again"
    again.mkdir()
    for file in Path(model["lora"]).iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    assert identities(str(again)) == identities(model["lora"])
    assert identities(str(edit_config(again, lora_alpha=1))) != identities(model["lora"])


def test_heads_are_trained_and_calibrated_as_for_the_merged_model(
    model: dict[str, Any], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data", random_rows(12, VOCAB), VOCAB)
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=32, vocab=VOCAB, own_lm_head=False)
    found = []
    for name, lora in ((model["folder"], model["lora"]), (model["whole"], None)):
        output = tmp_path / f"heads{len(found)}"
        config = train_config(name, data, output, lora=lora, epochs=1)
        setup = prepare(config, *read_rows(config))
        settings = {"cache_dir": output / "cache", "share": 0.05, "size": 8, "bigram": False}
        result = measure(str(heads), (data,), output, model=name, lora=lora, **settings)
        lengths = {key: value for key, value in result.items() if not isinstance(value, str)}
        found.append((setup.lm_head, torch.from_numpy(np.array(setup.held.hidden)), lengths))
    ours, theirs = found
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_the_commands_take_it(model: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "t5 t6"}))
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=32, vocab=VOCAB, own_lm_head=False)
    export(str(heads), tmp_path / "vllm", model=model["folder"], lora=model["lora"], format="vllm")
    assert torch.equal(load_file(tmp_path / "vllm" / "model.safetensors")["lm_head.weight"], model["lm_head"])
    runner = CliRunner()
    for command in (
        ["distill", model["folder"], "--prompts", str(prompts), "--device", "cpu", "-o", str(tmp_path / "d")],
        ["train", model["folder"], "--data", str(tmp_path), "-o", str(tmp_path / "t")],
        ["calibrate", model["folder"], "--data", str(tmp_path), "--heads", str(heads)],
        ["export", model["folder"], "--heads", str(heads), "-o", str(tmp_path / "e")],
    ):
        result = runner.invoke(app, [*command, "--lora", f"{model['lora']}@0"])
        assert (result.exit_code, "--lora: what follows @ is a factor" in result.output) == (2, True), command


def test_distil_writes_the_merged_models_answers(chat_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(eos_token_id=2, vocab_size=24), tmp_path / "adapter")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"t{i} t7"}) for i in range(5, 9)))
    manifest = run(config(chat_model, lora=str(adapter)), options(prompts, temperature="0"), tmp_path / "d")
    assert manifest["lora"] == str(adapter)
    assert manifest["weights_sha256"] != hash_weights(chat_model)
    llm = LLM(
        EngineConfig(model=str(chat_model), lora=str(adapter), device="cpu", tree="off", max_model_len=96)
    )
    rows = list(items(tmp_path / "d").values())
    outputs = llm.generate([greedy(str(i), row["prompt_ids"], 24) for i, row in enumerate(rows)])
    assert [row["answer_ids"] for row in rows] == [output.token_ids for output in outputs]
    with pytest.raises(ConfigError, match="was distilled with weights_sha256"):
        run(config(chat_model), options(prompts, temperature="0"), tmp_path / "d")
