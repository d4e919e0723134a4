"""Code for a GPU on a device that is the CPU: what mixes devices, or waits in a captured step, fails here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.medusa.bigram import BigramTable
from tests.engine.model.mxfp4_files import published
from tests.fake_cuda import environment
from tests.support import save_model, save_random_heads, tiny_llama, tiny_model

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "fake_cuda"


def run(*arguments: str, mode: str = "torch") -> str:
    """What a process says that has the device."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(mode), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


ONE_BY_ONE = """
import contextlib, io, json, sys, traceback

told = {}
for name, (code, arguments) in json.load(sys.stdin).items():
    sys.argv, said = ["-c", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        told[name] = "failed", said.getvalue() + traceback.format_exc()
    else:
        told[name] = "ended", said.getvalue()
print(json.dumps(told))
"""


def run_all(mode: str, scripts: dict[str, tuple[str, list[str]]]) -> dict[str, tuple[str, str]]:
    """For each of some scripts with arguments, whether one process that has the device has come to its end,
    and what it said; to start a process takes as long as most of them do."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        cwd=ROOT,
        env=environment(mode),
        input=json.dumps(scripts),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told: dict[str, tuple[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return told


def said(told: dict[str, tuple[str, str]], name: str) -> str:
    """What one of them said, which has not failed."""
    end, text = told[name]
    assert end == "ended", text[-4000:]
    return text


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = made(tmp_path_factory.mktemp("torch"))
    return run_all(
        "torch", {"rules": (RULES, []), "buffers": (BUFFERS, []), "decoded": (DECODED, paths(folder))}
    )


@pytest.fixture(scope="module")
def in_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """On Triton's interpreter."""
    folder = made(tmp_path_factory.mktemp("kernels"))
    # In this order: the last one captures no passes over prompts.
    scripts = {"ahead": (AHEAD, paths(folder)), "behind": (BEHIND, paths(folder / "bigram"))}
    scripts |= {
        name: ((FAKE / f"{script}.py").read_text(), [str(folder / name)])
        for name, script in (("experts", "experts"), ("mxfp4", "experts"), ("sinks", "sinks"))
    }
    return run_all("interpret", scripts)


def made(folder: Path) -> Path:
    """A tiny model and heads; in `bigram`, the same with a table of which token follows which."""
    model = tiny_llama(vocab_size=64)
    hidden, inside = model.config.hidden_size, folder / "bigram"
    pairs = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(2))[:2000].int()
    experts = {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 3,
        "topk_group": 2,
    }
    save_model(tiny_model("glm4_moe", num_hidden_layers=3, **experts), folder / "experts")
    published(folder / "mxfp4", num_local_experts=4, num_experts_per_tok=2, sliding_window=6)
    sinking, generator = tiny_llama(vocab_size=64), torch.Generator().manual_seed(3)
    for layer in sinking.model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.randn(4, generator=generator) * 2 + 1)
    save_model(sinking, folder / "sinks")
    for place in (folder, inside):
        save_model(model, place / "tiny")
        save_random_heads(place / "heads.safetensors", hidden=hidden, vocab=64, own_lm_head=place == inside)
    BigramTable(pairs // 64, pairs % 64, pairs / 4096, torch.ones(4)).save(inside, vocab_size=64)
    return folder


def paths(folder: Path) -> list[str]:
    return [str(folder / "tiny"), str(folder / "heads.safetensors")]


RULES = """
import torch

x = torch.arange(4).to("cuda")
assert (x.device, x.is_cuda, (x + 1).device) == (torch.device("cuda", 0), True, x.device)
assert torch.zeros(2, device="cuda").device == x[1:].device == torch.empty_like(x).device == x.device
assert x.cpu().device.type == x.to("cpu").device.type == torch.zeros(2).device.type == "cpu"
x[1:3] = 7
assert x.tolist() == [0, 7, 7, 3]
generator = torch.Generator("cuda").manual_seed(1)
assert torch.randperm(5, generator=generator, device="cuda").sum().item() == 10
layer = torch.nn.Linear(3, 3).to("cuda")
layer(torch.ones(2, 3, device="cuda")).sum().backward()
assert layer.weight.grad.tolist() == [[2.0] * 3] * 3


def refused(work, error, graph=None):
    try:
        if graph is None:
            work()
        else:
            with torch.cuda.graph(graph):
                work()
    except error:
        return
    raise AssertionError(f"{work} is allowed")


refused(lambda: x + torch.ones(4), RuntimeError)
refused(lambda: torch.cat((x, torch.ones(4))), RuntimeError)
refused(lambda: torch.ones(4).copy_(x).add_(x), RuntimeError)
refused(lambda: torch.arange(4)[x], RuntimeError)
refused(x.numpy, TypeError)
refused(x.pin_memory, RuntimeError)
refused(lambda: torch.randperm(5, generator=torch.Generator(), device="cuda"), RuntimeError)
refused(lambda: torch.randperm(5, generator=generator), RuntimeError)
assert (x[torch.tensor([1])] + 1).tolist() == [8], "indices of the CPU are moved"

graph, made = torch.cuda.CUDAGraph(), []
with torch.cuda.graph(graph):
    made.append(x * 2 + torch.arange(4, device="cuda"))
x.fill_(5)
graph.replay()
assert made[0].tolist() == [10, 11, 12, 13]
for waits in (lambda: x.sum().item(), x.tolist, x.cpu, lambda: x.nonzero(), lambda: bool(x[0])):
    refused(waits, RuntimeError, graph)
refused(lambda: x[x > 3], RuntimeError, graph)
refused(lambda: x + torch.tensor([1, 2, 3, 4], device="cuda"), RuntimeError, graph)
refused(lambda: x.copy_(torch.ones(4)), RuntimeError, graph)
refused(torch.cuda.synchronize, RuntimeError, graph)
refused(lambda: torch.ones(1).pin_memory(), RuntimeError, graph)

# What a graph has made lies where the next one may write, unless somebody holds it.
graph, held, out = torch.cuda.CUDAGraph(), [], torch.zeros(2, device="cuda")
with torch.cuda.graph(graph):
    between = x[:2] * 2
    out.copy_(between + 1)
    held.append(between[1:])
graph.replay()
assert held[0].tolist() == [10]
del between, held[:]
graph.replay()
assert out.tolist() == [11, 11]
assert all(memory.tolist() not in ([10, 10], [11, 11]) for memory in graph.recorder._gone)
x = None
refused(graph.replay, RuntimeError)

# The host knows what it has waited for.
first, second, untimed, never = (torch.cuda.Event(enable_timing=i != 2) for i in range(4))
first.record()
second.record()
refused(lambda: first.elapsed_time(second), ValueError)
first.synchronize()
assert (first.query(), second.query()) == (True, False)
refused(lambda: first.elapsed_time(second), ValueError)
second.synchronize()
assert first.elapsed_time(second) >= 0
untimed.record()
never.synchronize()
torch.cuda.synchronize()
refused(lambda: first.elapsed_time(untimed), ValueError)
refused(lambda: first.elapsed_time(never), ValueError)

y, pinned = torch.ones(3, device="cuda"), torch.zeros(3, pin_memory=True)
assert pinned.is_pinned() and pinned[1:].is_pinned() and not torch.zeros(3).is_pinned()
assert pinned.pin_memory() is pinned and torch.zeros(3).pin_memory().is_pinned()
refused(lambda: torch.zeros(3).copy_(y, non_blocking=True), RuntimeError)
refused(lambda: torch.zeros(3).to("cuda", non_blocking=True), RuntimeError)
pinned.copy_(y, non_blocking=True)
y.zero_()
assert pinned.isnan().all()
first.record()
assert pinned.isnan().all()
first.synchronize()
assert pinned.tolist() == [1, 1, 1], "what was there when the copy was told of"
y.copy_(pinned, non_blocking=True)
second.record()
pinned[0] = 5
refused(second.synchronize, RuntimeError)
y.copy_(pinned, non_blocking=True)
torch.cuda.synchronize()
pinned[0] = 6
assert y.tolist() == [5, 1, 1]
print("held")
"""

BUFFERS = """
import torch

from engine.host_buffers import Inputs, Landing
from engine.step_results import Results

device = torch.device("cuda")
inputs = Inputs(2, device)
for value in range(5):
    inputs.fill([value, 7])
assert inputs.tensor.tolist() == [4, 7]  # which waits, and so finds memory that was written to too early

packed = torch.tensor([[1, 0, 0, 1, 5], [1, 0, 0, 1, 6]], device=device)
landing, under_way = Landing(packed), []
for _ in range(3):
    begun = torch.cuda.Event(enable_timing=True)
    begun.record()
    packed[:, 4] += 10
    under_way.append(Results(landing, 0, started=0.0, begun=begun))
assert [results.rows()[1].tokens for results in under_way] == [[16], [26], [36]]
assert min(results.seconds for results in under_way) > 0
again = Results(landing, 0, started=0.0, begun=begun)
assert again.values()[:, 4].tolist() == [35, 36]
print("kept")
"""


def test_the_device_holds_code_to_its_rules(in_torch: dict[str, tuple[str, str]]) -> None:
    assert said(in_torch, "rules").strip() == "held"


def test_memory_of_the_hosts_is_read_and_written_to_when_copies_have_ended(
    in_torch: dict[str, tuple[str, str]],
) -> None:
    assert said(in_torch, "buffers").strip() == "kept"


@pytest.mark.slow
def test_new_heads_are_made_on_it() -> None:
    """Answers of captured steps, hidden states in its memory, heads and their tree, in torch's operators."""
    file = Path(__file__).parent / "benchmarks" / "test_gpu_heads.py"
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-m", "cuda"]
    assert "1 passed" in run("-m", "pytest", *options, str(file))


SERVED = """
import asyncio, sys
import torch


def touched(*_, **__):
    raise AssertionError("the server's process has touched the device")


for name in "_lazy_init get_device_properties mem_get_info current_device set_device synchronize".split():
    setattr(torch.cuda, name, touched)

from engine.types import Request, SamplingParams
from server.app import create_app
from server.lifecycle import _load
from server.settings import load_settings

given = {"tree": "off", "enforce_eager": True, "kv_cache_tokens": 1024}
settings = load_settings({"model": sys.argv[1], **given})
engine = _load(settings)
create_app(engine, engine.text, settings, engine.generation_defaults)


async def main():
    await engine.start()
    request = Request("r", (1, 2), SamplingParams(temperature=0, max_tokens=5))
    print(engine.info.device, sum([len(delta.token_ids) async for delta in engine.submit(request)]))
    await engine.stop()


asyncio.run(main())
"""


def test_a_server_leaves_the_device_to_its_engines_process(tmp_path: Path) -> None:
    folder = save_model(tiny_llama(), tmp_path / "tiny")
    assert run("-c", SERVED, str(folder)).split() == ["cuda", "5"]


AHEAD = """
import sys

from engine import prompt_buckets
from engine.attention import triton_tuning
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import load
from engine.medusa.buckets import Buckets
from engine.types import Request, SamplingParams
from tests.fake_cuda.queue import QUEUE, Event

# To be quick; DECODED measures which passes over prompts are worth capturing.
triton_tuning.tuned_tiles, prompt_buckets._FEWEST_TOKENS = lambda *_, **__: {}, 32
CapturedRunner._share_of_launching = lambda *_: 1.0
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 1024, "max_model_len": 96}
settings |= {"model": sys.argv[1], "heads": sys.argv[2], "tree": 3, "max_prefill_tokens": 64}
samplings = [
    SamplingParams(temperature=0.0, max_tokens=7),
    SamplingParams(temperature=0.8, seed=3, top_p=0.9, max_tokens=7),
    SamplingParams(temperature=0.0, max_tokens=7, presence_penalty=0.5, min_tokens=2, bad_words=((4, 5),)),
    SamplingParams(temperature=0.0, max_tokens=7, repetition_penalty=1.2, logit_bias=((3, 1.5),)),
]
prompts = [[i % 7 for i in range(80)], [5, 4], [1, 2, 3, 1, 2], [i % 5 for i in range(12)]]
requests = [Request(f"{i}", tuple(p), s) for i, (p, s) in enumerate(zip(prompts, samplings))]


timed = []
elapsed_time = Event.elapsed_time
Event.elapsed_time = lambda event, end: timed.append(elapsed_time(event, end)) or timed[-1]


def graphs(engine):
    runner = engine._runner
    names = ("_first", "_second", "_layers") if isinstance(runner, TritonRunner) else ()
    return [set(getattr(runner, name)) for name in names]


def run(device, buckets=None):
    engine = Engine(load(EngineConfig(device=device, **settings), progress=False), buckets=buckets)
    captured, QUEUE.waits = graphs(engine), []
    timed.clear()
    tokens, most, pending = {}, 0, list(requests)
    while engine.has_work or pending:
        if pending:
            engine.add(pending.pop(0))
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        most = max(most, len(engine._prompts))
    engine.check()
    assert not QUEUE.waits, QUEUE.waits
    assert graphs(engine) == captured, "under a request"
    return engine, tokens, most


_, wanted, _ = run("cpu")
engine, found, most = run("cuda", Buckets((2,), (1, 3), 6))
assert isinstance(engine._runner, TritonRunner)
assert found == wanted, (found, wanted)
assert engine._host.overlaps
passes, steps = (engine.stats.step_seconds[phase] for phase in ("prefill", "decode"))
assert len(timed) == sum(passes.counts) + sum(steps.counts)
assert abs(1000 * (passes.total + steps.total) - sum(timed)) < 1e-6
print(most, sum(passes.counts), min(timed) > 0)
"""


def test_steps_and_passes_over_prompts_are_launched_ahead_and_never_waited_for(
    in_kernels: dict[str, tuple[str, str]],
) -> None:
    """But by the events behind their results. Kernels run on Triton's interpreter; graphs repeat them."""
    most, passes, timed = said(in_kernels, "ahead").split()
    assert int(most) >= 1
    assert int(passes) >= 3
    assert timed == "True"


BEHIND = """
import sys

from engine.attention import triton_tuning
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import load
from engine.medusa import bigram_triton
from engine.medusa.buckets import Buckets
from engine.types import Request, SamplingParams

# To be quick; passes over prompts are not captured.
triton_tuning.tuned_tiles, CapturedRunner._most_prompt_tokens = lambda *_, **__: {}, lambda _: 0
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 512, "max_model_len": 64, "tree": 6}
settings |= {"model": sys.argv[1], "heads": sys.argv[2], "lookup": "off"}
launched = []
follow = bigram_triton.follow
bigram_triton.follow = lambda *args: launched.append(len(args[-1].order)) or follow(*args)


def run(device, buckets=None):
    engine = Engine(load(EngineConfig(device=device, **settings), progress=False), buckets=buckets)
    for i in range(2):
        greedy = SamplingParams(temperature=0.0, max_tokens=4 + i)
        engine.add(Request(f"{i}", (1 + i, 2), greedy, trace=True))
    drafts = {}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            if delta.trace is not None:
                drafts.setdefault(delta.request_id, []).append((delta.trace.tokens, delta.trace.accepted))
    engine.check()
    return engine, drafts


_, wanted = run("cpu")
assert not launched
engine, found = run("cuda", Buckets((2,), (1, 6), 12))
assert isinstance(engine._runner, TritonRunner)
assert found == wanted, (found, wanted)
print(set(launched), sum(len(steps) for steps in wanted.values()))
"""


def test_captured_steps_draft_behind_the_tokens_before_as_the_cpus_do(
    in_kernels: dict[str, tuple[str, str]],
) -> None:
    """Drafts of a bigram, whose tables are there before a graph is captured and stay for its replays."""
    nodes, steps = said(in_kernels, "behind").rsplit(maxsplit=1)
    assert nodes == "{5}"
    assert int(steps) > 3


def test_captured_steps_go_through_experts(in_kernels: dict[str, tuple[str, str]]) -> None:
    """Only passes over prompts are launched under requests: steps were captured before, for whatever rows.
    Here of sigmoids among groups, with an MLP beside; in 4 bits of the softmax."""
    rows = said(in_kernels, "experts").split()
    assert rows == ["8", "torch.float32"]


def test_captured_steps_go_through_experts_in_4_bits(in_kernels: dict[str, tuple[str, str]]) -> None:
    """Against the CPU's, which are dequantised; gpt-oss with all that it has."""
    assert said(in_kernels, "mxfp4").split() == ["8", "torch.uint8"]


def test_captured_steps_read_the_sinks_of_heads(in_kernels: dict[str, tuple[str, str]]) -> None:
    assert said(in_kernels, "sinks").split() == ["False"]


DECODED = """
import sys

from engine import warmup
from engine.llm import LLM
from engine.medusa.buckets import Buckets
from engine.types import SamplingParams

# What steps of toys take matters nowhere: few are measured, and once each.
warmup._WARM_S, warmup._ROUNDS, warmup._IN_A_ROW, warmup._NODES = 0.02, 1, 1, (1, 4, 16)
Buckets.default = lambda *, max_num_seqs, tree_size, max_rows: Buckets((1, 2), (1, 4, tree_size), max_rows)
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 1024, "max_model_len": 128}
texts, prompts = [], [[1, 2, 3, 1, 2], [5, 4]]
for device, eager in (("cpu", True), ("cuda", True), ("cuda", False)):
    llm = LLM(sys.argv[1], device=device, heads=sys.argv[2], enforce_eager=eager, progress=False, **settings)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))
    texts.append([output.token_ids for output in outputs])
    stats = llm.stats
    print(eager, stats.step_seconds["decode"].total > 0, max(llm.promised(1, 8).values()) > 0)
assert texts[0] == texts[1] == texts[2], texts
"""


def test_steps_are_measured_and_chosen_captured_or_not(in_torch: dict[str, tuple[str, str]]) -> None:
    """Their times are events' there, and each has to have been recorded."""
    lines = said(in_torch, "decoded").splitlines()
    assert lines == ["True True True"] * 2 + ["False True True"]
