"""Captured steps of a model with attention sinks give the CPU's tokens, and with other sinks others."""

from __future__ import annotations

import sys

import torch

from engine.attention import triton_tuning
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import load
from engine.medusa.buckets import Buckets
from engine.model.families import FAMILIES
from engine.types import Request, SamplingParams

# To be quick; passes over prompts are not captured.
triton_tuning.tuned_tiles, CapturedRunner._most_prompt_tokens = lambda *_, **__: {}, lambda _: 0
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 512, "max_model_len": 64, "tree": 4}
settings |= {"model": sys.argv[1], "lookup": "on"}
llama = FAMILIES["LlamaForCausalLM"]
FAMILIES["LlamaForCausalLM"] = lambda config: {**llama(config), "sinks": True, "windows": (3, None)}


def made(device, buckets=None):
    return Engine(load(EngineConfig(device=device, **settings), progress=False), buckets=buckets)


def run(engine):
    tokens = {}
    for i in range(2):
        greedy = SamplingParams(temperature=0.0, max_tokens=7)
        engine.add(Request(f"{i}", (1 + i, 2, 1 + i, 2), greedy))
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.check()
    return tokens


def sinks(engine):
    return [layer.sinks for layer in engine._runner._decoder.layers]


wanted, engine = run(made("cpu")), made("cuda", Buckets((1, 2), (1, 4), 8))
assert isinstance(engine._runner, TritonRunner)
found = run(engine)
assert found == wanted, (found, wanted)
with torch.inference_mode():
    for each in sinks(engine):
        each.fill_(float("-inf"))  # where captured steps read them
print(run(engine) == wanted)
