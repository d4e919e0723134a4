"""The engine's promises on tiny models: the same text whatever the tree, the batch, the pool, the order."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from engine.engine import Engine
from engine.errors import ContextLengthError, RequestError
from engine.medusa.step_times import StepTimes
from engine.stats import DRAFT_SOURCES
from engine.types import DraftSource, FinishReason, Request, SamplingParams
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference, make_engine, run_all

SETTINGS = [
    pytest.param({"tree": "off"}, id="off"),
    pytest.param({"tree": "auto"}, id="auto"),
    pytest.param({"tree": 8, "prefix_caching": False, "lookup": "off"}, id="heads-only-no-reuse"),
    pytest.param({"tree": 2}, id="tree2"),
    pytest.param({"tree": 8}, id="tree8"),
    pytest.param({"tree": 33}, id="tree33"),
    pytest.param({"tree": 64}, id="tree64"),
    pytest.param({"tree": 8, "max_step_tokens": 64, "max_num_seqs": 3}, id="small-chunks"),
    pytest.param({"tree": 8, "max_model_len": 128, "kv_cache_tokens": 200}, id="preemption"),
    pytest.param({"tree": "off", "max_model_len": 128, "kv_cache_tokens": 192}, id="preemption-off"),
    pytest.param({"tree": "auto", "max_model_len": 128, "kv_cache_tokens": 192}, id="preemption-auto"),
    pytest.param({"tree": 33, "max_step_tokens": 67, "block_size": 8}, id="odd-chunks"),
]
LOOKUP = [
    pytest.param({"tree": 9, "lookup": 8}, id="chain"),
    pytest.param({"tree": "auto"}, id="chain-auto"),
    pytest.param({"tree": 5, "max_model_len": 128, "kv_cache_tokens": 200}, id="chain-preemption"),
]


def with_heads(model: TinyModel, settings: dict) -> dict:
    if settings["tree"] == "off":
        return settings
    tree_file = str(model.tree_file) if model.tree_file else None
    return settings | {"heads": str(model.heads), "tree_file": tree_file}


def prompts(count: int, vocab: int, longest: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def check_greedy(
    model: TinyModel, engine: Engine, arrive_every: int, counts: tuple[int, int] = (16, 5)
) -> None:
    """Ten prompts, half of them sharing a beginning, and the same again now that prefixes are known.

    Then to a few tokens: those of long after a prefix do not know where its K/V came from.
    """
    asked = prompts(10, model.reference.config.vocab_size, 90)
    asked[5:] = [asked[0][:40] + prompt for prompt in asked[5:]]
    asked = [prompt[:90] for prompt in asked]
    for count in counts:
        requests = [greedy(f"r{i}", prompt, count) for i, prompt in enumerate(asked)]
        outputs = run_all(engine, requests, arrive_every=arrive_every)
        for i, prompt in enumerate(asked):
            assert outputs[f"r{i}", 0] == greedy_reference(model.reference, prompt, count), f"prompt {i}"


def check_settings(model: TinyModel, settings: dict, arrive_every: int) -> None:
    engine = make_engine(model.folder, **with_heads(model, settings))
    # Of auto's trees nobody knows how much of the pool they take: these answers fill it by themselves.
    fills = "kv_cache_tokens" in settings and settings["tree"] == "auto"
    check_greedy(model, engine, arrive_every, (32, 5) if fills else (16, 5))
    if settings["tree"] == 64 and model.tree_file is not None:
        assert engine.stats.acceptance_length > 3, "the test is to see long runs"
    if "kv_cache_tokens" in settings and not arrive_every:
        assert engine.stats.preemptions > 0, "the pool is to be too small"
    if settings.get("prefix_caching", True):
        assert engine.stats.prefix_hit_tokens > 0
    else:
        assert engine.stats.prefix_hit_tokens == 0


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("arrive_every", [0, 2])
def test_greedy_is_transformers_greedy(
    tiny: TinyModel, narrow: TinyModel, certain: TinyModel, settings: dict, arrive_every: int
) -> None:
    for model in (tiny, narrow, certain):
        check_settings(model, settings, arrive_every)


@pytest.mark.parametrize("settings", LOOKUP)
@pytest.mark.parametrize("arrive_every", [0, 2])
def test_greedy_with_lookup_alone_is_transformers_greedy(
    narrow: TinyModel, certain: TinyModel, settings: dict, arrive_every: int
) -> None:
    for model in (narrow, certain):
        engine = make_engine(model.folder, **settings)
        check_greedy(model, engine, arrive_every)
        # What auto takes hangs on the machine, which may be busy: see the next test.
        assert settings["tree"] == "auto" or engine.stats.accepted_by_source["lookup"] > 20
        assert engine.stats.accepted_by_source["head"] == 0


class Unchanging(StepTimes):
    """Of a machine that takes 20 ms for a step and so much more for each node."""

    def __init__(self, node_s: float) -> None:
        batches = (1, 2, 4, 8)
        super().__init__(
            {batch: [(batch * n, 0.02 + node_s * batch * n) for n in (1, 2, 4, 8)] for batch in batches},
            {batch: [0.0] for batch in batches},
        )

    def observe(self, *_step: float) -> None:
        """What this machine's steps take says nothing."""

    def observe_outside(self, *_step: float) -> None:
        """The same."""


@pytest.mark.parametrize(("node_s", "least", "most"), [(0.0002, 90, 600), (0.002, 2, 40), (0.05, 0, 0)])
def test_auto_takes_the_chains_that_pay(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, node_s: float, least: int, most: int
) -> None:
    """The same text whatever a node costs, and the fewer nodes the more it does."""
    monkeypatch.setattr("engine.runners.measure", lambda *_runner, **_bounds: Unchanging(node_s))
    engine = make_engine(narrow.folder, tree="auto")
    check_greedy(narrow, engine, 2, (30, 30))
    assert least <= engine.stats.accepted_by_source["lookup"] <= most


def test_the_first_step_behind_a_prompt_drafts_what_the_prompt_says(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8)
    sampling = SamplingParams(temperature=0, max_tokens=12, logit_bias=((5, 100.0),))
    engine.add(Request("fives", (5,) * 9, sampling, trace=True))
    traces = [delta.trace for _ in range(4) for delta in engine.step() if delta.trace is not None]
    assert traces[0].sources[1:] == (DraftSource.LOOKUP,) * 7
    assert traces[0].tokens == (5,) * 8


def seeded(count: int, **values: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.8, "seed": 11, "max_tokens": count, "n": 1} | values))


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.02}], ids=str)
def test_a_seed_gives_the_same_text_tree_on_or_off_alone_or_batched(narrow: TinyModel, filters: dict) -> None:
    def text(engine: Engine, neighbours: int) -> list[int]:
        asked = [Request(f"n{i}", (i, 4), seeded(30, seed=i, top_p=0.7)) for i in range(neighbours)]
        asked.append(Request("me", (1, 2, 3), seeded(40, **filters)))  # last: the one to be preempted
        return run_all(engine, asked, arrive_every=1)["me", 0]

    plain = make_engine(narrow.folder, tree="off")
    tree = make_engine(narrow.folder, tree=33, heads=str(narrow.heads))
    starved = make_engine(
        narrow.folder, tree=8, heads=str(narrow.heads), max_model_len=64, kv_cache_tokens=128
    )
    texts = [text(engine, neighbours) for engine in (plain, tree, starved) for neighbours in (0, 7)]
    assert starved.stats.preemptions > 0
    assert tree.stats.acceptance_length > 1.5
    assert len(set(map(tuple, texts))) == 1
    assert len(texts[0]) == 40


def test_choices_differ_and_repeat(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    request = Request("r", (5, 6), seeded(20, n=4))
    first, second = run_all(engine, [request]), run_all(engine, [request])
    assert first == second
    assert len({tuple(tokens) for tokens in first.values()}) == 4


@pytest.mark.parametrize("seed", [None, -1])
def test_a_request_without_a_seed_gets_its_own(narrow: TinyModel, seed: int | None) -> None:
    """-1 is none, as in vLLM and llama.cpp."""
    engine = make_engine(narrow.folder, tree="off")
    outputs = run_all(engine, [Request(f"r{i}", (5, 6), seeded(20, seed=seed)) for i in range(6)])
    assert len({tuple(tokens) for tokens in outputs.values()}) == 6


def pair_counts(engine: Engine, draws: int) -> np.ndarray:
    """How often each pair of second and third output token is emitted after one prompt."""
    counts = np.zeros((12, 12))
    for start in range(0, draws, 32):
        requests = [
            Request(f"{start + i}", (1, 2, 3), SamplingParams(temperature=1.5, seed=start + i, max_tokens=5))
            for i in range(32)
        ]
        for tokens in run_all(engine, requests).values():
            counts[tokens[1], tokens[2]] += 1
    return counts


def model_pairs(model: TinyModel) -> np.ndarray:
    """The model's own distribution of output tokens two and three at temperature 1.5."""

    def following(prompt: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model.reference(torch.tensor([prompt])).logits[0, -1].double()
        return (logits / 1.5).softmax(-1).numpy()

    pairs = np.zeros((12, 12))
    first = following([1, 2, 3])
    for a in range(12):
        second = following([1, 2, 3, a])
        for b in range(12):
            pairs[b] += first[a] * second[b] * following([1, 2, 3, a, b])
    return pairs


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    wanted = expected.flatten() * counts.sum()
    common = wanted >= 5
    observed = np.append(counts.flatten()[common], counts.flatten()[~common].sum())
    return float(stats.chisquare(observed, np.append(wanted[common], wanted[~common].sum())).pvalue)


def test_exact_acceptance_keeps_the_models_distribution(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=16, heads=str(narrow.heads), max_num_seqs=32)
    counts = pair_counts(engine, 1600)
    assert engine.stats.acceptance_length > 1.2, "the tree is to have a say in the draws"
    assert p_value(counts, model_pairs(narrow)) > 1e-3


def test_the_distribution_test_can_fail(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes the first child whatever was drawn, as greedy drafting without a check would."""
    import engine.runner as module

    def gullible(tokens, targets, topology):
        found = accept(tokens, targets, topology)
        if tokens.shape[1] > 1:
            nothing = (found.length == 0) & topology.valid[:, 1]
            found = replace(found, tokens=torch.where(nothing[:, None], tokens[:, 1:2], found.tokens))
        return found

    accept = module.accept
    monkeypatch.setattr(module, "accept", gullible)
    engine = make_engine(narrow.folder, tree=16, heads=str(narrow.heads), max_num_seqs=32)
    assert p_value(pair_counts(engine, 640), model_pairs(narrow)) < 1e-6


def test_stop_ids_end_the_output_inside_an_accepted_run(narrow: TinyModel) -> None:
    prompt = [1, 2, 3]
    reference = greedy_reference(narrow.reference, prompt, 30)
    engine = make_engine(narrow.folder, tree=64, heads=str(narrow.heads))
    for stop in sorted(set(reference)):
        end = reference.index(stop) + 1
        engine.add(greedy("r", prompt, 30, stop_token_ids=(stop,)))
        tokens, last = [], None
        while engine.has_work:
            for last in engine.step():
                tokens += last.token_ids
        assert tokens == reference[:end]
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, stop)
    engine.check()


def test_eos_stops_unless_ignored(narrow: TinyModel, tmp_path) -> None:
    from tests.support import save_model, tiny_llama

    prompt = [1, 2, 3]
    reference = greedy_reference(narrow.reference, prompt, 20)
    model = tiny_llama(vocab_size=12, eos_token_id=[reference[4], 11])
    engine = make_engine(save_model(model, tmp_path), tree="off")
    end = reference.index(reference[4]) + 1
    assert run_all(engine, [greedy("r", prompt, 20)])["r", 0] == reference[:end]
    assert run_all(engine, [greedy("r", prompt, 20, ignore_eos=True)])["r", 0] == reference


@pytest.mark.parametrize("tree", ["off", 33])
def test_output_ends_exactly_at_the_context_limit(narrow: TinyModel, tree) -> None:
    engine = make_engine(narrow.folder, **with_heads(narrow, {"tree": tree}), max_model_len=40)
    prompt = [1, 2, 3, 4, 5]
    request = Request("r", tuple(prompt), SamplingParams(temperature=0))
    assert run_all(engine, [request])["r", 0] == greedy_reference(narrow.reference, prompt, 35)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_few_tokens_are_few(narrow: TinyModel, max_tokens: int) -> None:
    engine = make_engine(narrow.folder, tree=64, heads=str(narrow.heads))
    assert len(run_all(engine, [greedy("r", [1, 2, 3], max_tokens)])["r", 0]) == max_tokens
    assert engine.stats.generation_tokens == max_tokens


def test_requests_that_cannot_run_are_refused(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, max_model_len=32)
    with pytest.raises(RequestError, match="no tokens"):
        engine.info.check(greedy("r", [], 1))
    with pytest.raises(RequestError, match="token ids"):
        engine.info.check(greedy("r", [61], 1))
    with pytest.raises(ContextLengthError, match="holds 32"):
        engine.info.check(greedy("r", [1] * 30, 3))
    with pytest.raises(ContextLengthError):
        engine.info.check(Request("r", (1,) * 32))
    engine.info.check(greedy("r", [1] * 30, 2))


def test_abort_frees_everything_at_once(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, max_num_seqs=2)
    for i in range(4):
        engine.add(Request(f"r{i}", (1, 2, 3), SamplingParams(max_tokens=50, n=2)))
    for _ in range(3):
        engine.step()
    for i in range(4):
        assert [delta.finish_reason for delta in engine.abort(f"r{i}")] == [FinishReason.ABORT] * 2
    assert engine.abort("r0") == []
    assert not engine.has_work
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    engine.check()


def test_one_choice_can_be_aborted(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    engine.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=10, n=3)))
    engine.step()
    assert [delta.index for delta in engine.abort("r", 1)] == [1]
    ended = []
    while engine.has_work:  # launched ahead, a step goes without who may have ended in the one before
        ended += [delta.index for delta in engine.step() if delta.finish_reason]
    assert sorted(ended) == [0, 2]
    engine.check()


def test_a_failed_step_fails_its_own_requests_only(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny.folder, tree=8, heads=str(tiny.heads))
    engine.add(greedy("old", [1, 2, 3], 50))
    engine.step()
    computed = engine._runner._computed

    def broken(chunks):
        if any(chunk.sequence.request.request_id == "bad" for chunk in chunks):
            raise RuntimeError("out of luck")
        return computed(chunks)

    monkeypatch.setattr(engine._runner, "_computed", broken)
    engine.add(greedy("bad", [4], 5))
    engine.add(greedy("good", [4], 5))
    deltas = engine.step()
    failed = [d for d in deltas if d.finish_reason is FinishReason.ERROR]
    assert [d.request_id for d in failed] == ["bad"]
    assert "RuntimeError" in failed[0].error

    def broken_forward(batch, draft):
        raise RuntimeError("really")

    monkeypatch.setattr(engine._runner, "forward", broken_forward)
    assert {d.request_id for d in engine.step() if d.finish_reason is FinishReason.ERROR} == {"old", "good"}
    monkeypatch.undo()
    assert len(run_all(engine, [greedy("after", [4], 5)])["after", 0]) == 5


def test_a_trace_shows_the_step(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    engine.add(Request("r", (1, 2, 3), SamplingParams(temperature=0, max_tokens=20), trace=True))
    engine.add(greedy("other", [1, 2], 20))
    text: list[int] = []
    while engine.has_work:
        for delta in engine.step():
            assert (delta.trace is not None) == (delta.request_id == "r" and delta.num_steps == 1)
            if trace := delta.trace:
                assert 1 <= len(trace.tokens) == len(trace.parents) == len(trace.sources) <= 8
                assert trace.tokens[0] == text[-1]
                assert trace.sources[0] is DraftSource.ROOT
                path = trace.accepted
                assert path[0] == 0
                assert all(trace.parents[b] == a for a, b in pairwise(path))
                run = [*(trace.tokens[node] for node in path[1:]), trace.next_root]
                assert run[: len(delta.token_ids)] == delta.token_ids
            if delta.request_id == "r":
                text += delta.token_ids
    assert text == greedy_reference(narrow.reference, [1, 2, 3], 20)


def test_stats_add_up(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    outputs = run_all(engine, [greedy(f"r{i}", [i, 2, 3], 21) for i in range(5)])
    s = engine.stats
    assert s.generation_tokens == sum(map(len, outputs.values())) == 105
    assert s.prompt_tokens == 15
    assert s.num_drafts <= sum(s.acceptance_counts)  # the last step of an output may be plain
    assert 5 * s.num_drafts <= s.draft_tokens <= 7 * s.num_drafts  # a chain of two where something matches
    assert sum(s.accepted_by_source.values()) == s.accepted_tokens
    emitted = sum(n * c for n, c in enumerate(s.acceptance_counts))
    assert emitted == s.generation_tokens - 5
    # A step emits its accepted nodes and one draw more, unless max_tokens cut the draw off at the end.
    steps = sum(s.acceptance_counts)
    assert steps - 5 <= emitted - s.accepted_tokens <= steps


@pytest.mark.parametrize("settings", [{"tree": 8}, {"tree": 8, "lookup": "off"}, {"tree": "auto"}])
def test_stats_are_what_traces_show(narrow: TinyModel, settings: dict) -> None:
    engine = make_engine(narrow.folder, **with_heads(narrow, settings))
    texts = run_all(engine, [greedy("before", [4, 2, 3], 30)])
    before = copy.deepcopy(engine.stats)
    for i, prediction in enumerate([(), tuple(texts["before", 0]), ()]):
        sampling = SamplingParams(temperature=0, max_tokens=30)
        engine.add(Request(f"{i}", (4 + i // 2, 2, 3), sampling, trace=True, prediction_token_ids=prediction))
    for token in set(texts["before", 0]):  # each ends in the midst of whatever path it is on
        sampling = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(token,))
        known = tuple(texts["before", 0])
        engine.add(Request(f"until {token}", (4, 2, 3), sampling, trace=True, prediction_token_ids=known))
    drafted, accepted, trees, predicted = Counter[str](), Counter[tuple[str, int]](), 0, 0
    while engine.has_work:
        for delta in engine.step():
            if delta.trace is None:
                continue
            trees += len(delta.trace.tokens) > 1
            drafted.update(delta.trace.sources[1:])
            used = delta.trace.accepted[1 : 1 + len(delta.token_ids)]
            accepted.update((delta.trace.sources[node], depth) for depth, node in enumerate(used, start=1))
            predicted += delta.accepted_prediction_tokens
    after = engine.stats
    assert trees == after.num_drafts - before.num_drafts > 0
    for source in DRAFT_SOURCES:
        assert drafted[source] == after.drafted_by_source[source] - before.drafted_by_source[source]
        for depth, count in enumerate(after.accepted_at[source]):
            assert accepted[source, depth] == count - before.accepted_at[source][depth], (source, depth)
    assert predicted == sum(after.accepted_at["prediction"]) - sum(before.accepted_at["prediction"])
    assert sum(after.accepted_at["head"]) > sum(before.accepted_at["head"])
    assert (predicted > 0) == ("lookup" not in settings)


def test_values_that_are_not_finite_end_their_own_request_only(tiny: TinyModel) -> None:
    """A NaN in the cache spreads to whoever attends to it; it must not outlive its sequence."""
    for tree in ("off", 8):
        engine = make_engine(tiny.folder, **with_heads(tiny, {"tree": tree}))
        # As earlier owners of the slots leave it: "bad" will own block 1, and "good" reads as far as "bad".
        engine._runner._tables[:8].fill_(1)
        engine.add(greedy("bad", [1, 2, 3] * 8, 30))
        engine.add(greedy("good", [4, 5], 30))
        engine.step()
        bad = next(s for s in engine._scheduler.running if s.request.request_id == "bad")
        engine._runner._pool.data[:, :, bad.blocks[0], 0] = float("nan")
        deltas = [delta for _ in range(40) for delta in engine.step()]
        ends = {delta.request_id: delta for delta in deltas if delta.finish_reason is not None}
        assert ends["bad"].finish_reason is FinishReason.ERROR
        assert "not finite" in (ends["bad"].error or "")
        assert ends["good"].finish_reason is FinishReason.LENGTH
        assert engine._runner._pool.data.isfinite().all()
        asked = [greedy(f"r{i}", [i, 7], 20) for i in range(8)]
        outputs = run_all(engine, asked)
        for request in asked:
            prompt = list(request.prompt_token_ids)
            assert outputs[request.request_id, 0] == greedy_reference(tiny.reference, prompt, 20)


def test_a_lost_device_ends_the_engine_not_just_the_step(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    engine.add(greedy("r", [1], 5))

    def lost(chunk: object) -> None:
        raise torch.AcceleratorError("device-side assert triggered", 1)

    monkeypatch.setattr(engine._runner, "prefill", lost)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_prompt_tokens_are_counted_once_a_request(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, max_model_len=128, kv_cache_tokens=192)
    run_all(engine, [greedy(f"r{i}", [1] * 40, 60, n=2) for i in range(4)])
    assert engine.stats.preemptions > 0
    assert engine.stats.prompt_tokens == 160


def test_prompt_tokens_are_counted_though_the_first_choice_is_dropped(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, max_model_len=128)
    engine.add(greedy("r", [1] * 40, 5, n=2))
    engine.abort("r", 0)
    while engine.has_work:
        engine.step()
    assert engine.stats.prompt_tokens == 40
    engine.add(greedy("gone", [1] * 40, 5))
    engine.abort("gone")
    assert engine.stats.prompt_tokens == 40
    assert not engine._uncounted
