"""Steps whose small work is Triton kernels beside the same steps in torch's operators, state by state."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from engine import greedy_triton, sampler_triton, step_triton
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.cuda_graphs import _Recorder
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import load
from engine.medusa.buckets import Buckets
from engine.medusa.lookup import Lookup
from engine.model.decoder import Decoder
from engine.sampling_slots import SamplingSlots
from engine.step_triton import Carried, Draws, Nodes
from engine.types import Acceptance, MedusaParams, Request, SamplingParams, Sequence, TokenDelta
from tests.engine.conftest import TinyModel, compiles
from tests.support import run_all

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.cuda


class Rerun:
    """A graph that runs its code again: Triton's interpreter cannot be recorded."""

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run
        run()

    def replay(self) -> None:
        self._run()


def engine_for(folder: Any, *, kernels: bool, **settings: Any) -> Engine:
    values = {"max_num_seqs": 4, "block_size": 4, "device": DEVICE, "attention": "sdpa"}
    values |= {"dtype": "float32", "kv_cache_tokens": 2048, "max_model_len": 256}
    loaded = load(EngineConfig(model=str(folder), **(values | settings)), progress=False)
    size = loaded.info.tree_size
    buckets = Buckets((1, 4), tuple(sorted({1, min(6, size), size})), loaded.max_step_tokens)
    engine = Engine(replace(loaded, kernels=kernels), ahead=False, graph=Rerun, buckets=buckets)
    assert type(engine._runner) is (TritonRunner if kernels else CapturedRunner)
    return engine


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """All that a step leaves behind, but for the slot and the block that nobody owns."""
    runner = engine._runner
    sampling, lookup = runner._sampling, runner._lookup
    found = {
        "root": runner._root,
        "hidden": runner._hidden,
        "lengths": runner._lengths,
        "position": sampling.position,
        "in_output": sampling.penalties.in_output * sampling.penalties.uses.unsqueeze(1),
        "tail": sampling.bad_words.tail * sampling.bad_words.uses.unsqueeze(1),
    }
    if lookup is not None:
        found["history"] = lookup.history
    found = {name: value[:-1] for name, value in found.items()}
    return found | {"pool": runner._pool.data[:, :, 1:]}


def timeless(deltas: list[TokenDelta]) -> list[TokenDelta]:
    traces = [delta.trace and replace(delta.trace, duration_s=0.0) for delta in deltas]
    return [
        replace(delta, time_s=0.0, queue_s=0.0, trace=trace)
        for delta, trace in zip(deltas, traces, strict=True)
    ]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' loops go round more than once."""
    monkeypatch.setattr(sampler_triton, "_BLOCK", 8)
    monkeypatch.setattr(step_triton, "_PLACES", 16)
    monkeypatch.setattr(greedy_triton, "_BLOCK", 4)


def run_kernels(model: TinyModel, settings: dict, requests: list[Request]) -> tuple[int, set[str]]:
    """Engines with kernels and without take the same requests, one a step.

    Returns:
        How many steps they took, and what proposed the tokens that they accepted.
    """
    if settings["tree"] != "off":
        settings = {"heads": str(model.heads)} | settings
    first, second = (engine_for(model.folder, kernels=kernels, **settings) for kernels in (False, True))
    pending, steps = list(requests), 0
    while pending or first.has_work:
        if pending:
            request = pending.pop(0)
            first.add(request)
            second.add(request)
        wanted, found = (timeless(engine.step()) for engine in (first, second))
        assert found == wanted
        states = state(second)
        for name, value in state(first).items():
            assert torch.equal(value, states[name]), name
        # Who fills a batch up begins anew each step.
        runner = second._runner
        assert not any(tensor[-1].any() for tensor in (runner._lengths, runner._root, runner._hidden))
        steps += 1
    assert not second.has_work
    return steps, {source for source, count in first.stats.accepted_by_source.items() if count}


MIXED = [
    SamplingParams(temperature=0.0, max_tokens=9),
    SamplingParams(temperature=0.9, max_tokens=8, seed=1, logprobs=2),
    SamplingParams(
        temperature=1.1, top_p=0.9, top_k=9, min_p=0.02, presence_penalty=0.6, frequency_penalty=0.4,
        repetition_penalty=1.2, max_tokens=8, seed=2,
    ),
    SamplingParams(
        temperature=0.0, bad_words=((3,), (1, 2), (5, 4)), logit_bias=((7, 2.0), (2, 1.5)), max_tokens=9,
        min_tokens=6,
    ),
]  # fmt: skip


def requests_for(samplings: list[SamplingParams], **values: Any) -> list[Request]:
    """Four prompts that repeat their beginnings, in turn with these parameters."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(12, (length,), generator=generator).tolist() for length in (3, 9, 17, 6)]
    return [
        Request(str(number), (*prompt, *prompt[:4]), samplings[number % len(samplings)], trace=True, **values)
        for number, prompt in enumerate(prompts)
    ]


OFF: dict[str, Any] = {"tree": "off"}
HEADS: dict[str, Any] = {"tree": 13, "lookup": "off"}
CHAIN: dict[str, Any] = {"tree": 6, "lookup": 5, "heads": None}
BOTH: dict[str, Any] = {"tree": 33, "lookup": 6}
HALF: dict[str, Any] = {"dtype": "bfloat16"}
TYPICAL = MedusaParams(Acceptance.TYPICAL, 0.05, 0.2)


@pytest.mark.parametrize(
    ("settings", "samplings", "values", "accepted"),
    [
        pytest.param(OFF, MIXED, {}, set(), id="off-mixed"),
        pytest.param(HEADS, MIXED[:1], {}, {"head"}, id="heads-greedy"),
        pytest.param(
            HEADS | HALF,
            MIXED[:1],
            {},
            {"head"},
            id="heads-greedy-bfloat16",
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="the next has it all but for the search"),
        ),
        pytest.param(HEADS | HALF, MIXED, {"medusa": TYPICAL}, {"head"}, id="heads-typical-bfloat16"),
        pytest.param(HEADS, MIXED[1:3], {"medusa": TYPICAL}, {"head"}, id="heads-typical"),
        pytest.param(CHAIN, MIXED[1:], {}, {"lookup"}, id="chain-mixed"),
        pytest.param(BOTH, MIXED[:1], {}, {"head", "lookup"}, id="both-greedy"),
        pytest.param(BOTH, MIXED, {"medusa": TYPICAL}, {"head", "lookup"}, id="both-typical"),
    ],
)
def test_a_step_leaves_behind_what_torchs_operators_do(
    narrow: TinyModel, settings: dict, samplings: list, values: dict, accepted: set, blocks: None
) -> None:
    steps, by_source = run_kernels(narrow, settings, requests_for(samplings, **values))
    assert steps > 5
    assert by_source >= accepted


def test_predictions_are_followed(narrow: TinyModel, blocks: None) -> None:
    """The answers themselves are expected, but for one token; half of the requests are sampled."""
    requests = requests_for(MIXED[:2])
    engine = engine_for(narrow.folder, kernels=False, tree="off")
    outputs = run_all(engine, requests)
    expected = [outputs[request.request_id, 0] for request in requests]
    requests = [
        replace(request, prediction_token_ids=(*output[:4], 11, *output[5:]))
        for request, output in zip(requests, expected, strict=True)
    ]
    _, by_source = run_kernels(narrow, BOTH, requests)
    assert "prediction" in by_source


@pytest.mark.parametrize("seed", range(6 if DEVICE == "cuda" else 3))
def test_the_search_is_lookups(seed: int, blocks: None) -> None:
    """Histories and predictions of three tokens, in which nearly everything has been said before."""
    rng = random.Random(seed)
    slots, size, longest, device = 6, 5, 90, torch.device(DEVICE)

    def said(most: int) -> list[int]:
        return [rng.randrange(3) for _ in range(rng.randint(1, most))]

    found, wanted = (
        Lookup(size=size, max_num_seqs=slots + 1, max_tokens=longest, device=device) for _ in range(2)
    )
    for lookup in (found, wanted):
        lookup.allocate_predictions()
    lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)
    for slot in range(slots):
        prompt, expected = said(30), said(40) if rng.random() < 0.7 else []
        request = Request("r", tuple(prompt), prediction_token_ids=tuple(expected))
        each = Sequence(request, 0, 0, [*prompt, *said(30)], len(prompt), longest, 0, slot=slot)
        lengths[slot] = len(each.token_ids) - 1
        for lookup in (found, wanted):
            lookup.admit([each])

    def ids(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    sampling = SamplingSlots(max_num_seqs=slots + 1, vocab_size=3, eos_token_ids=(), device=device)
    sampling.allocate()
    hidden = torch.zeros(slots + 1, 4, device=device)
    carried = Carried(zeros(slots + 1), hidden, lengths, zeros(slots + 1, 9), slots)
    order, grid = torch.randperm(slots).to(device), zeros(5, slots, 1)
    grid[3:] = 1
    inputs = torch.cat((order, grid.flatten()))
    nodes = Nodes(*(zeros(slots) for _ in range(5)), zeros(slots, 9), slots, 1, 0)
    for _ in range(4):
        drawn = ids(*(rng.randrange(3) for _ in range(slots)))
        packed, one = zeros(slots, 7 + size), torch.ones_like(drawn)
        right = wanted.advance(
            order,
            lengths[order],
            drawn.unsqueeze(1),
            one,
            max_length=longest - 1,
            predicted=dict.fromkeys(range(slots), wanted.longest_prediction),
        )
        draws = Draws(drawn, one, torch.zeros(slots, device=device))
        states = torch.zeros(slots, 4, device=device)
        step_triton.accept(
            inputs, nodes, draws, states, carried, sampling, found, path=zeros(slots), packed=packed
        )
        assert packed[:, 4].tolist() == drawn.tolist()
        assert packed[:, 5].tolist() == right.kind.tolist()
        assert packed[:, 6].tolist() == right.count.tolist()
        for row, count in enumerate(right.count.tolist()):
            assert packed[row, 7 : 7 + count].tolist() == right.tokens[row, :count].tolist()
            assert found.tokens[order[row], :count].tolist() == right.tokens[row, :count].tolist()
        assert torch.equal(found.history, wanted.history)


@pytest.mark.parametrize("anything", [False, True])
def test_so_few_kernels_are_a_step_without_its_model(
    narrow: TinyModel, anything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes microseconds in a graph, as much as a layer of a small model."""
    engine = engine_for(narrow.folder, kernels=True, tree=13, heads=str(narrow.heads))
    runner = engine._runner
    assert isinstance(runner, TritonRunner)
    bucket = runner._bucket(4, 13)
    launched: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **constants: launched.append(self.name)

    for name in ("prepare", "accept", "move"):
        monkeypatch.setattr(step_triton, f"_{name}_kernel", Noted(name))
    monkeypatch.setattr(sampler_triton, "_draw_kernel", Noted("draw"))
    monkeypatch.setattr(greedy_triton, "_greedy_kernel", Noted("greedy"))
    hidden, logits = runner._states[: 4 * 13].clone(), runner._logits[: 4 * 13].clone()
    monkeypatch.setattr(SdpaAttention, "plan", lambda *args: None)
    monkeypatch.setattr(Decoder, "forward", lambda *args: hidden)
    monkeypatch.setattr(Decoder, "logits", lambda *args: logits)
    views = {"alias", "expand", "select", "slice", "split", "unbind", "unsqueeze", "view"}
    with torch.inference_mode(), _Recorder() as recorder:
        runner._draft_forward(bucket, heads=False)
        runner._targets_accept_compact(bucket, anything)
    operators = [call.operator.overloadpacket.__name__ for call in recorder.calls]
    assert set(operators) <= views
    assert launched == ["prepare", "draw" if anything else "greedy", "accept", "move"]


@compiles
def test_all_compile_for_hopper() -> None:
    """The draws hold many numbers for each sequence, of which some wait in memory; the others do not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.compile_step", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["90"]
    spilled = {name: max(form["spilled"] for form in forms) for name, forms in found.items()}
    names = ("draw", "greedy", "prepare", "accept", "move", "best", "choose", "merge", "walk", "add_silu")
    assert spilled.keys() == {f"_{name}_kernel" for name in names}
    assert spilled.pop("_draw_kernel") <= 512
    assert all(size <= 32 for size in spilled.values())
