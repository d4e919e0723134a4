"""vLLM's names that are not here: who comes from it is told what takes their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

__all__ = ["CALLS", "SAMPLING", "SETTINGS", "Instead", "explaining", "without_vllms"]

P = ParamSpec("P")
R = TypeVar("R")


class Instead(NamedTuple):
    """What takes a name's place.

    Args:
        use: for the user.
        passes: values that ask for nothing.
    """

    use: str
    passes: tuple[object, ...] = ()


_GRAMMAR = Instead("LLM.generate and LLM.chat take grammar=GrammarSpec(kind, text)")
_NO_BEAMS = Instead("there is no beam search", (False, 1, 1.0))

SAMPLING = {
    "allowed_token_ids": Instead("a logit_bias of 100 for these ids leaves the others no chance"),
    "best_of": Instead("ask for n outputs with logprobs=0, and take the likeliest", (1,)),
    "detokenize": Instead("leave it out: the text of an output is made when it is asked for", (True,)),
    "early_stopping": _NO_BEAMS,
    "extra_args": Instead("there are no plug-ins"),
    "flat_logprobs": Instead("Output.logprobs is one list as it is", (False,)),
    "guided_decoding": _GRAMMAR,
    "length_penalty": _NO_BEAMS,
    "logits_processors": Instead("logit_bias and bad_words, or a grammar", ([],)),
    "logprob_token_ids": Instead("logprobs gives the 20 likeliest"),
    "output_kind": Instead("LLM.generate gives whole outputs, LLM.steps what is new"),
    "prompt_logprob_token_ids": Instead("prompt_logprobs gives the 20 likeliest"),
    "repetition_detection": Instead("repetition_penalty, or stop strings"),
    "skip_reading_prefix_cache": Instead("a Request with a cache_salt of its own", (False,)),
    "spaces_between_special_tokens": Instead("there are always some", (True,)),
    "structured_outputs": _GRAMMAR,
    "thinking_token_budget": Instead("max_tokens is for all of the output", (-1,)),
    "use_beam_search": _NO_BEAMS,
}
"""Of vLLM's SamplingParams."""

CALLS = {
    "chat_template": Instead("LLM(chat_template=…)"),
    "lora_request": Instead("LLM(lora=…) merges adapters when the model is loaded"),
    "priority": Instead("a Request has a priority"),
    "prompt_token_ids": Instead("token ids are prompts like any other"),
    "sampling_params": Instead("it is called sampling"),
    "tokenization_kwargs": Instead("truncate_prompt_tokens is in SamplingParams", ({},)),
    "use_tqdm": Instead("it is called progress"),
}
"""Of vLLM's LLM.generate and LLM.chat."""

SETTINGS = {
    "cpu_offload_gb": Instead("weights have to fit; quantization makes them smaller", (0,)),
    "data_parallel_size": Instead("an LLM has one device: run several processes", (1,)),
    "download_dir": Instead("the environment's HF_HOME"),
    "enable_chunked_prefill": Instead("it is always on", (True,)),
    "enable_lora": Instead("lora=… merges adapters when the model is loaded", (False,)),
    "enable_prefix_caching": Instead("it is called prefix_caching"),
    "hf_token": Instead("the environment's HF_TOKEN"),
    "kv_cache_dtype": Instead("K/V are in dtype", ("auto",)),
    "max_num_batched_tokens": Instead("max_prefill_tokens for prompts, max_step_tokens for decode steps"),
    "num_gpu_blocks_override": Instead("kv_cache_tokens or kv_cache_bytes"),
    "pipeline_parallel_size": Instead("an LLM has one device", (1,)),
    "seed": Instead("SamplingParams(seed=…) of each request", (0,)),
    "speculative_config": Instead("heads, tree and lookup; the model's own heads are used unasked"),
    "speculative_model": Instead("heads"),
    "swap_space": Instead("what is preempted is computed again", (0, 4)),
    "tensor_parallel_size": Instead("an LLM has one device", (1,)),
    "tokenizer": Instead("the tokenizer of the model's folder is used"),
    "tokenizer_mode": Instead("the tokenizer of the model's folder is used", ("auto",)),
    "trust_remote_code": Instead("the families of README.md are built in", (False,)),
}
"""Of vLLM's LLM."""


def without_vllms(
    given: Mapping[str, Any], names: Mapping[str, Instead], error: type[Exception]
) -> dict[str, Any]:
    """The arguments without those of these names that ask for nothing.

    Raises:
        error: one that asks for something.
    """
    for name in given.keys() & names.keys():
        use, passes = names[name]
        if given[name] is not None and given[name] not in passes:
            raise error(f"{name} is not supported: {use}")
    return {name: value for name, value in given.items() if name not in names}


def explaining(
    names: Mapping[str, Instead], error: type[Exception]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function refuse arguments of these names as `without_vllms` does."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.keys() & names.keys():
                return function(*args, **without_vllms(kwargs, names, error))
            return function(*args, **kwargs)

        return call

    return decorate
