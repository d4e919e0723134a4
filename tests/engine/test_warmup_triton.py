"""The passes over prompts at the start compile all that prompts need, and leave nothing behind."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from engine import runners, triton_dependent, warmup_triton
from engine.attention import triton as attention_module
from engine.attention.sdpa import SdpaAttention
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, candidates
from engine.attention.triton_tuning import ModelShape, _Step
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.graphs_triton import TritonRunner
from engine.loader import Loaded, load
from engine.model import fused_triton, triton_kernels, triton_products
from engine.model.decoder import Decoder
from engine.model.fused_triton import Ways
from engine.model.triton_products import Shape
from engine.prompt_runner import PromptRunner
from engine.runner import Runner
from engine.scheduler import Chunk
from engine.stats import EngineStats
from engine.types import Request, SamplingParams, Sequence
from engine.warmup_triton import PromptPass, prompt_passes, warm_prompts
from tests.engine.conftest import TinyModel, compiles
from tests.engine.model.compile_triton import EXPERTS, KERNELS
from tests.engine.sinks import model_with_sinks
from tests.engine.test_step_triton import Rerun
from tests.support import greedy, greedy_reference, run_all, save_model, tiny_model

pytestmark = compiles

LAUNCHED = [
    *((triton_kernels, name) for name in KERNELS),
    *EXPERTS,
    *((triton_products, name) for name in ("row_kernel", "rows_kernel")),
    *((attention_module, name) for name in ("attend_kernel", "join_kernel")),
]


class Launches:
    """Stands for all kernels of a pass over prompts: notes what Triton would compile, and computes zeros."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[Any] = set()
        for module, name in LAUNCHED:
            monkeypatch.setattr(module, name, _Kernel(getattr(module, name), self.seen))
        for module in (triton_kernels, triton_products, attention_module, fused_triton):
            monkeypatch.setattr(module, "launched_early", lambda device: (True, {"launch_pdl": True}))

    def of(self, run: Callable[[], object]) -> set[Any]:
        """What `run` launches."""
        self.seen.clear()
        run()
        return set(self.seen)


class _Kernel:
    """Triton's rules: an integer is 1, a multiple of 16 or another; an address is such a multiple or not."""

    def __init__(self, kernel: Any, seen: set[Any]) -> None:
        self._seen, self._name = seen, kernel.__name__
        self._parameters = inspect.signature(kernel.fn).parameters
        self._plain = set(kernel.kwargs["do_not_specialize"] or ())
        self._anywhere = set(kernel.kwargs["do_not_specialize_on_alignment"] or ())
        assert self._plain | self._anywhere <= set(self._parameters)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **named: object) -> None:
        values = dict(zip(self._parameters, args, strict=False)) | named
        assert set(self._parameters) <= set(values)
        self._seen.add((self._name, *((name, self._form(name, value)) for name, value in values.items())))
        outputs = {"y_ptr", "out_ptr"} | ({"x_ptr"} if self._name == "_embed_kernel" else set())
        for name in outputs & set(values):
            values[name].zero_()  # type: ignore[attr-defined]

    def _form(self, name: str, value: Any) -> Any:
        if name not in self._parameters or "constexpr" in str(self._parameters[name].annotation):
            return value
        if isinstance(value, torch.Tensor):
            return value.dtype, name in self._anywhere or value.data_ptr() % 16 == 0
        if isinstance(value, float) or name in self._plain:
            return type(value)
        return value == 1, value % 16 == 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


OURS = Shape(1, 16, 32, 4)
WAYS = {
    1: Ways(OURS, OURS, OURS, OURS),
    8: Ways(*[OURS._replace(rows=8)] * 4),
    16: Ways(None, OURS._replace(rows=16), None, None, 1 << 20),
    32: Ways(None, None, OURS._replace(rows=16), None),
    64: Ways(),
    256: Ways(None, None, None, None, 1 << 20, 1 << 12),
}
"""Products of few rows as they might have been measured; behind those of some, weights are asked for."""


def made(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    joins: bool = True,
    processors: int = 8,
    ways: dict[int, Ways] | None = None,
    **settings: Any,
) -> Loaded:
    """What the loader makes on CUDA, on the CPU."""
    monkeypatch.setattr(Decoder, "pack", Decoder.fuse_triton)
    values = {"device": "cpu", "dtype": "bfloat16", "kv_cache_tokens": 8192, "tree": "off"}
    loaded = load(EngineConfig(model=str(folder), **(values | settings)), progress=False)
    config, kinds = loaded.decoder.config, [Kind(rows, False) for rows in (8, 16, 32, 64, 128)]
    kinds.append(Kind(128, True))
    tiles = {kind: candidates(kind, 16, 2)[0]._replace(least_keys=64) for kind in kinds}
    tiles |= {kind: tiles[kind]._replace(joins=joins) for kind in kinds[:3]}
    attention = TritonAttention(
        config.group,
        scale=config.attention_scale,
        windows=config.windows_within(576),
        tiles=tiles,
        processors=processors,
    )
    assert loaded.decoder.fused_cuda is not None
    loaded.decoder.fused_cuda.ways = ways or {}
    return replace(loaded, attention=attention, kernels=True)


def runner_of(loaded: Loaded) -> Runner:
    return Runner(
        loaded.decoder,
        loaded.attention,
        loaded.pool,
        None,
        lookup_size=loaded.info.lookup,
        eos_token_ids=frozenset(),
        max_num_seqs=loaded.info.max_num_seqs,
        max_model_len=loaded.info.max_model_len,
    )


def served(loaded: Loaded) -> Iterator[list[tuple[int, int]]]:
    """Passes as chunks (cached, size): small sizes, alone and with others, long ones, many at once."""
    rng = random.Random(5)
    most, longest = loaded.max_prefill_tokens, loaded.info.max_model_len
    sizes = [*range(1, 19), 31, 32, 33, 42, 43, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 400, 511, 512]
    for size in (size for size in sizes if size <= min(most, longest)):
        for cached in {0, min(64, longest - size), min(200, longest - size)}:
            yield [(cached, size)]
            for others in ([(0, 1)], [(0, size)], [(33, 7), (0, 3)], [(0, size // 2 + 1)] * 5):
                if size + sum(other for _, other in others) <= most:
                    yield [*others, (cached, size)]
    for _ in range(30):
        budget, chunks = most, list[tuple[int, int]]()
        while budget > 0 and len(chunks) < 16:
            size = min(rng.choice((1, 3, 9, 30, 90, 300)), budget, longest)
            chunks.append((min(rng.choice((0, 0, 5, 64, 80, 400)), longest - size), size))
            budget -= size + rng.randrange(60)
        yield chunks


def prefill(runner: Runner, loaded: Loaded, chunks: list[tuple[int, int]]) -> None:
    """A pass as the engine makes it; every other prompt is longer than its chunk."""
    sequences = []
    for slot, (cached, size) in enumerate(chunks):
        tokens = [1] * (cached + size)
        request = Request(f"{slot}", tuple(tokens), SamplingParams())
        sequence = Sequence(request, 0, slot, tokens, len(tokens), 600, slot, slot=slot, num_cached=cached)
        assert loaded.blocks.grow(sequence.blocks, len(tokens))
        sequences.append(sequence)
    work = [
        Chunk(sequence, sequence.num_cached, sequence.num_prompt, last=slot % 2 == 0, first=True)
        for slot, sequence in enumerate(sequences)
    ]
    for together in runner.together(work):
        assert all(found.error is None for found in runner.prefill(together))
    for sequence in sequences:
        loaded.blocks.release(sequence.blocks)


GQA = {"num_attention_heads": 8, "num_key_value_heads": 1}
WIDE = {"intermediate_size": 2100}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 50}
EXPERTS_OF = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}


@pytest.mark.parametrize(
    ("family", "overrides", "settings"),
    [
        ("llama", WIDE, {"ways": WAYS}),
        ("llama", GQA, {"joins": False, "processors": 32, "max_step_tokens": 128}),
        ("gemma3_text", WINDOWS, {"max_num_seqs": 16, "block_size": 8}),
        ("olmo2", {"num_key_value_heads": 4}, {"max_model_len": 90}),
        ("qwen3_moe", EXPERTS_OF, {"ways": {256: Ways(ahead=1 << 20)}}),
    ],
    ids=["llama", "gqa", "windows", "short", "experts"],
)
def test_prompts_launch_nothing_else(
    family: str,
    overrides: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launches: Launches,
) -> None:
    """And none of the passes can be left out."""
    save_model(tiny_model(family, **overrides), tmp_path)
    loaded = made(tmp_path, monkeypatch, **settings)
    runner, passes = runner_of(loaded), prompt_passes(loaded)
    each = [launches.of(partial(warmup_triton._run, runner, loaded, one)) for one in passes]
    wanted = set[Any]().union(
        *(launches.of(partial(prefill, runner, loaded, chunks)) for chunks in served(loaded))
    )
    assert wanted <= set[Any]().union(*each)
    for left_out in range(len(passes)):
        rest = set[Any]().union(*each[:left_out], *each[left_out + 1 :])
        assert not wanted <= rest, f"{passes[left_out]} is not needed"
    loaded.blocks.check()
    assert loaded.blocks.free == loaded.blocks.total


def test_attention_is_compiled_as_it_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """By threads, before the passes are run one after the other: in each of their forms, once."""
    save_model(tiny_model("gemma3_text", **WINDOWS), tmp_path)
    loaded = made(tmp_path, monkeypatch)
    runner, passes = runner_of(loaded), prompt_passes(loaded)
    passes += passes[:3]
    alone: list[PromptPass] = []
    attend = warmup_triton._attend

    def noted(loaded: Loaded, layers: Any, each: PromptPass) -> None:
        alone.append(each)
        attend(loaded, layers, each)

    monkeypatch.setattr(warmup_triton, "_attend", noted)
    compiled = launches.of(partial(warmup_triton._compile, loaded, passes))
    run = launches.of(lambda: [warmup_triton._run(runner, loaded, each) for each in passes])
    ours = ("attend_kernel", "join_kernel", "_rotate_kernel")
    assert {form for form in run if form[0] in ours} == compiled
    assert len(alone) == len({warmup_triton._attention_forms(loaded, each) for each in passes})


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"max_num_seqs": 1}, 1),
        ({"max_step_tokens": 64}, 2),
        ({"max_model_len": 40, "block_size": 128, "kv_cache_tokens": 128}, 1),
    ],
    ids=str,
)
def test_passes_are_within_the_bounds(
    settings: dict[str, Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """Of sequences, of a step, of the context and of the K/V pool, which here holds one of the longest."""
    save_model(tiny_model("llama"), tmp_path)
    values = {"max_model_len": 200, "kv_cache_tokens": 272} | settings
    loaded = made(tmp_path, monkeypatch, ways=WAYS, **values)
    possible = list(warmup_triton._possible(loaded, 0))
    assert max(len(each.sizes) for each in possible) == most
    assert max(sum(each.sizes) for each in possible) <= loaded.max_prefill_tokens
    assert max(each.sizes[0] + each.cached for each in possible) <= loaded.info.max_model_len
    runner = runner_of(loaded)
    for each in possible[:: len(possible) // 20]:
        warmup_triton._run(runner, loaded, each)  # raises where the pool has no room
    assert loaded.blocks.free == loaded.blocks.total


def test_the_first_pass_is_run_before_threads_compile_and_the_rest_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_model("llama"), tmp_path)
    loaded = made(tmp_path, monkeypatch)
    order: list[Any] = []
    monkeypatch.setattr(warmup_triton, "_run", lambda runner, loaded, each: order.append(each))
    monkeypatch.setattr(warmup_triton, "_compile", lambda loaded, passes: order.append(passes))
    warm_prompts(runner_of(loaded), loaded)
    first, *rest = prompt_passes(loaded)
    assert order == [first, rest, *rest]


@pytest.mark.parametrize("sinks", [False, True])
def test_what_was_compiled_to_be_measured_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: Launches, sinks: bool
) -> None:
    """Though the sequences that are measured have other sizes."""
    save_model(model_with_sinks("qwen2", monkeypatch) if sinks else tiny_model("llama"), tmp_path)
    loaded = made(tmp_path, monkeypatch)
    properties = SimpleNamespace(multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config, kind = loaded.decoder.config, Kind(128, chunk=True)
    shape = ModelShape(config.group, config.num_kv_heads, config.head_dim, 16, torch.bfloat16, sinks=sinks)
    tile = candidates(kind, 16, 2)[0]
    measured = launches.of(_Step(shape, loaded.pool.device).run(kind, tile, 512, 2048))
    runner = runner_of(loaded)
    assert runner._table_length % 16
    run = launches.of(lambda: [warmup_triton._run(runner, loaded, one) for one in prompt_passes(loaded)])
    attention = {form for form in measured if form[0] == "attend_kernel"}
    assert attention
    assert attention < run


def test_how_much_is_asked_for_ahead_is_no_form_of_its_own(
    monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """By 9 rows 36 lines, and by 12 rows 48, a multiple of 16."""
    monkeypatch.setattr(triton_dependent, "_MOST_LINES", 4)
    ahead = (torch.zeros(128, 64, dtype=torch.bfloat16), 1 << 20)

    def run(rows: int) -> None:
        x, gates = (torch.zeros(rows, size, dtype=torch.bfloat16) for size in (64, 128))
        triton_kernels.add_norm(x, x, after=None, before=x[0], eps=1e-6, ahead=ahead)
        triton_kernels.gated_activation(gates, "silu", ahead)

    nine, twelve = (launches.of(partial(run, rows)) for rows in (9, 12))
    assert len(nine) == 2
    assert nine == twelve


def test_attention_alone_writes_where_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: of two sequences, one behind a prefix whose keys are split, the other shorter."""
    save_model(tiny_model("llama"), tmp_path)
    loaded = made(tmp_path, monkeypatch, dtype="float32")
    pool, layers = loaded.pool.data, loaded.decoder.fused_cuda
    assert layers is not None
    pool.fill_(3.0)
    warmup_triton._attend(loaded, layers, PromptPass((2, 1), 70))
    assert (pool[:, :, 1:] == 3.0).all()
    assert not (pool[:, :, 0] == 3.0).all()
    assert pool.isfinite().all()


@pytest.mark.parametrize("lookup", ["on", "off"])
def test_nothing_is_left_behind(
    narrow: TinyModel, lookup: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine as on CUDA, its kernels interpreted, but for attention."""
    caplog.set_level(logging.INFO)
    passes = [PromptPass((3,)), PromptPass((9, 1), 7), PromptPass((4, 4))]
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)
    monkeypatch.setattr(warmup_triton, "prompt_passes", lambda loaded, captured: passes)
    monkeypatch.setattr(CapturedRunner, "_most_prompt_tokens", lambda self: 0)
    monkeypatch.setattr(runners, "cuda_graphs", lambda device: Rerun)
    sizes: list[list[int]] = []
    forward = Runner._chunks_forward

    def noted(self: Runner, chunks: list[Chunk]) -> torch.Tensor:
        sizes.append([chunk.size for chunk in chunks])
        return forward(self, chunks)

    monkeypatch.setattr(Runner, "_chunks_forward", noted)
    proposed: list[int] = []
    propose = Runner.propose

    def noted_too(self: Runner, sequences: list[Sequence]) -> Any:
        proposed.append(len(sequences))
        return propose(self, sequences)

    monkeypatch.setattr(Runner, "propose", noted_too)
    settings = {"tree": "3", "lookup": "on"} if lookup == "on" else {"tree": "off"}
    config = EngineConfig(
        model=str(narrow.folder), device="cpu", attention="sdpa", block_size=4, max_num_seqs=2,
        kv_cache_tokens=1024, **settings,
    )  # fmt: skip
    loaded = replace(load(config, progress=False), captured=True, kernels=True)
    engine = Engine(loaded)
    assert isinstance(engine._runner, TritonRunner)
    assert sizes == [[3], [9, 1], [4, 4]]
    assert proposed == ([1, 2, 2] if lookup == "on" else [])
    assert "ran 3 passes over prompts" in caplog.text
    engine.check()
    assert loaded.blocks.cached == loaded.blocks.used == 0
    blocks: list[int] = []
    assert loaded.blocks.grow(blocks, 40)
    assert blocks == list(range(1, 11)), "they are handed out in order"
    loaded.blocks.release(blocks)
    assert engine.stats == EngineStats(
        kv_blocks_total=loaded.blocks.total, kv_blocks_free=loaded.blocks.total
    )
    prompts = [[i, 0, 0, 0, 0, 0, 3][: 3 + i] for i in range(3)]
    outputs = run_all(engine, [greedy(f"r{i}", prompt, 5) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert outputs[f"r{i}", 0] == greedy_reference(narrow.reference, prompt, 5)
    assert engine.stats.prefix_hit_tokens == 0


def test_captured_passes_need_no_others(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine as on CUDA, its kernels interpreted, but for attention."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)
    monkeypatch.setattr(runners, "cuda_graphs", lambda device: Rerun)
    monkeypatch.setattr(PromptRunner, "_chunks_forward", lambda self, chunks: pytest.fail("not captured"))
    monkeypatch.setattr(PromptRunner, "_first_tokens", lambda self, *rest: pytest.fail("not captured"))
    config = EngineConfig(
        model=str(narrow.folder), device="cpu", attention="sdpa", block_size=4, max_num_seqs=2,
        kv_cache_tokens=1024, tree="3", lookup="on", max_prefill_tokens=100,
    )  # fmt: skip
    loaded = replace(load(config, progress=False), captured=True, kernels=True)
    engine = Engine(loaded)
    assert "captured 8 graphs of passes over at most 100 tokens of prompts" in caplog.text
    assert "passes over prompts, which compiles" not in caplog.text
    engine.check()
    assert loaded.blocks.cached == loaded.blocks.used == 0
    prompts = [[(i * j) % 12 for j in range(5 + 40 * i)] for i in range(3)]
    sampled = SamplingParams(temperature=0.8, seed=7, max_tokens=5, presence_penalty=0.3, logprobs=1)
    requests = [Request("sampled", tuple(prompts[0]), sampled)]
    requests += [greedy(f"r{i}", prompt, 5) for i, prompt in enumerate(prompts)]
    outputs = run_all(engine, requests)
    for i, prompt in enumerate(prompts):
        assert outputs[f"r{i}", 0] == greedy_reference(narrow.reference, prompt, 5)
    monkeypatch.undo()
    alone = run_all(Engine(load(config, progress=False)), requests[:1])
    assert outputs["sampled", 0] == alone["sampled", 0]


def test_a_pass_that_fails_is_told_and_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: Launches, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tiny_model("llama"), tmp_path)
    loaded = made(tmp_path, monkeypatch)
    runner = runner_of(loaded)

    def broken(self: Runner, chunks: list[Chunk]) -> list[Any]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Runner, "prefill", broken)
    caplog.set_level(logging.WARNING)  # the server's tests leave another
    warm_prompts(runner, loaded)
    assert "the first prompts may wait" in caplog.text
    loaded.blocks.check()
    assert loaded.blocks.free == loaded.blocks.total


@pytest.mark.parametrize("way", [{"captured": False}, {"kernels": False}], ids=str)
def test_it_is_for_captured_steps_with_triton(
    narrow: TinyModel, way: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where `--enforce-eager` wants a fast start, nor where nothing is compiled."""

    def unwanted(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(warmup_triton, "warm_prompts", unwanted)
    monkeypatch.setattr(runners, "cuda_graphs", lambda device: Rerun)
    values: dict[str, Any] = {"tree": "off", "attention": "sdpa", "max_num_seqs": 1, "kv_cache_tokens": 1024}
    loaded = load(EngineConfig(model=str(narrow.folder), device="cpu", **values), progress=False)
    both = {"captured": True, "kernels": True}
    with pytest.raises(AssertionError):
        Engine(replace(loaded, **both))
    Engine(replace(loaded, **(both | way)))
