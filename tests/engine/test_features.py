"""What a request may ask of the engine, on tiny models, tree on against tree off and against transformers."""

from __future__ import annotations

import math

import pytest
import torch

from engine.engine import Engine
from engine.errors import RequestError
from engine.types import Acceptance, DraftSource, MedusaParams, Request, SamplingParams, TokenDelta
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference, make_engine, run_all

FEATURES = [
    {"presence_penalty": 1.2},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"logit_bias": ((3, 2.0), (5, -100.0))},
    {"stop_token_ids": (4, 7), "min_tokens": 12},
    {"bad_words": ((2, 3), (6,), (1, 1, 1))},
    {"logprobs": 3},
    {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": ((2, 1.0),),
        "min_tokens": 20,
        "bad_words": ((4, 4),),
        "logprobs": 2,
        "top_p": 0.95,
    },
]


def deltas_of(engine: Engine, *requests: Request) -> list[TokenDelta]:
    for request in requests:
        engine.info.check(request)
        engine.add(request)
    found: list[TokenDelta] = []
    while engine.has_work:
        found += engine.step()
    engine.check()
    return found


def engines(model: TinyModel) -> dict[str, Engine]:
    heads = str(model.heads)
    return {
        "off": make_engine(model.folder, tree="off"),
        "tree": make_engine(model.folder, tree=33, heads=heads),
        "auto": make_engine(model.folder, heads=heads),
        "chain": make_engine(model.folder, tree=9),
        "starved": make_engine(model.folder, tree=8, heads=heads, max_model_len=64, kv_cache_tokens=128),
        "chunks": make_engine(model.folder, tree=8, heads=heads, max_step_tokens=64),
    }


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_features_give_one_text_whatever_the_tree_and_the_batch(
    narrow: TinyModel, temperature: float
) -> None:
    requests = [
        Request(
            f"r{i}",
            tuple((7 * i + j) % 12 for j in range(4 + 2 * i)),
            SamplingParams(temperature=temperature, seed=i, max_tokens=30, **feature),
        )
        for i, feature in enumerate(FEATURES)
    ]
    plain = make_engine(narrow.folder, tree="off")
    alone = {key: tokens for request in requests for key, tokens in run_all(plain, [request]).items()}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(FEATURES)
    for name, engine in engines(narrow).items():
        assert run_all(engine, requests, arrive_every=1) == alone, name
        if name == "starved":
            assert engine.stats.preemptions > 0
        if name in ("tree", "chain"):
            assert engine.stats.accepted_tokens > 15


def test_forbidden_and_forced_tokens(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=33, heads=str(narrow.heads))
    prompt = [1, 2, 3]
    free = greedy_reference(narrow.reference, prompt, 24)
    banned = free[3]
    outputs = run_all(
        engine,
        [
            greedy("bias", prompt, 24, logit_bias=((9, 100.0),)),
            greedy("ban", prompt, 24, logit_bias=((banned, -100.0),)),
            greedy("word", prompt, 24, bad_words=(tuple(free[1:3]),)),
            greedy("stop", prompt, 24, stop_token_ids=(free[2],), min_tokens=10),
            greedy("free", prompt, 24),
        ],
    )
    assert outputs["bias", 0] == [9] * 24
    assert banned not in outputs["ban", 0]
    assert list(zip(outputs["word", 0], outputs["word", 0][1:], strict=False)).count(tuple(free[1:3])) == 0
    assert free[2] not in outputs["stop", 0][:10]
    assert len(outputs["stop", 0]) > 10
    assert outputs["free", 0] == free


@torch.inference_mode()
def raw_logprobs(model: TinyModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab]: row i is about token i + 1."""
    return model.reference(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    "settings", [{"tree": "off"}, {"tree": 33}, {"tree": 8, "max_step_tokens": 64}], ids=str
)
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "presence_penalty": 1.5}], ids=str
)
def test_logprobs_are_transformers_raw_ones(narrow: TinyModel, settings: dict, sampling: dict) -> None:
    heads = {} if settings["tree"] == "off" else {"heads": str(narrow.heads)}
    engine = make_engine(narrow.folder, **settings, **heads)
    prompt = tuple((3 * i) % 12 for i in range(80))
    params = SamplingParams(max_tokens=30, seed=1, logprobs=4, prompt_logprobs=2, **sampling)
    others = [Request(f"o{i}", (i, 1), SamplingParams(max_tokens=30, seed=i)) for i in range(3)]
    found = [d for d in deltas_of(engine, *others, Request("r", prompt, params)) if d.request_id == "r"]
    output = [token for delta in found for token in delta.token_ids]
    entries = [entry for delta in found for entry in delta.logprobs or []]
    expected = raw_logprobs(narrow, [*prompt, *output])
    assert [entry.token_id for entry in entries] == output
    prompt_entries = found[0].prompt_logprobs
    assert prompt_entries is not None
    assert prompt_entries[0] is None
    assert len(prompt_entries) == len(prompt)
    assert all(delta.prompt_logprobs is None for delta in found[1:])
    for position, entry in enumerate([*prompt_entries, *entries]):
        if entry is None:
            continue
        row = expected[position - 1]
        assert entry.token_id == [*prompt, *output][position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        best = row.topk(len(entry.top))
        assert len(entry.top) == (2 if position < len(prompt) else 4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_end_where_the_output_does(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=64, heads=str(narrow.heads))
    reference = greedy_reference(narrow.reference, [1, 2, 3], 30)
    stop = reference[9]
    end = reference.index(stop) + 1
    found = deltas_of(engine, greedy("r", [1, 2, 3], 30, stop_token_ids=(stop,), logprobs=0))
    entries = [entry for delta in found for entry in delta.logprobs or []]
    assert [entry.token_id for entry in entries] == reference[:end]
    assert all(entry.top == () for entry in entries)


def test_choices_share_one_prefill(narrow: TinyModel) -> None:
    prompt = tuple((5 * i) % 12 for i in range(83))
    for caching in (True, False):
        engine = make_engine(narrow.folder, tree="off", prefix_caching=caching)
        prefill = engine._runner.prefill
        computed: list[int] = []

        def counted(chunks, prefill=prefill, computed=computed):
            computed.extend(chunk.end - chunk.start for chunk in chunks)
            return prefill(chunks)

        engine._runner.prefill = engine._runner.launch = counted  # type: ignore[method-assign]
        request = Request("r", prompt, SamplingParams(temperature=0.8, seed=5, max_tokens=12, n=4))
        together = run_all(engine, [request])
        assert computed == [83, 3, 3, 3]  # blocks of 4: 80 tokens are shared
        plain = make_engine(narrow.folder, tree="off", max_num_seqs=1)
        assert together == run_all(plain, [request])


def test_a_prefix_is_reused_within_its_salt_only(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    prompt = [(5 * i) % 12 for i in range(41)]

    def cached(name: str, salt: str | None, tokens: list[int]) -> int:
        request = Request(name, tuple(tokens), SamplingParams(temperature=0, max_tokens=9), cache_salt=salt)
        first = deltas_of(engine, request)
        text = [token for delta in first for token in delta.token_ids]
        assert text == greedy_reference(narrow.reference, tokens, 9)
        return first[0].cached_tokens

    assert cached("a", None, prompt) == 0
    assert cached("b", None, prompt) == 40
    assert cached("c", "secret", prompt) == 0
    assert cached("d", "secret", prompt) == 40
    assert cached("e", "other", prompt) == 0
    assert cached("f", None, [*prompt[:22], 0, 0, 0]) == 20
    # An answer is reused as well: the next turn of a conversation begins with it.
    assert cached("g", None, [*prompt, *greedy_reference(narrow.reference, prompt, 9), 3]) == 48
    assert engine.stats.prefix_hit_tokens == 40 + 40 + 20 + 48


def test_a_prediction_is_followed_and_changes_nothing(narrow: TinyModel) -> None:
    prompt = [1, 2, 3, 4]
    reference = greedy_reference(narrow.reference, prompt, 60)
    for settings in ({"tree": 9}, {}, {"tree": 24, "heads": str(narrow.heads)}):
        engine = make_engine(narrow.folder, **settings)
        edited = [*reference[:20], *reference[23:]]
        steps, accepted = {}, {}
        for name, expected in (("none", ()), ("good", reference), ("edited", edited), ("wrong", [9] * 60)):
            request = Request(
                name,
                tuple(prompt),
                SamplingParams(temperature=0, max_tokens=60),
                prediction_token_ids=tuple(expected),
            )
            found = deltas_of(engine, request)
            assert [token for delta in found for token in delta.token_ids] == reference
            steps[name] = sum(delta.num_steps for delta in found)
            accepted[name] = sum(delta.accepted_prediction_tokens for delta in found)
        if settings:
            assert steps["good"] < steps["edited"] < steps["none"]
            assert steps["good"] <= 12
            assert accepted["good"] > 40
        assert accepted["none"] == 0
        assert engine.stats.accepted_by_source["prediction"] == sum(accepted.values())


def test_typical_takes_more_and_greedy_stays_exact(certain: TinyModel) -> None:
    heads = {"heads": str(certain.heads), "tree_file": str(certain.tree_file)}
    engine = make_engine(certain.folder, tree=64, lookup="off", **heads)

    def run(**medusa: object) -> tuple[list[int], float]:
        before = list(engine.stats.acceptance_counts)
        request = Request(
            "r",
            (1, 2, 3),
            SamplingParams(temperature=1.0, seed=3, max_tokens=200),
            medusa=MedusaParams(**medusa),
        )
        tokens = run_all(engine, [request])["r", 0]
        counts = [a - b for a, b in zip(engine.stats.acceptance_counts, before, strict=True)]
        return tokens, sum(n * c for n, c in enumerate(counts)) / sum(counts)

    exact, exact_length = run()
    loose, loose_length = run(acceptance=Acceptance.TYPICAL, epsilon=0.0, delta=0.0)
    typical, typical_length = run(acceptance=Acceptance.TYPICAL)
    never, never_length = run(acceptance=Acceptance.TYPICAL, epsilon=1.0, delta=1e9)
    assert loose_length == pytest.approx(4.0, abs=0.1)  # all of the four tokens at all of three depths
    assert never_length == pytest.approx(1.0, abs=0.02)
    assert typical_length > 1.2
    assert len(exact) == len(loose) == len(typical) == len(never) == 200
    assert exact_length > 1
    request = Request(
        "g",
        (1, 2, 3),
        SamplingParams(temperature=0, max_tokens=30),
        medusa=MedusaParams(acceptance=Acceptance.TYPICAL, epsilon=0.0, delta=0.0),
    )
    assert run_all(engine, [request])["g", 0] == greedy_reference(certain.reference, [1, 2, 3], 30)


def test_a_request_caps_its_own_tree(certain: TinyModel) -> None:
    engine = make_engine(certain.folder, tree=64, heads=str(certain.heads), tree_file=str(certain.tree_file))
    requests = [
        Request(
            f"r{cap}",
            (1, 2, 3),
            SamplingParams(temperature=0, max_tokens=30),
            trace=True,
            medusa=MedusaParams(max_tree_size=cap),
        )
        for cap in (None, 1, 6, 30)
    ]
    found = deltas_of(engine, *requests)
    reference = greedy_reference(certain.reference, [1, 2, 3], 30)
    for request in requests:
        mine = [delta for delta in found if delta.request_id == request.request_id]
        assert [token for delta in mine for token in delta.token_ids] == reference
        sizes = [len(delta.trace.tokens) for delta in mine if delta.trace is not None]
        cap = request.medusa.max_tree_size
        assert max(sizes) == (cap or 64)
        sources = {source for delta in mine if delta.trace for source in delta.trace.sources}
        assert (DraftSource.HEAD in sources) == (cap != 1)


def test_logprobs_of_a_single_possible_token_are_finite(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=9)
    found = deltas_of(engine, greedy("r", [1], 10, logit_bias=((4, 100.0),), logprobs=1))
    entries = [entry for delta in found for entry in delta.logprobs or []]
    assert all(
        entry.token_id == 4 and math.isfinite(entry.logprob) and entry.logprob < 0 for entry in entries
    )


@pytest.mark.parametrize(
    ("sampling", "medusa", "param"),
    [
        ({"repetition_penalty": 1e39}, {}, "repetition_penalty"),
        ({"repetition_penalty": 1e-46}, {}, "repetition_penalty"),
        ({}, {"delta": 1e39}, "medusa.delta"),
        ({"min_tokens": 10**30}, {}, "min_tokens"),
        ({"min_tokens": 510}, {}, "min_tokens"),
    ],
)
def test_numbers_that_no_tensor_or_context_holds_are_refused(
    narrow: TinyModel, sampling: dict, medusa: dict, param: str
) -> None:
    engine = make_engine(narrow.folder, tree="off")
    with pytest.raises(RequestError) as refused:
        engine.info.check(Request("r", (1, 2, 3), SamplingParams(**sampling), medusa=MedusaParams(**medusa)))
    assert refused.value.param == param
    extreme = SamplingParams(temperature=1.0, repetition_penalty=3e38, max_tokens=5, min_tokens=5)
    typical = MedusaParams(acceptance=Acceptance.TYPICAL, delta=3e38)
    assert len(run_all(engine, [Request("r", (1, 2, 3), extreme, medusa=typical)])["r", 0]) == 5
