"""Acceptance, adaptive, HTTP's cost, peers and soak on tiny models and made-up numbers."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import acceptance, adaptive, host_cost, http_cost, peers, soak, tree_http
from benchmarks.common import Item, engine_config, read_items, word_prompt
from benchmarks.simulated_device import SimulatedDevice, SimulatedEngine
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.loader import load
from engine.step_results import Results
from engine.types import Request, SamplingParams
from tests.support import save_model, save_random_heads, tiny_llama

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
rows_of_a_step = Results.rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of twelve tokens, so that it repeats itself, with random heads."""
    model = tiny_llama(vocab_size=12)
    folder = save_model(model, tmp_path_factory.mktemp("benchmarks"))
    save_random_heads(folder / "heads.safetensors", hidden=model.config.hidden_size, vocab=12)
    return folder


def make_llm(folder: Path, **settings: Any) -> LLM:
    llm = LLM(EngineConfig(model=str(folder), device="cpu", block_size=4, max_num_seqs=4, **settings))
    llm.text.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return llm


@pytest.fixture(scope="module")
def off(folder: Path) -> LLM:
    return make_llm(folder, tree="off")


@pytest.fixture(scope="module")
def lookup(folder: Path) -> LLM:
    return make_llm(folder, tree=9, lookup=8)


# -- acceptance ------------------------------------------------------------------------------------


def test_acceptance_counts_tokens_per_step_and_finds_the_same_text(
    off: LLM, lookup: LLM, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    lines = [{"category": c, "turns": [f"t1 t2 t{i % 4} t3"]} for i, c in enumerate("xxyx")]
    file.write_text("\n".join(map(json.dumps, lines)))
    args = Namespace(prompts=file, limit=None, streams=2, rounds=2, prediction=False, max_tokens=24)
    rows = acceptance.measure(args, lookup, off)
    assert [row["category"] for row in rows] == ["x", "y", "all"]
    every = rows[-1]
    assert every["turns"] == 2 * 3  # x has a batch of two and one of one, y one
    assert every["tokens"] == 2 * 4 * 24
    assert every["answers_differ"] == 0
    assert every["acceptance_length"] > 1.05  # a model of few tokens repeats itself
    assert every["ratio_interval_95"][0] <= every["ratio_median"] <= every["ratio_interval_95"][1]
    (only_off,) = [row for row in acceptance.measure(args, off, None) if row["category"] == "all"]
    assert only_off["acceptance_length"] == 1.0


def test_typical_acceptance_is_compared_with_exact_at_the_same_temperature(
    lookup: LLM, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"category": "x", "turns": [f"t1 t2 t{i}"]}) for i in range(4)))
    argv = ["--prompts", str(file), "--typical", "--streams", "2", "--max-tokens", "24", "--temperature", "1"]
    args, _ = acceptance.parse(argv)
    row = acceptance.measure_typical(args, lookup)
    assert row["typical"]["tokens"] == row["exact"]["tokens"] == 4 * 24
    assert row["typical_to_exact"]["rounds"] == 2
    assert 1.0 <= row["exact"]["acceptance_length"] < row["typical"]["acceptance_length"]
    with pytest.raises(SystemExit):
        acceptance.parse(["--prompts", str(file), "--typical", "--temperature", "0"])


def test_heads_are_compared_with_heads_prompt_by_prompt(off: LLM, lookup: LLM, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [{"category": c, "turns": [f"t1 t2 t{i}"]} for i, c in enumerate("xxyx")]
    file.write_text("\n".join(map(json.dumps, lines)))
    argv = ["--prompts", str(file), "--against", "old", "--max-tokens", "24"]
    args, _ = acceptance.parse(argv)
    rows = acceptance.measure_against(args, lookup, off)["rows"]
    assert {name: row["rounds"] for name, row in rows.items()} == {"x": 3, "y": 1, "all": 4}
    assert rows["all"]["old"] == 1.0
    assert rows["all"]["new"] > 1.05
    assert rows["all"]["ratio_mean"] == pytest.approx(rows["all"]["new"], rel=0.3)
    assert rows["all"]["answers_differ"] == 0
    with pytest.raises(SystemExit):
        acceptance.parse([*argv, "--typical"])


def test_a_prediction_that_comes_true_shortens_the_way(off: LLM, lookup: LLM) -> None:
    plain = acceptance.run_turn(off, [Item("x", "t3 t1")], 24, prediction=False, salt="a")
    item = Item("x", "t3 t1", prediction=lookup.text.decode(plain.answers[0]))
    found = acceptance.run_turn(lookup, [item], 24, prediction=True, salt="b")
    assert found.answers == plain.answers
    assert found.predicted > 0
    assert acceptance.run_turn(lookup, [item], 24, prediction=False, salt="c").predicted == 0


def test_acceptance_refuses_a_prediction_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"turns": ["t1"]}')
    with pytest.raises(SystemExit):
        acceptance.parse(["--prompts", str(file), "--prediction"])
    args, options = acceptance.parse(["--prompts", str(file), "--tree", "9", "--", "--lookup=8"])
    assert options == ["--tree", "9", "--lookup=8"]
    assert args.max_tokens == 128


@pytest.mark.parametrize(("name", "count"), [("code_editing", 14), ("summaries", 13)])
def test_the_prompt_sets(name: str, count: int) -> None:
    items = read_items(DATA / f"{name}.jsonl")
    assert len(items) == count
    assert len({item.prompt for item in items}) == count
    if name == "summaries":
        assert all(250 <= len(item.prompt.split()) <= 500 for item in items)
        return
    for item in items:
        assert item.prediction is not None
        code = item.prompt[item.prompt.index("```") :]
        before, after = code.splitlines(), item.prediction.splitlines()
        assert 30 <= len(before) <= 80
        assert code != item.prediction
        # An edit, not another file: most lines stay.
        assert len(set(before) & set(after)) > 0.6 * len(set(before))


# -- options ---------------------------------------------------------------------------------------


def test_engine_options() -> None:
    config = engine_config(["--tree", "8", "--lookup=off", "--max-num-seqs", "2", "--tree=4"], model="m")
    assert (config.model, config.tree, config.lookup, config.max_num_seqs) == ("m", 4, "off", 2)
    assert engine_config(["--tree", "8"], **acceptance.TREE_OFF).tree == "off"
    for wrong in (["--port", "1"], ["--tree"], ["tree", "8"]):
        with pytest.raises(ValueError, match=r"argument|value"):
            engine_config(wrong)
    with pytest.raises(ConfigError, match="--tree"):
        engine_config(["--tree", "99"])


def test_a_bad_engine_option_ends_the_command() -> None:
    for parse in (soak.parse, http_cost.parse, peers.parse):
        with pytest.raises(SystemExit):
            parse(["--lokup", "8"])
        with pytest.raises(SystemExit):
            parse(["--", "--tree", "99"])


# -- adaptive --------------------------------------------------------------------------------------


def test_a_phase_knows_the_trees_it_ran(off: LLM, lookup: LLM) -> None:
    prompts = [(1, 2, 3), (3, 2), (2, 1), (2, 3)]
    plain = adaptive.run_phase(off, prompts, 2, 12, "a")
    tree = adaptive.run_phase(lookup, prompts, 2, 12, "b")
    assert set(plain.sizes) == {1}
    assert 22 <= len(plain.sizes) <= 24  # two answers after each other, and not four
    assert plain.settled == [1] * (len(plain.sizes) - len(plain.sizes) // 2)
    assert plain.acceptance_length == 1.0
    assert max(tree.sizes) <= 9
    assert tree.acceptance_length > 1.0
    assert max(map(len, plain.tokens)) == max(map(len, tree.tokens)) == 12
    assert not any(map(adaptive.parted, plain.tokens, tree.tokens))
    assert adaptive.parted((1, 2, 3), (1, 3))
    assert not adaptive.parted((1, 2, 3), (1, 2))


def test_a_phase_ends_where_a_stream_has_nothing_left_to_ask(off: LLM) -> None:
    """Of three prompts on two streams, the third is still being answered by one when the other is done."""
    found = adaptive.run_phase(off, [(1, 2, 3), (3, 2), (2, 1)], 2, 12, "c")
    assert sorted(map(len, found.tokens))[0] < 12


def test_auto_against_off_end_to_end(folder: Path, off: LLM) -> None:
    auto = make_llm(folder, tree="auto", heads=str(folder / "heads.safetensors"))
    args = Namespace(
        texts=["t1 t2", "t3 t1 t2"],
        max_prompt=8,
        streams=[1, 2],
        rounds=3,
        new_tokens=12,
        warm_rounds=1,
        turns=2,
    )
    rows = adaptive.against_off(args, "random", auto, off)
    assert [row["streams"] for row in rows] == [1, 2]
    for row in rows:
        assert row["answers_differ"] == 0
        assert row["rounds"] == 3
        assert math.isclose(sum(row["tree_sizes"].values()), 1, abs_tol=0.01) or len(row["tree_sizes"]) == 5
    (row,) = adaptive.against_off(Namespace(**(vars(args) | {"streams": [2]})), "x", auto, off, "against")
    assert row["against_tokens_per_s"] > 0
    assert row["against_acceptance_length"] == 1.0
    assert row["against_tree_sizes"] == {"1": 1.0}


def test_adaptive_compares_sizes_or_heads(tmp_path: Path) -> None:
    (file := tmp_path / "p.jsonl").write_text(json.dumps({"turns": ["t1"]}))
    argv = ["--prompts", str(file), "--heads", "new", "--against", "old"]
    assert adaptive.parse(argv)[0].against == "old"
    with pytest.raises(SystemExit):
        adaptive.parse([*argv, "--sweep"])


def test_the_sweep_end_to_end(folder: Path, off: LLM, lookup: LLM) -> None:
    auto = make_llm(folder, tree="auto", heads=str(folder / "heads.safetensors"))
    args = Namespace(
        texts=["t1 t2", "t3 t1"],
        max_prompt=8,
        phases=[1, 2, 1],
        rounds=2,
        new_tokens=12,
        warm_rounds=1,
        turns=2,
    )
    rows = adaptive.sweep(args, "random", {"auto": auto, "1": off, "9": lookup})
    assert [(row["phase"], row["streams"]) for row in rows] == [(0, 1), (1, 2), (2, 1)]
    assert all(row["best"] in (1, 9) and set(row["tokens_per_s"]) == {"auto", "1", "9"} for row in rows)


def test_the_verdict() -> None:
    rates = {"auto": [7.0] * 5, "1": [8.0] * 5, "4": [10.0, 9.5, 10.5, 10.0, 9.8], "16": [6.0] * 5}
    assert adaptive.verdict(rates, [4] * 9)["passed"]
    between = adaptive.verdict(rates, [6] * 9)
    assert (between["best"], between["stands_for_settled"]) == (4, 4)
    wrong = adaptive.verdict(rates, [16] * 9)
    assert not wrong["passed"]
    assert wrong["settled_to_best"]["ratio_interval_95"][1] < 1
    # Sizes that change with every step are judged by the rate they bring.
    fast = adaptive.verdict(rates | {"auto": [10.1, 9.9, 10.0, 10.2, 9.9]}, [16] * 9)
    assert fast["passed_by"] == ["rate"]
    # As good as the best within the noise: not to be told from it.
    assert adaptive.verdict(rates | {"16": [9.9, 10.2, 9.0, 10.4, 9.7]}, [16] * 9)["passed"]


def test_engines_are_made_for_what_the_drafts_can_fill(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = Namespace(model=str(folder), streams=[1], phases=[2])
    options = ["--device", "cpu", "--lookup", "8", "--block-size", "4"]
    found = adaptive.make_engines(args, options, ["auto", "off", "1", "4", "64"], "none")
    assert list(found) == ["auto", "off", "1", "4"]
    assert "64 nodes left out" in capsys.readouterr().out
    assert (found["1"].info.tree_size, found["4"].info.tree_size) == (1, 4)


# -- HTTP's cost, peers ----------------------------------------------------------------------------


def test_the_share_lost() -> None:
    row = http_cost.summary(8, [90.0, 95.0, 97.0], [100.0, 100.0, 100.0])
    assert row["share_lost_median"] == 0.05
    assert row["share_lost_interval_95"] == [0.03, 0.1]


def test_offline_side_gives_every_token(off: LLM) -> None:
    assert http_cost.offline(off, ["t1 t2", "t3"], 5, "s") > 0


def test_a_simulated_device_takes_its_time_and_computes_nothing(folder: Path) -> None:
    settings = {"tree": 3, "lookup": 2, "kv_cache_tokens": 1024, "max_num_seqs": 4, "block_size": 4}
    loaded = load(EngineConfig(model=str(folder), device="cpu", **settings), progress=False)
    engine = SimulatedEngine(loaded, device=SimulatedDevice(step_s=0.02, token_s=0.005, accepted=1))
    sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    start = time.perf_counter()
    for number in range(3):
        engine.add(Request(str(number), (1, 2, 3, 4), sampling))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    # Twelve tokens of prompts, then one token and two a step.
    assert time.perf_counter() - start >= 12 * 0.005 + 4 * 0.02
    assert list(map(len, tokens.values())) == [9, 9, 9]
    assert engine.stats.acceptance_counts[2] == 3 * 4
    engine.check()
    with pytest.raises(ValueError, match="cannot be accepted of a tree of 3"):
        SimulatedEngine(loaded, device=SimulatedDevice(0.0, accepted=3))


def test_a_simulated_device_proposes_chains_in_turn(folder: Path) -> None:
    settings = {"tree": 4, "lookup": 3, "kv_cache_tokens": 1024, "max_num_seqs": 4, "block_size": 4}
    loaded = load(EngineConfig(model=str(folder), device="cpu", **settings), progress=False)
    engine = SimulatedEngine(loaded, device=SimulatedDevice(0.0, accepted=1, chains=2))
    for number in range(3):
        engine.add(Request(str(number), (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=20)))
    found, came_true = [], []
    while len(found) < 9:
        chains = {s.request.request_id: s.lookup.chain for s in engine._scheduler.running}
        came = {delta.request_id: delta.token_ids for delta in engine.step()}
        came_true += [came[name][:1] == chain[:1] for name, chain in chains.items() if chain and name in came]
        found.append([len(sequence.lookup.chain) for sequence in engine._scheduler.running])
    assert [3, 0, 3] in found
    assert [0, 3, 0] in found
    assert came_true
    assert all(came_true)  # a chain's first token


@pytest.mark.parametrize("trees", ["auto,off", "3"])
def test_what_the_host_takes_for_a_step(folder: Path, trees: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(folder), "--streams", "1,3", "--trees", trees, "--rounds", "1", "--steps", "6"]
    output = folder / "host.json"
    assert host_cost.main([*argv, "--output", str(output), "--", "--block-size", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    names = [(row["streams"], row["tree"]) for row in result["rows"]]
    assert names == [(n, tree) for n in (1, 3) for tree in trees.split(",")]
    for row in result["rows"]:
        assert row["us"] > 0
        assert row["cpu_us"] > 0
        assert set(row["parts_us"]) >= {"plan", "batch", "rows", "emit"}
        assert (row["nodes"] == 1) == (row["tree"] == "off")
    # What was watched is as before.
    assert Results.rows is rows_of_a_step
    with pytest.raises(SystemExit):
        host_cost.parse(["--steps", "0"])


def test_peers_that_are_not_there_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    args, _ = peers.parse([])
    for name in ("llama.cpp", "vllm", "openvino"):
        with pytest.raises(peers.NotInstalledError, match=name):
            peers.PEERS[name](args, Path("/nowhere"), None)  # type: ignore[arg-type]


def test_peers_rows_compare_with_the_first_side() -> None:
    row = peers.summary(4, {"ours": [20.0, 22.0], "x": [10.0, 11.0]})
    assert row["ours_to"]["x"]["ratio_median"] == 2.0
    assert peers.parse(["--server", "a=http://h/v1/"])[0].server == [("a", "http://h")]
    for wrong in (["--server", "http://h"], ["--peers", "other"]):
        with pytest.raises(SystemExit):
            peers.parse(wrong)


# -- soak ------------------------------------------------------------------------------------------


def test_slope_of_memory() -> None:
    assert soak.slope([(minute, 100 + 3 * minute) for minute in range(5)]) == pytest.approx(3)
    assert soak.slope([(0, 5.0), (1, 5.0), (2, 5.0)]) == 0
    assert soak.by_minute([(0.0, 5.0), (0.9, 6.0), (1.1, 7.04), (3.0, 8.0)]) == [5.0, 7.0, 8.0]
    assert 10 < soak.rss_mib(os.getpid()) < 100_000


_GROWS_BY_ONE = """
import sys, threading
print("ready", flush=True)
sys.stdin.readline()
file = open(sys.argv[1], "w")
threading.Thread(target=sys.stdin.readline).start()
print("grown", flush=True)
"""


def test_soak_counts_threads_and_files_and_sees_them_grow(tmp_path: Path) -> None:
    # In a process of its own: here, threads that earlier tests have left may end at any time.
    command = [sys.executable, "-c", _GROWS_BY_ONE, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        files, threads = soak.open_files(process.pid), soak.threads(process.pid)
        assert threads == 1
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "grown\n"
        assert soak.open_files(process.pid) == files + 1
        assert soak.threads(process.pid) == threads + 1
        print(file=process.stdin, flush=True)
    assert soak.growth([5, 9, 5, 9, 5, 9]) == 0
    assert soak.growth([5, 9, 5, 9, 7, 12]) == 3
    assert soak.growth([5]) is None


def test_repeated_requests_are_the_same_and_decide_their_text() -> None:
    first = soak.repeated_bodies("m")
    assert first == soak.repeated_bodies("m")
    assert all(body["temperature"] == 0 or "seed" in body for body in first)


def test_answers_are_held_against_what_they_were_asked_to_follow() -> None:
    rng = random.Random(0)
    bodies = {kind: soak.make_body(kind, "m", rng) for kind in soak.KINDS}

    def choice(content: str | None, ended: str = "stop", *calls: tuple[str, str]) -> dict[str, Any]:
        found = [{"function": {"name": name, "arguments": text}} for name, text in calls]
        return {"message": {"content": content, "tool_calls": found}, "finish_reason": ended}

    schema = bodies["schema"]["response_format"]["json_schema"]["schema"]
    right = json.dumps(dict.fromkeys(schema["required"], 1))
    assert soak.broken(bodies["schema"], choice(right)) is None
    assert soak.broken(bodies["schema"], choice("{}")) == "not by the schema: {}"
    assert soak.broken(bodies["schema"], choice("{", "length")) is None
    assert soak.broken(bodies["pattern"], choice("north-12")) is None
    assert soak.broken(bodies["pattern"], choice("north-1")) == "not by the pattern: north-1"
    call = '{"ship": 1, "pier": "north"}'
    assert soak.broken(bodies["tools"], choice(None, "tool_calls", ("weigh", call))) is None
    assert "a call of" in str(soak.broken(bodies["tools"], choice(None, "tool_calls", ("weigh", "{}"))))
    assert "a call of" in str(soak.broken(bodies["tools"], choice(None, "tool_calls", ("way", call))))
    assert soak.broken(bodies["tools"], choice("Yes.")) == "no call"
    assert soak.broken(bodies["logprobs"], choice("Yes.") | {"logprobs": {"content": []}}) == "no logprobs"
    assert soak.broken(bodies["greedy"], choice("Yes.")) is None


def test_word_prompt_is_as_long_as_asked() -> None:
    assert len(word_prompt(40, random.Random(0)).split()) == 40


# -- tree over HTTP --------------------------------------------------------------------------------


def test_each_size_is_held_to_the_tree_off_and_auto_to_the_best_of_them() -> None:
    seconds = {"on": [1.0, 2.0, 1.0], "2": [1.0, 1.9, 1.1], "8": [4.0, 4.0, 4.0], "off": [2.0, 4.0, 2.0]}
    found = tree_http.summary(seconds, 80)
    assert found["best_fixed"] == "2"
    assert found["sides"]["off"] == {"tokens_per_s": 10.0, "ratio_of_totals": 1.0}
    assert found["sides"]["on"]["ratio_interval_95"] == [2.0, 2.0]
    assert found["sides"]["8"]["ratio_of_totals"] == 0.667
    low, high = found["on_to_best_fixed"]["ratio_interval_95"]
    assert low == 0.95
    assert high == 1.1
    assert "best_fixed" not in tree_http.summary({side: seconds[side] for side in ("on", "off")}, 80)
