"""Answers that follow a grammar: transformers' text with masked logits, whatever was drafted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from engine.batch import Batch, Verified
from engine.constrain import _forbid_together_, forbid_, refusal, refused_param
from engine.engine import Engine
from engine.errors import RequestError
from engine.grammar import Grammar, GrammarCompiler, GrammarSpec
from engine.llm import LLM
from engine.types import (
    Acceptance,
    DraftSource,
    FinishReason,
    MedusaParams,
    Request,
    SamplingParams,
    Sequence,
)
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_features import deltas_of, engines
from tests.letters import letter_tokenizer
from tests.support import make_engine, run_all

TOKENIZER = letter_tokenizer("abcdefgh", "ab", "bc", "abc")  # with its end, the 12 tokens of `narrow`
END = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER, [END])
PATTERNS = ["(a(bc|b)*d?|[b-e]{2,4}f)+", "([a-c]{1,3}g)*h", "[a-h]{1,60}", "(abc|abd|d(e|f)){9}h?"]
PROMPTS = [tuple((7 * i + j) % 12 for j in range(4 + 2 * i)) for i in range(4)]


def regex(pattern: str) -> Grammar:
    return COMPILER.compile(GrammarSpec("regex", pattern))


def ask(name: str, i: int, sampling: SamplingParams, pattern: str | None, **values: object) -> Request:
    grammar = regex(pattern) if pattern is not None else None
    return Request(name, PROMPTS[i], sampling, grammar=grammar, **values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, params=["eager", "ahead", "captured"], scope="module")
def _mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(support.MODE, "ahead", request.param != "eager")
        patch.setitem(support.MODE, "captured", request.param == "captured")
        yield


@pytest.fixture(scope="module")
def every(narrow: TinyModel, _mode: None) -> dict[str, Engine]:
    """Engines of all settings, made once a mode: each test leaves them empty."""
    return engines(narrow)


def text_of(tokens: list[int]) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens([token for token in tokens if token != END]))


def may_follow(grammar: Grammar, tokens: list[int]) -> torch.Tensor:
    """[12] bool, by a state that has gone nowhere else."""
    state = grammar.start()
    assert all(state.advance(token) for token in tokens)
    bits = np.zeros((1, state.words), np.int32)
    state.masks([0], [-1], bits)
    return torch.from_numpy(np.unpackbits(bits.view(np.uint8), bitorder="little")[:12].astype(bool))


@torch.inference_mode()
def greedy_reference(model: TinyModel, prompt: tuple[int, ...], grammar: Grammar, count: int) -> list[int]:
    output: list[int] = []
    state = grammar.start()
    while len(output) < count and not state.ended:
        logits = model.reference(torch.tensor([[*prompt, *output]])).logits[0, -1]
        output.append(int(logits.masked_fill(~may_follow(grammar, output), -math.inf).argmax()))
        assert state.advance(output[-1])
    return output


def test_greedy_is_transformers_with_masked_logits(narrow: TinyModel, every: dict[str, Engine]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    requests = [ask(f"r{i}", i, params, pattern) for i, pattern in enumerate(PATTERNS)]
    others = [ask(f"free{i}", i, params, None) for i in range(4)]
    free = run_all(make_engine(narrow.folder, tree="off"), others)
    requests += others
    wanted = {
        (f"r{i}", 0): greedy_reference(narrow, PROMPTS[i], regex(pattern), 30)
        for i, pattern in enumerate(PATTERNS)
    }
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(PATTERNS)
    for name, engine in every.items():
        assert run_all(engine, requests, arrive_every=1) == wanted | free, name
        if name in ("tree", "chain"):
            assert engine.stats.accepted_tokens > 10
        if name == "starved":
            assert engine.stats.preemptions > 0


@pytest.mark.parametrize("typical", [False, True])
def test_draws_follow_the_grammar_and_are_the_same_whatever_the_tree(
    narrow: TinyModel, every: dict[str, Engine], typical: bool
) -> None:
    features = [
        {},
        {"top_p": 0.8},
        {"top_k": 3, "presence_penalty": 0.7},
        {"repetition_penalty": 1.3, "n": 3},
    ]
    medusa = MedusaParams(Acceptance.TYPICAL if typical else Acceptance.EXACT)
    requests = [
        ask(f"r{i}", i, SamplingParams(seed=i, max_tokens=30, **feature), PATTERNS[i], medusa=medusa)
        for i, feature in enumerate(features)
    ]
    alone = {
        key: tokens
        for one in requests
        for key, tokens in run_all(make_engine(narrow.folder, tree="off"), [one]).items()
    }
    for name, engine in every.items():
        found = run_all(engine, requests, arrive_every=1)
        if not typical:
            assert found == alone, name
        for (request_id, _), tokens in found.items():
            state = regex(PATTERNS[int(request_id[1])]).start()
            assert all(state.advance(token) for token in tokens)
            assert state.ended or len(tokens) == 30
            if state.ended:
                assert re.fullmatch(PATTERNS[int(request_id[1])], text_of(tokens))
    assert len({tuple(tokens) for (name, _), tokens in alone.items() if name == "r3"}) == 3


def test_an_answer_ends_where_nothing_can_follow_and_says_stop(every: dict[str, Engine]) -> None:
    for name, engine in every.items():
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        *_, last = deltas_of(engine, ask("r", 1, params, "abcabcabcabc"))
        assert last.finish_reason is FinishReason.STOP, name
        found = run_all(engine, [ask("r", 1, params, "abcabcabcabc")])
        assert text_of(found["r", 0]) == "abcabcabcabc", name


def test_what_ends_an_answer_comes_only_where_it_is_whole(every: dict[str, Engine]) -> None:
    """END is likely everywhere, and not let through before 5 letters."""
    params = SamplingParams(temperature=0.0, max_tokens=30, logit_bias=((END, 50.0),))
    for name, engine in every.items():
        tokens = run_all(engine, [ask("r", 2, params, "[a-h]{5,9}")])["r", 0]
        assert tokens[-1] == END, name
        assert len(text_of(tokens)) in (5, 6, 7), name  # a word of three letters may pass the fifth


@torch.inference_mode()
def test_logprobs_stay_raw(narrow: TinyModel, every: dict[str, Engine]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    for name, engine in every.items():
        found = deltas_of(engine, ask("r", 3, params, "(abc|abd|d(e|f)){9}h?"))
        tokens = [token for delta in found for token in delta.token_ids]
        entries = [entry for delta in found for entry in delta.logprobs or []]
        assert len(entries) == len(tokens) == 12
        expected = narrow.reference(torch.tensor([[*PROMPTS[3], *tokens]])).logits[0].log_softmax(-1)
        assert any(entry.rank > 1 for entry in entries)  # the grammar chose another one
        for place, entry in enumerate(entries, start=len(PROMPTS[3]) - 1):
            assert entry.logprob == pytest.approx(float(expected[place][entry.token_id]), abs=1e-3), name
            assert entry.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-3)


@pytest.mark.parametrize("drawn", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}])
@pytest.mark.parametrize("before", [(), (3, 4)])
def test_where_nothing_allowed_is_left_the_request_fails_and_no_other(
    every: dict[str, Engine], drawn: dict[str, float], before: tuple[int, ...]
) -> None:
    for name, engine in every.items():
        params = SamplingParams(temperature=0.0, max_tokens=20)
        words = tuple((*before, token) for token in (0, 8, 10))
        barred = SamplingParams(**drawn, max_tokens=20, bad_words=words)  # type: ignore[arg-type]
        found = deltas_of(engine, ask("r", 0, params, "(abcd)+"), ask("barred", 0, barred, "de(abc)+"))
        last = {delta.request_id: delta for delta in found}
        assert last["barred"].finish_reason is FinishReason.ERROR, name
        assert "grammar" in (last["barred"].error or ""), name
        assert last["barred"].own_fault, name
        assert last["barred"].fault_param == "bad_words", name
        assert engine.stats.acceptance_counts[0] == 0, name
        assert last["r"].finish_reason is not FinishReason.ERROR
        together = [token for delta in found if delta.request_id == "r" for token in delta.token_ids]
        assert together == run_all(engine, [ask("r", 0, params, "(abcd)+")])["r", 0], name


def test_tokens_that_only_the_tokenizer_has_are_neither_drafted_nor_drawn(every: dict[str, Engine]) -> None:
    """They are the 13th and 14th here, and the models have 12."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)  # the models' is a token here
    longer = letter_tokenizer("abcdefghij", "ab", "bc", "abc")
    compiler = GrammarCompiler(longer, [longer.eos_token_id, 4], 12)
    spelled = compiler.compile(GrammarSpec("regex", "d(abc){3}"))
    for name, engine in every.items():
        found = deltas_of(engine, Request("r", PROMPTS[0], params, grammar=spelled))
        tokens = [token for delta in found for token in delta.token_ids]
        assert found[-1].finish_reason is FinishReason.STOP, name
        assert "".join(longer.convert_ids_to_tokens(tokens)) == "dabcabcabc", name
    with pytest.raises(RequestError, match="no answer of this model's tokens can follow"):
        GrammarCompiler(letter_tokenizer("abcdefghijklmn"), [4], 12).compile(GrammarSpec("regex", "n"))


def test_only_bad_words_are_blamed_for_what_they_do() -> None:
    request = Request("r", (1,), SamplingParams(bad_words=((1,),)))
    sequence = Sequence(request, 0, seed=0, token_ids=[1], num_prompt=1, max_total=9, arrival=0)
    sequence.grammar = regex("a").start()
    assert refused_param(sequence) == "bad_words"
    sequence.grammar.error = "too deep"
    assert refusal(sequence).endswith(": too deep")
    assert refused_param(sequence) is None


def test_a_bias_leaves_what_the_grammar_allows(every: dict[str, Engine]) -> None:
    """Unlike bad_words it forbids nothing: what is left has to come."""
    params = SamplingParams(max_tokens=20, logit_bias=tuple((token, -100.0) for token in range(12)))
    for name, engine in every.items():
        found = run_all(engine, [ask("r", 0, params, "de(abc)d"), ask("s", 1, params, "abcabc")])
        assert [text_of(tokens) for tokens in found.values()] == ["deabcd", "abcabc"], name


def test_a_parser_that_gives_up_fails_its_own_request_and_says_why(every: dict[str, Engine]) -> None:
    for name, engine in every.items():
        params = SamplingParams(temperature=0.0, max_tokens=20)
        engine.add(ask("r", 0, params, "(abcd)+"))
        engine.add(ask("lost", 1, params, "[a-h]{60}"))
        engine.step()
        (lost,) = (s for s in engine._scheduler if s.request.request_id == "lost")
        assert lost.grammar is not None
        lost.grammar._matcher.consume_token(END)
        assert lost.grammar._matcher.is_error()
        last = {delta.request_id: delta for delta in deltas_of(engine)}
        assert last["lost"].finish_reason is FinishReason.ERROR, name
        assert "parser" in (last["lost"].error or "")
        assert last["r"].finish_reason is not FinishReason.ERROR, name


def test_a_step_with_a_grammar_is_not_passed_by_the_next(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may follow is known only when the step's tokens are; a step without any goes ahead as before."""
    engine = make_engine(narrow.folder, tree=9, heads=str(narrow.heads))
    forward, under_way = engine._runner.draft_forward, []

    def note(batch: Batch) -> Verified:
        under_way.append(engine._flight is not None)
        return forward(batch)

    monkeypatch.setattr(engine._runner, "draft_forward", note)
    params = SamplingParams(temperature=0.0, max_tokens=30)
    run_all(engine, [ask("r", 1, params, PATTERNS[2])])
    assert len(under_way) > 2
    assert not any(under_way)
    run_all(engine, [ask("free", 1, params, None)])
    assert any(under_way) == support.MODE["ahead"]


def test_time_spent_on_grammars_is_not_the_trees(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(narrow.folder, heads=str(narrow.heads))
    constrain = engine._runner.constrain
    seen: list[float] = []
    monkeypatch.setattr(engine._runner, "constrain", lambda *args: (constrain(*args)[0], 1e3))
    assert engine._chooser is not None
    monkeypatch.setattr(engine._chooser, "observe", lambda *known, **rest: seen.append(known[4]))
    run_all(engine, [ask("r", 1, SamplingParams(max_tokens=8), PATTERNS[2])])
    assert seen
    assert all(seconds < 0 for seconds in seen)


@pytest.mark.parametrize("forbid", [forbid_, _forbid_together_])
@pytest.mark.parametrize("vocab", [70, 61])  # more than the masks have, and less
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_forbidden_where_they_lie(
    dtype: torch.dtype, vocab: int, forbid: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, vocab, generator=generator).to(dtype)
    rows = torch.randperm(300, generator=generator)[:290]
    allowed = torch.rand(290, 64, generator=generator) < 0.5
    bits = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little"))
    wanted = logits.clone()
    for row, mask in zip(rows, allowed, strict=True):
        wanted[row, :64][~mask[:vocab]] = -math.inf
        wanted[row, 64:] = -math.inf  # the tokenizer knows no such tokens
    forbid(logits, rows, bits)
    assert torch.equal(logits, wanted)


def test_from_python(narrow: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("letters")
    for file in narrow.folder.iterdir():
        if file.is_file() and "token" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    TOKENIZER.save_pretrained(folder)
    llm = LLM(str(folder), progress=False, device="cpu", tree=9, heads=str(narrow.heads))
    grammar = GrammarSpec("choice", '["abcd", "dcba", "fgh"]')
    outputs = llm.generate(["ab", "cd"], SamplingParams(max_tokens=9), grammar=grammar, progress=False)
    assert {output.text for output in outputs} <= {"abcd", "dcba", "fgh"}
    with pytest.raises(RequestError, match="regular expression"):
        llm.generate("ab", grammar=GrammarSpec("regex", "("), progress=False)
    with pytest.raises(RequestError, match="min_tokens cannot be set with a grammar"):
        llm.generate("ab", SamplingParams(min_tokens=9), grammar=grammar, progress=False)
    with pytest.raises(RequestError, match="beside them"):
        llm.generate([Request("r", (1,))], grammar=grammar)  # type: ignore[call-overload]


def test_engine_keeps_going_when_a_grammar_request_is_aborted(narrow: TinyModel) -> None:
    engine: Engine = make_engine(narrow.folder, tree=9, heads=str(narrow.heads))
    params = SamplingParams(temperature=0.0, max_tokens=30, n=2)
    wanted = run_all(make_engine(narrow.folder, tree="off"), [ask("r", 1, params, PATTERNS[2])])["r", 1]
    engine.add(ask("r", 1, params, PATTERNS[2]))
    deltas = [delta for _ in range(3) for delta in engine.step()]
    deltas += engine.abort("r", 0)
    while engine.has_work:
        deltas += engine.step()
    engine.check()
    aborted, other = ([delta for delta in deltas if delta.index == index] for index in range(2))
    assert aborted[-1].finish_reason is FinishReason.ABORT
    assert [token for delta in other for token in delta.token_ids] == wanted
    assert other[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_what_a_grammar_forces_is_drafted_and_taken(narrow: TinyModel) -> None:
    """Lookup alone, whose history holds none of it."""
    params = SamplingParams(temperature=0.0, max_tokens=30)
    grammar = "(aaaabbbbccccdddd|hhhhaaaabbbbcccc)(eeeeffff|gggg)"
    wanted = run_all(make_engine(narrow.folder, tree="off"), [ask("r", 1, params, grammar)])
    engine = make_engine(narrow.folder, tree=9)
    found = deltas_of(engine, ask("r", 1, params, grammar, trace=True))
    assert [token for delta in found for token in delta.token_ids] == wanted["r", 0]
    assert engine.stats.drafted_by_source["grammar"] >= engine.stats.accepted_tokens > 8
    assert any(DraftSource.GRAMMAR in delta.trace.sources for delta in found if delta.trace is not None)
    free = make_engine(narrow.folder, tree=9)
    run_all(free, [ask("r", 1, params, None)])
    assert free.stats.drafted_by_source["grammar"] == 0
