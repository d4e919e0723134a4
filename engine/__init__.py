"""Medusa decoding, tokens in and tokens out; `from engine import LLM, SamplingParams` to use it from Python.

llm = LLM("smollm2-135m")
(answer,) = llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=64))
print(answer.text)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.grammar import GrammarSpec
    from engine.llm import LLM
    from engine.output import Output
    from engine.sampling_params import SamplingParams
    from engine.types import FinishReason, MedusaParams

# torch reads it at its first allocation: weights in huge pages, where the kernel gives them on request. A
# step reads all of them, and with small pages it is slower, in every process by another share.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# On the CPU a product with a packed weight keeps a plan for each number of rows and shape of weight that it
# has met: 250 KiB in oneDNN's cache, and as much in ideep's on top of it, each for 1024 of them. As rows a
# step vary, a server would grow by half a GiB over hours. oneDNN's 192 are those of 38 numbers of rows with
# the five shapes of a model (a plan made anew takes 0.4 ms); ideep's only save it a look into oneDNN's, for
# all layers after the first. Both libraries read these when they are first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

__all__ = ["LLM", "EngineConfig", "FinishReason", "GrammarSpec", "MedusaParams", "Output", "SamplingParams"]

# Found when first asked for, so that `import engine.types` stays as cheap as it is: LLM imports torch.
_HOME = {
    "LLM": "engine.llm",
    "Output": "engine.output",
    "EngineConfig": "engine.config",
    "FinishReason": "engine.types",
    "GrammarSpec": "engine.grammar",
    "MedusaParams": "engine.types",
    "SamplingParams": "engine.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
