"""transformers' greedy answers, token by token, with what is needed to judge a difference from them.

They are computed once, one sequence at a time without padding, and kept in a JSON file, with the
hidden states (for hand-made heads) in a safetensors file beside it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.common import prompt_ids

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_CACHE", "Answer", "Reference", "first_difference", "load_reference"]


DEFAULT_CACHE = Path(tempfile.gettempdir()) / "medusa-reference.json"


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer.

    Args:
        prompt: the user turn.
        prompt_ids: the whole chat prompt in tokens.
        token_ids: the answer, with the EOS token if it ended by one.
        gaps: best logit minus second best at each position, in float32.
        prefixes: text after each position, prefixes[k] = decode(token_ids[: k + 1]), special tokens left out.
        finish_reason: "stop" or "length".
    """

    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]
    prefixes: list[str]
    finish_reason: str

    @property
    def text(self) -> str:
        return self.prefixes[-1]


@dataclass(frozen=True, slots=True)
class Reference:
    """Answers and, for each, its hidden states after the final norm: [tokens, hidden] float32.

    Row k is the state whose logits chose token k, so row 0 belongs to the prompt's last token.
    """

    answers: list[Answer]
    hidden: list[Tensor]


def load_reference(
    folder: Path, prompts: list[str], max_tokens: int, cache: Path, device: str = "cpu"
) -> Reference:
    """The reference for these prompts, from `cache` where it holds exactly that, else computed (and kept)."""
    from safetensors.torch import load_file, save_file

    key = _key(folder, prompts, max_tokens)
    states = cache.with_suffix(".safetensors")
    if cache.is_file() and states.is_file():
        data = json.loads(cache.read_text(encoding="utf-8"))
        tensors = load_file(states)
        if data["key"] == key and len(tensors) == len(data["answers"]):
            answers = [Answer(**answer) for answer in data["answers"]]
            return Reference(answers, [tensors[str(i)] for i in range(len(answers))])
        print(f"{cache} is of another model, other prompts or another length: computing it again", flush=True)

    reference = _compute(folder, prompts, max_tokens, device)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({str(i): rows for i, rows in enumerate(reference.hidden)}, states)
    text = json.dumps({"key": key, "answers": [asdict(answer) for answer in reference.answers]})
    cache.write_text(text, encoding="utf-8")
    return reference


def _key(folder: Path, prompts: list[str], max_tokens: int) -> str:
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    parts = json.dumps([1, weights, tokenizer, prompts, max_tokens])
    return hashlib.sha256(parts.encode()).hexdigest()


def _compute(folder: Path, prompts: list[str], max_tokens: int, device: str) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    eos = model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    answers: list[Answer] = []
    hidden: list[Tensor] = []
    for prompt in tqdm(prompts, desc="reference", unit="prompt"):
        ids = prompt_ids(tokenizer, prompt)
        tokens, gaps, states = _greedy(model, ids, max_tokens, stops)
        prefixes = [_decode(tokenizer, tokens[: k + 1]) for k in range(len(tokens))]
        reason = "stop" if tokens[-1] in stops else "length"
        answers.append(Answer(prompt, ids, tokens, gaps, prefixes, reason))
        hidden.append(states)
    return Reference(answers, hidden)


def _greedy(
    model: Any, ids: list[int], max_tokens: int, stops: set[int]
) -> tuple[list[int], list[float], Tensor]:
    """Tokens, top-2 gaps and hidden states of one greedy answer.

    A loop over the model's forward, not generate(): that returns scores after its processors, and no
    hidden states after the final norm of the last position alone.
    """
    import torch

    tokens: list[int] = []
    gaps: list[float] = []
    states: list[Tensor] = []
    past = None
    step = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        while len(tokens) < max_tokens and not (tokens and tokens[-1] in stops):
            base = model.base_model(input_ids=step, past_key_values=past, use_cache=True)
            past = base.past_key_values
            last = base.last_hidden_state[:, -1]  # [1, hidden], after the final norm
            best = model.lm_head(last)[0].float().topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            states.append(last[0].float().cpu())
            step = best.indices[:1].view(1, 1)
    return tokens, gaps, torch.stack(states)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def first_difference(answer: Answer, text: str) -> int | None:
    """Index of the first token of the reference that `text` does not continue with; None if it is the same.

    The API returns text, so this is where the texts part. Tokens may part earlier (two spellings of one
    text); the gap is then judged too late, which can call a tie a failure and never a failure a tie.
    """
    # An unfinished character at the end of the output decodes to U+FFFD, or to nothing when streamed.
    if text.rstrip("\ufffd") == answer.text.rstrip("\ufffd"):
        return None
    for k, prefix in enumerate(answer.prefixes):
        if not text.startswith(prefix.rstrip("\ufffd")):
            return k
    return len(answer.token_ids) - 1
