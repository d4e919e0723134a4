"""Tiny models on disk, and the reference they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from engine.config import EngineConfig
from engine.cuda_graphs import RecordedGraph
from engine.engine import Engine
from engine.loader import load
from engine.medusa.buckets import Buckets
from engine.medusa.head_files import read_heads
from engine.medusa.heads import MedusaHeads
from engine.types import Request, SamplingParams, TokenDelta


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random two-layer Llama in float32 whose head_dim is not hidden / heads. No token is EOS."""
    return tiny_model("llama", **overrides)


def tiny_model(model_type: str, **overrides: Any) -> Any:
    """The same of another family. Biases and norms are random too, so that none can be missed."""
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "pad_token_id": None,
        "eos_token_id": None,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(values | overrides))).eval()
    if "swiglu_limit" in overrides:  # transformers 5.17 takes 7 whatever the config says
        for module in model.modules():
            if hasattr(module, "limit"):
                module.limit = overrides["swiglu_limit"]
    if model_type != "llama":
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            buffers = (each for each in model.named_buffers() if each[0].endswith("correction_bias"))
            for name, parameter in (*model.named_parameters(), *buffers):
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Write the model with a word-level tokenizer whose word "t5" is token 5."""
    model.save_pretrained(folder)
    vocab = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def load_heads(
    source: Path, *, hidden_size: int, vocab_size: int, device: torch.device | None = None
) -> MedusaHeads:
    """Heads in float32 from a file or a folder, as the engine loads them."""
    tensors = read_heads(str(source), hidden_size=hidden_size, vocab_size=vocab_size)
    device = device or torch.device("cpu")
    return MedusaHeads.from_tensors(tensors, hidden_size=hidden_size, dtype=torch.float32, device=device)


def save_random_heads(
    file: Path, *, hidden: int, vocab: int, heads: int = 4, layers: int = 1, own_lm_head: bool = True
) -> Path:
    """Random heads in the official format."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(heads):
        for j in range(layers):
            tensors[f"{i}.{j}.linear.weight"] = torch.randn(hidden, hidden, generator=generator) * 0.2
            tensors[f"{i}.{j}.linear.bias"] = torch.randn(hidden, generator=generator) * 0.1
        if own_lm_head:
            tensors[f"{i}.{layers}.weight"] = torch.randn(vocab, hidden, generator=generator)
    save_file(tensors, file)
    return file


MODE: dict[str, bool] = {"captured": False, "ahead": False, "cuda": False}
"""How `make_engine` runs its engines: tests that are to hold for several ways set it in a fixture."""


def make_engine(folder: Path, **settings: Any) -> Engine:
    values = {"max_num_seqs": 8, "block_size": 4, "device": "cpu"}
    if MODE["cuda"]:
        values |= {"device": "cuda", "dtype": "float32", "enforce_eager": not MODE["captured"]}
        if not settings.keys() & {"kv_cache_tokens", "kv_cache_bytes"}:
            values["kv_cache_tokens"] = 16384
    elif MODE["captured"]:
        values["attention"] = "sdpa"  # the CPU's own asks for lengths
    loaded = load(EngineConfig(model=str(folder), **(values | settings)), progress=False)
    if not MODE["captured"]:
        return Engine(loaded, ahead=MODE["ahead"])
    size, slots = loaded.info.tree_size, loaded.info.max_num_seqs
    buckets = Buckets(  # a few take less time
        tuple(sorted({1, min(4, slots), slots})),
        tuple(sorted({1, min(8, size), size})),
        loaded.max_step_tokens,
    )
    if MODE["cuda"]:
        return Engine(loaded, buckets=buckets)
    return Engine(loaded, ahead=MODE["ahead"], graph=RecordedGraph, buckets=buckets)


_continuations: dict[tuple[LlamaForCausalLM, tuple[int, ...]], list[int]] = {}
"""What `greedy_reference` has computed: tests ask for the same continuations again and again."""


@torch.inference_mode()
def greedy_reference(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy continuation; fails if a near tie would make the comparison meaningless."""
    known = _continuations.setdefault((model, tuple(prompt)), [])
    while len(known) < count:
        top = model(torch.tensor([[*prompt, *known]])).logits[0, -1].topk(2)
        assert top.values[0] - top.values[1] > 1e-4, "near tie: choose another prompt"
        known.append(int(top.indices[0]))
    return known[:count]


def run_all(
    engine: Engine, requests: list[Request], *, arrive_every: int = 0
) -> dict[tuple[str, int], list[int]]:
    """Run requests to their end, one joining every `arrive_every` steps; checks the books when idle."""
    outputs: dict[tuple[str, int], list[int]] = {}
    ended: list[TokenDelta] = []
    pending = list(requests)
    step = 0
    while pending or engine.has_work:
        while pending and (not arrive_every or step % arrive_every == 0 or not engine.has_work):
            request = pending.pop(0)
            engine.info.check(request)
            engine.add(request)
            if arrive_every:
                break
        for delta in engine.step():
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                assert delta.error is None, delta.error
                ended.append(delta)
        step += 1
    assert len(ended) == len({(d.request_id, d.index) for d in ended}) == sum(r.sampling.n for r in requests)
    engine.check()
    return outputs


def greedy(request_id: str, prompt: list[int], count: int, **sampling: Any) -> Request:
    return Request(request_id, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=count, **sampling))
