"""The types every part of the engine shares. Plain data: no torch, no web framework."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from engine.config import MAX_TREE_NODES
from engine.errors import ContextLengthError, RequestError
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.grammar import Grammar, GrammarState

__all__ = [
    "Acceptance",
    "DraftSource",
    "EngineInfo",
    "FinishReason",
    "LookupState",
    "MedusaParams",
    "Request",
    "SamplingParams",
    "Sequence",
    "StepTrace",
    "TokenDelta",
    "TokenLogprobs",
]


class FinishReason(StrEnum):
    """Why a choice ended; `stop` and `length` are OpenAI's, the others never reach a client as such."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class DraftSource(StrEnum):
    """Where a tree node's token came from."""

    ROOT = "root"
    HEAD = "head"
    LOOKUP = "lookup"
    PREDICTION = "prediction"
    GRAMMAR = "grammar"


class Acceptance(StrEnum):
    """Which drafted nodes become text: those the model's own draw confirms, or the paper's typical ones."""

    EXACT = "exact"
    TYPICAL = "typical"


@dataclass(frozen=True, slots=True)
class MedusaParams:
    """How the drafts of one request are verified.

    Args:
        acceptance: `exact` keeps the model's own distribution; `typical` accepts a child where
            p(child) > min(epsilon, delta * exp(-H)) (Cai et al. 2024, section 2.3.1), more of it and
            with another distribution. Greedy requests are always exact.
        epsilon: hard threshold, in [0, 1].
        delta: entropy-dependent threshold, in [0, 3e38]: what float32 holds.
        max_tree_size: most nodes a step, root counted; None leaves it to the server, 1 is plain decoding.

    Raises:
        RequestError: a value out of range, with the field's name.
    """

    acceptance: Acceptance = Acceptance.EXACT
    epsilon: float = 0.09
    delta: float = 0.3
    max_tree_size: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(
                    f"medusa.{name} must be {rule}, got {getattr(self, name)!r}", param=f"medusa.{name}"
                )

        check(0.0 <= self.epsilon <= 1.0, "epsilon", "in [0, 1]")
        check(0.0 <= self.delta <= 3e38, "delta", "in [0, 3e+38]")
        size = self.max_tree_size
        check(
            size is None or 1 <= size <= MAX_TREE_NODES, "max_tree_size", f"from 1 to {MAX_TREE_NODES} nodes"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One call: a prompt in token ids and how to continue it, `sampling.n` times.

    Args:
        request_id: unique among live requests; appears in logs.
        prompt_token_ids: at least one token.
        sampling: how to draw.
        trace: attach a `StepTrace` to every delta of a decode step.
        medusa: how drafts are verified.
        prediction_token_ids: what the answer is expected to hold (OpenAI's `prediction`); the lookup
            branch drafts from it, so what comes true comes faster.
        cache_salt: prefixes are reused among requests with equal salt only.
        grammar: what every choice has to follow; None for any text.
        priority: lower ones are admitted first and preempted last; equals by arrival.
        arrived_s: `time.monotonic()` when it was made.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    trace: bool = False
    medusa: MedusaParams = field(default_factory=MedusaParams)
    prediction_token_ids: tuple[int, ...] = ()
    cache_salt: str | None = None
    grammar: Grammar | None = None
    priority: int = 0
    arrived_s: float = field(default_factory=time.monotonic, compare=False)

    @property
    def typical(self) -> bool:
        return self.medusa.acceptance is Acceptance.TYPICAL and not self.sampling.greedy


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One sequence's share of one decode step, as a picture of the tree would need it.

    Args:
        tokens: node tokens, root first, in the tree's order; length is the number of nodes.
        parents: index of each node's parent; -1 for the root.
        sources: what proposed each node.
        accepted: node indices of the accepted path, root first.
        next_root: the token drawn at the path's end; it is emitted and becomes the next root.
        batch_size: sequences in this step.
        duration_s: wall time of the step, in seconds.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[DraftSource, ...]
    accepted: tuple[int, ...]
    next_root: int
    batch_size: int
    duration_s: float


class TokenLogprobs(NamedTuple):
    """Raw log-probabilities at one position. A tuple, which is soonest sent to another process.

    Args:
        token_id: the token that stands there.
        logprob: its log-probability, natural logarithm.
        rank: 1 for the most likely token.
        top: (token id, log-probability) of the best ones, falling; as many as the request asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class TokenDelta:
    """New tokens of one choice from one engine step.

    Args:
        request_id: the request.
        index: the choice, from 0.
        token_ids: emitted tokens in order; may be empty on the last delta. A token that ended the
            output (EOS, stop_token_ids) is included as the last one and counts in the usage.
        finish_reason: set on the last delta of the choice.
        stop_token_id: the token that ended it, where one did.
        num_steps: decode steps behind these tokens: 0 for the token drawn at the end of prefill, else 1.
        time_s: `time.monotonic()` at the end of the step.
        trace: the step's record, where the request asked for it.
        error: what to tell the user, with `FinishReason.ERROR`.
        own_fault: the request's own, which asks for what there is not.
        fault_param: the field that is at fault then, where one is.
        logprobs: one entry per token of `token_ids`, where the request asked for them.
        prompt_logprobs: on the first delta of choice 0, where asked for: one entry per prompt token, None
            for the first, which nothing predicts.
        cached_tokens: on the first delta: prompt tokens whose K/V was reused.
        accepted_prediction_tokens: emitted tokens that `Request.prediction_token_ids` had drafted.
        queue_s: on the first delta of a choice: seconds from the request's arrival to its slot.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_steps: int = 0
    time_s: float = 0.0
    trace: StepTrace | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0
    queue_s: float = 0.0
    own_fault: bool = False
    fault_param: str | None = None


class SequenceState(StrEnum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True)
class LookupState:
    """What the lookup branch proposes for a sequence.

    Args:
        chain: tokens that may follow the root, nearest first; empty where nothing in the history matches.
        kind: how good the match is: tokens that matched up to the root, 0 for none; plus 8 where it lies
            in the prediction; 17 where the grammar leaves nothing else.
    """

    chain: list[int] = field(default_factory=list)
    kind: int = 0

    @property
    def from_prediction(self) -> bool:
        return 8 < self.kind <= 16

    @property
    def forced(self) -> bool:
        return self.kind > 16


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request as the engine carries it from admission to its end.

    `token_ids` holds prompt and emitted tokens. While decoding, the last of them is the root: drawn
    and emitted, its K/V not yet in the cache, so `num_cached == len(token_ids) - 1` between steps.

    Args:
        request: whose choice it is.
        index: the choice, from 0.
        seed: of its draws: the request's, or one made at admission.
        token_ids: see above.
        num_prompt: how many of them are the prompt's.
        max_total: most tokens, prompt and output together.
        arrival: its number among all sequences, rising.
        state: where it stands.
        num_cached: tokens whose K/V are in the cache.
        slot: its row of the device's tensors; -1 where it has none.
        blocks: of K/V that it owns, in the order of its tokens.
        num_reused: of its first prefill, tokens whose K/V another sequence had left.
        head_nodes: nodes of the heads' branch in the step being planned.
        lookup_nodes: nodes of the lookup branch in the step being planned.
        in_flight: most tokens that steps under way may still emit; 0 where none holds it.
        lookup: what the lookup branch may draft next.
        grammar: where its output stands in the request's grammar, with all tokens that are emitted.
        prompt_logprobs: of the prompt tokens prefilled so far, where asked for.
        queue_s: seconds from the request's arrival to its first slot; below 0 before.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    num_prompt: int
    max_total: int
    arrival: int
    state: SequenceState = SequenceState.WAITING
    num_cached: int = 0
    num_reused: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    head_nodes: int = 0
    lookup_nodes: int = 0
    in_flight: int = 0
    lookup: LookupState = field(default_factory=LookupState)
    grammar: GrammarState | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    queue_s: float = -1.0

    def source(self, node: int, head_nodes: int) -> DraftSource:
        """What proposed a node of its tree in this step; call before the next chain is noted."""
        if node <= head_nodes:
            return DraftSource.HEAD if node else DraftSource.ROOT
        if self.lookup.forced:
            return DraftSource.GRAMMAR
        return DraftSource.PREDICTION if self.lookup.from_prediction else DraftSource.LOOKUP

    @property
    def num_nodes(self) -> int:
        """Tree nodes of the step being planned, root counted; 1 is plain decoding."""
        return 1 + self.head_nodes + self.lookup_nodes

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in line: by priority, then by arrival."""
        return self.request.priority, self.arrival

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.max_total - len(self.token_ids)

    @property
    def prefill_target(self) -> int:
        """Tokens whose K/V prefill must compute: all but an already drawn root."""
        return len(self.token_ids) - (1 if self.num_output else 0)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a running engine is, for the start-up line, `/v1/models` and build info.

    `tree_size` is the most nodes of a tree, root counted, 1 for plain decoding; `tree` the setting:
    "auto", "off" or a number. `lookup` is the most nodes of the lookup branch, 0 where off. `lora` are the
    adapters in the weights, as `Adapter.identity` has them.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    num_heads: int
    tree_size: int
    max_model_len: int
    kv_cache_tokens: int
    vocab_size: int
    max_num_seqs: int
    tree: str = "off"
    lookup: int = 0
    quantization: str = "none"
    lora: tuple[str, ...] = ()

    def check(self, request: Request) -> None:
        """Raise if the request can never run here.

        Raises:
            ContextLengthError: the prompt leaves no room, or prompt plus max_tokens do not fit.
            RequestError: an empty prompt, a token id outside the vocabulary, what is about text, min_tokens
                with a grammar, or bad_words that leave this nothing to begin with.
        """
        prompt, sampling = request.prompt_token_ids, request.sampling
        wanted = sampling.max_tokens
        if not prompt:
            raise RequestError("the prompt has no tokens", param="prompt")
        if sampling.text_fields:
            name = sampling.text_fields[0]
            told = {"stop": "stop strings", "bad_words": "bad_words that are text"}.get(name, name)
            raise RequestError(f"{told} go with LLM.generate and LLM.chat only", param=name)
        for name, tokens in (
            ("prompt", prompt),
            ("prediction", request.prediction_token_ids),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
            ("stop_token_ids", sampling.stop_token_ids),
            ("bad_words", [token for word in request.sampling.bad_words for token in word]),
        ):
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
                raise RequestError(f"{name} token ids must be in [0, {self.vocab_size})", param=name)
        if request.grammar is not None and sampling.min_tokens:
            reason = "where the grammar ends, so does the answer"
            raise RequestError(f"min_tokens cannot be set with a grammar: {reason}", param="min_tokens")
        barred = {word[0] for word in sampling.bad_words if len(word) == 1}
        if request.grammar is not None and barred and not request.grammar.may_begin(without=barred):
            reason = "they leave none of the tokens that an answer of this grammar may begin with"
            raise RequestError(f"bad_words: {reason}", param="bad_words")
        if len(prompt) + (wanted or 1) > self.max_model_len:
            asked = f"{len(prompt)} prompt tokens" + (f" and max_tokens {wanted}" if wanted else "")
            raise ContextLengthError(
                f"the context holds {self.max_model_len} tokens; the request asks for {asked}", param="prompt"
            )
        if len(prompt) + sampling.min_tokens > self.max_model_len:
            asked = f"{len(prompt)} prompt tokens and min_tokens {sampling.min_tokens}"
            raise RequestError(
                f"the context holds {self.max_model_len} tokens; the request asks for {asked}",
                param="min_tokens",
            )
