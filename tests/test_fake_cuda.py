"""Code for a GPU on a device that is the CPU: what mixes devices, or waits in a captured step, fails here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import environment
from tests.support import save_model, save_random_heads, tiny_llama

ROOT = Path(__file__).parents[1]


def run(*arguments: str, mode: str = "torch") -> str:
    """What a process says that has the device."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(mode), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


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
refused(lambda: x + torch.tensor([1, 2, 3, 4], device="cuda"), RuntimeError, graph)
refused(lambda: x.copy_(torch.ones(4)), RuntimeError, graph)
print("held")
"""


def test_the_device_holds_code_to_its_rules() -> None:
    assert run("-c", RULES).strip() == "held"


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


DECODED = """
import sys

from engine import warmup
from engine.llm import LLM
from engine.types import SamplingParams

# What steps of toys take matters nowhere: each is measured once.
warmup._WARM_S, warmup._ROUNDS, warmup._IN_A_ROW = 0.02, 1, 1
settings = {"dtype": "float32", "max_num_seqs": 2, "kv_cache_tokens": 1024, "max_model_len": 128}
texts, prompts = [], [[1, 2, 3, 1, 2], [5, 4]]
for device, eager in (("cpu", True), ("cuda", True), ("cuda", False)):
    llm = LLM(sys.argv[1], device=device, heads=sys.argv[2], enforce_eager=eager, progress=False, **settings)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))
    texts.append([output.token_ids for output in outputs])
    stats = llm.stats
    print(eager, stats.step_seconds["decode"].total > 0, max(llm.promised(1, 8).values()) > 0)
assert texts[0] == texts[1] == texts[2], texts
"""


def test_steps_are_measured_and_chosen_captured_or_not(tmp_path: Path) -> None:
    """Their times are events' there, and each has to have been recorded."""
    model = tiny_llama(vocab_size=64)
    folder = save_model(model, tmp_path / "tiny")
    heads = save_random_heads(
        tmp_path / "heads.safetensors", hidden=model.config.hidden_size, vocab=64, own_lm_head=False
    )
    assert run("-c", DECODED, str(folder), str(heads)).split() == ["True", "True", "True"] * 2 + [
        "False",
        "True",
        "True",
    ]
