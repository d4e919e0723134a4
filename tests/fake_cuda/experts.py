"""Captured steps of a mixture of experts give the CPU's tokens; says of how many rows others
were, and what its weights are."""

from __future__ import annotations

import sys

from engine.attention import triton_tuning
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import load
from engine.medusa.buckets import Buckets
from engine.model import experts_triton
from engine.model.experts import Experts
from engine.types import Request, SamplingParams

# To be quick; passes over prompts are not captured.
triton_tuning.tuned_tiles, CapturedRunner._most_prompt_tokens = lambda *_, **__: {}, lambda _: 0
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 512, "max_model_len": 64, "tree": 4}
settings |= {"model": sys.argv[1], "lookup": "on"}
shapes = []
shape_for = experts_triton.shape_for
experts_triton.shape_for = lambda experts, rows: shapes.append(rows) or shape_for(experts, rows)


def run(device, buckets=None):
    engine = Engine(load(EngineConfig(device=device, **settings), progress=False), buckets=buckets)
    del shapes[:]
    for i in range(2):
        greedy = SamplingParams(temperature=0.0, max_tokens=5 + i)
        engine.add(Request(f"{i}", (1 + i, 2, 1 + i, 2), greedy))
    tokens = {}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.check()
    return engine, tokens


_, wanted = run("cpu")
assert not shapes
forward, Experts.forward = Experts.forward, None
engine, found = run("cuda", Buckets((1, 2), (1, 4), 8))
Experts.forward = forward
assert isinstance(engine._runner, TritonRunner)
assert found == wanted, (found, wanted)
print(*sorted(set(shapes)), engine._runner._decoder.layers[-1].experts.gate_up.dtype)
