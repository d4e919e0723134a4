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
    from engine.llm import LLM, Output
    from engine.types import FinishReason, MedusaParams, SamplingParams

# torch reads it at its first allocation: weights in huge pages, where the kernel gives them on request. A
# step reads all of them, and with small pages it is slower, in every process by another share.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["LLM", "EngineConfig", "FinishReason", "MedusaParams", "Output", "SamplingParams"]

# Found when first asked for, so that `import engine.types` stays as cheap as it is: LLM imports torch.
_HOME = {
    "LLM": "engine.llm",
    "Output": "engine.llm",
    "EngineConfig": "engine.config",
    "FinishReason": "engine.types",
    "MedusaParams": "engine.types",
    "SamplingParams": "engine.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
