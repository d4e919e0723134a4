"""What is expected of each published chat template."""

from __future__ import annotations

from typing import NamedTuple

from engine.tool_prompt import GLM_MARKS

__all__ = [
    "EXPECTED",
    "INDENTED",
    "MESSAGES",
    "ONE_CALL",
    "ONLY_WITH_TOOLS",
    "OTHERS",
    "SERVED",
    "TOKENS",
    "UNLIKE_ITSELF",
]


class Found(NamedTuple):
    """What is expected of a template.

    Args:
        tokenizer: of `TOKENS`.
        calls: the format of its calls; None where they are in one that is not known, and stay content.
        thoughts: the format of its thoughts.
    """

    tokenizer: str
    calls: str | None
    thoughts: str | None = None


_MISTRAL = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]")
TOKENS = {
    "llama": ("llama3.2", ()),
    "qwen": ("qwen3", ()),
    "mistral": ("mistral-nemo", _MISTRAL),
    "ministral": ("mistral-nemo", (*_MISTRAL, "[THINK]", "[/THINK]")),
    "gemma": ("gemma3", ()),
    "deepseek": ("deepseek-v3", ()),
    "gpt-oss": ("gpt-oss", ()),
    # There is none of theirs.
    "glm": ("llama3.2", ("<|user|>", "<|observation|>", "<tool_call>", "</tool_call>", *GLM_MARKS)),
    "other": (
        "llama3.2",
        ("<|im_start|>", "<|im_end|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
    ),
}
"""By name a published tokenizer, and special tokens that such models have beyond it."""

SERVED = {
    "Bielik-11B-v3.0-Instruct": Found("llama", "hermes", "think"),
    "ByteDance-Seed-OSS": Found("other", "seed_oss", "seed_oss"),
    "GLM-4.6": Found("glm", "glm45", "think"),
    "HuggingFaceTB-SmolLM3-3B": Found("other", "hermes", "think"),
    "MiMo-VL": Found("qwen", "hermes", "think"),
    "Mistral-Small-3.2-24B-Instruct-2506": Found("mistral", "mistral"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": Found("llama", "hermes"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Found("llama", "hermes"),
    "Qwen-QwQ-32B": Found("qwen", "hermes", "think"),
    "Qwen-Qwen2.5-7B-Instruct": Found("qwen", "hermes", "think"),
    "Qwen-Qwen3-0.6B": Found("qwen", "hermes", "think"),
    "Apriel-1.6-15b-Thinker-fixed": Found("mistral", "apriel"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": Found("llama", "hermes", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": Found("qwen", "hermes", "think"),
    "ibm-granite-granite-3.3-2B-Instruct": Found("other", "granite", "think"),
    "ibm-granite-granite-4.0": Found("other", "hermes"),
    "ibm-granite-granite-4.1": Found("other", "hermes"),
    "meetkai-functionary-medium-v3.1": Found("llama", None),
    "meetkai-functionary-medium-v3.2": Found("llama", None),
    "meta-llama-Llama-3.1-8B-Instruct": Found("llama", "llama3_json"),
    "meta-llama-Llama-3.2-3B-Instruct": Found("llama", "llama3_json"),
    "meta-llama-Llama-3.3-70B-Instruct": Found("llama", "llama3_json"),
    "microsoft-Phi-3.5-mini-instruct": Found("other", "hermes"),
    "mistralai-Ministral-3-14B-Reasoning-2512": Found("ministral", "mistral", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": Found("mistral", "mistral"),
    "openai-gpt-oss-120b": Found("gpt-oss", "harmony", "harmony"),
    "openbmb-MiniCPM5-1B": Found("llama", None, "think"),
    "template_chatml": Found("other", "hermes"),
    "tool_chat_template_gemma3_pythonic": Found("gemma", "pythonic"),
    "tool_chat_template_granite": Found("other", "granite"),
    "tool_chat_template_hermes": Found("llama", "hermes"),
    "tool_chat_template_llama3.1_json": Found("llama", "llama3_json"),
    "tool_chat_template_llama3.2_json": Found("llama", "llama3_json"),
    "tool_chat_template_llama3.2_pythonic": Found("llama", "pythonic"),
    "tool_chat_template_mistral": Found("mistral", "mistral"),
    "tool_chat_template_mistral3": Found("mistral", "mistral"),
    "tool_chat_template_mistral_parallel": Found("mistral", "mistral"),
    "tool_chat_template_toolace": Found("llama", "pythonic"),
    "tool_chat_template_xlam_llama": Found("llama", "xlam"),
    "tool_chat_template_xlam_qwen": Found("qwen", "xlam", "think"),
    "tool_chat_template_phi4_mini": Found("other", "phi4_mini_json"),
    "unsloth-Apriel-1.5": Found("mistral", "apriel"),
    "unsloth-mistral-Devstral-Small-2507": Found("mistral", "mistral"),
}
"""Of models whose architecture is served, and of finetunes of these."""

OTHERS = {
    "Apertus-8B-Instruct": Found("other", None),
    "Cohere2MoE": Found("other", None),
    "CohereForAI-c4ai-command-r-plus-tool_use": Found("other", None),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": Found("other", None),
    "GLM-4.7-Flash": Found("glm", "glm47", "think"),
    "GigaChat3-10B-A1.8B": Found("other", None),
    "GigaChat3.1-10B-A1.8B": Found("other", None),
    "Kimi-K2-Instruct": Found("other", None),
    "Kimi-K2-Thinking": Found("other", None, "think"),
    "Kimi-K3": Found("other", None),
    "LFM2-8B-A1B": Found("other", "hermes"),
    "LFM2.5-8B-A1B": Found("other", None, "think"),
    "LFM2.5-Instruct": Found("other", "hermes", "think"),
    "MiniMax-M1": Found("other", "apriel"),
    "MiniMax-M2": Found("other", None, "think"),
    "MiniMax-M3": Found("other", None),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Found("other", "qwen3_coder", "think"),
    "NVIDIA-Nemotron-Nano-v2": Found("other", "nemotron", "think"),
    "Qwen3-Coder": Found("qwen", "qwen3_coder", "think"),
    "Qwen3.5-4B": Found("qwen", "qwen3_coder", "think"),
    "Reka-Edge": Found("other", "hermes", "think"),
    "Spark2.5": Found("other", "glm47", "think"),
    "StepFun3.5-Flash": Found("other", "qwen3_coder", "think"),
    "deepseek-ai-DeepSeek-V3.1": Found("deepseek", "hermes", "think"),
    "deepseek-ai-DeepSeek-V3.2": Found("deepseek", None, "think"),
    "deepseek-ai-DeepSeek-V4-Flash-0731": Found("deepseek", None, "think"),
    "deepseek-ai-DeepSeek-V4": Found("deepseek", None, "think"),
    "fireworks-ai-llama-3-firefunction-v2": Found("other", None),
    "google-gemma-2-2b-it": Found("gemma", None),
    "google-gemma-4-31B-it-interleaved": Found("gemma", None),
    "google-gemma-4-31B-it": Found("gemma", None),
    "inclusionai-ling-3.0-flash": Found("other", "glm45", "think"),
    "llama-cpp-deepseek-r1": Found("other", "deepseek_v3", "think"),
    "llama-cpp-rwkv-world": Found("other", "hermes", "think"),
    "moonshotai-Kimi-K2": Found("other", None),
    "muse-glimmer": Found("other", None),
    "poolside-Laguna-S-2.1": Found("glm", "glm47", "think"),
    "poolside-Laguna-XS-2.1": Found("other", "glm45", "think"),
    "poolside-Laguna-XS.2": Found("other", "glm45", "think"),
    "tencent-Hy3": Found("other", None),
    "upstage-Solar-Open-100B": Found("other", None),
    "template_alpaca": Found("other", "hermes"),
    "template_chatglm": Found("other", "hermes"),
    "template_chatglm2": Found("other", "hermes"),
    "template_falcon": Found("other", "hermes"),
    "template_falcon_180b": Found("other", "hermes"),
    "template_inkbot": Found("other", "hermes"),
    "template_teleflm": Found("other", "hermes"),
    "tool_chat_template_apertus": Found("other", None),
    "tool_chat_template_deepseekr1": Found("deepseek", "deepseek_v3", "think"),
    "tool_chat_template_deepseekv3": Found("deepseek", "deepseek_v3"),
    "tool_chat_template_deepseekv31": Found("deepseek", "deepseek_v31", "think"),
    "tool_chat_template_functiongemma": Found("gemma", None),
    "tool_chat_template_gemma4": Found("gemma", None),
    "tool_chat_template_glm4": Found("other", "glm45"),
    "tool_chat_template_granite_20b_fc": Found("other", None),
    "tool_chat_template_hunyuan_a13b": Found("other", "apriel", "think"),
    "tool_chat_template_internlm2_tool": Found("other", None),
    "tool_chat_template_llama4_json": Found("other", "llama3_json"),
    "tool_chat_template_llama4_pythonic": Found("other", "llama4_pythonic"),
    "tool_chat_template_muse_glimmer": Found("other", None),
    "tool_chat_template_qwen3coder": Found("qwen", "qwen3_coder", "think"),
}
"""Of other models."""

EXPECTED = {**SERVED, **OTHERS}

ONE_CALL = {name for name, found in EXPECTED.items() if found.calls == "llama3_json"}
"""Of one call a message: two are two messages."""

ONLY_WITH_TOOLS = {name for name in EXPECTED if name.startswith("NousResearch")}
"""Their tokenizers have another template for the rest."""

UNLIKE_ITSELF = {
    *("tool_chat_template_phi4_mini", "tool_chat_template_toolace", "tool_chat_template_llama3.2_pythonic"),
    "tool_chat_template_llama4_pythonic",
}
"""They ask for calls in one form and write them in another: without what Python wants around texts, or with
quotation marks around everything and within it."""

MESSAGES = {name for name, found in EXPECTED.items() if found.thoughts == "harmony"}
"""Their calls and thoughts are messages of their own, and their system's messages one."""

INDENTED = {"tool_chat_template_granite", "tool_chat_template_gemma3_pythonic"}
"""They write calls over several lines, which Granite's models do not, or forget commas."""
