"""benchmarks.gpu_heads in its tiny form, and gpu.sh: both have to run when a GPU is there for ten minutes."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import gpu, gpu_heads
from benchmarks.gpu_run import Run
from engine.config import EngineConfig
from engine.llm import LLM
from tests.support import save_model, save_random_heads, tiny_llama
from tests.training.support import random_rows, write_rows
from training.data import load_shards, read_shard

ROOT = Path(__file__).parents[2]
STAGES = ["warm", "distil", "train", "calibrate", "collect"]


def make(folder: Path, device: str, *arguments: str, asked: int = 150) -> tuple[int, dict[str, Any]]:
    """New heads for a tiny model that can chat; the exit code and what the results say."""
    model = save_model(tiny_llama(vocab_size=64, eos_token_id=2), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}t1 {{ m.content }} t2 {% endfor %}"
    tokenizer.save_pretrained(model)
    baseline = save_random_heads(model / "baseline.safetensors", hidden=32, vocab=64, own_lm_head=False)
    prompts = folder / "prompts.jsonl.xz"
    lines = [json.dumps({"prompt": f"t{i % 61} t{i // 61} t{i % 7}"}) for i in range(asked)]
    prompts.write_bytes(lzma.compress("\n".join(lines).encode()))
    given = ["--device", device, "--tiny", "--model", str(model), "--baseline", str(baseline)]
    given += ["--prompts", str(prompts), "--output", str(folder / "out"), "--self-prompt", "4"]
    code = gpu_heads.main([*given, "--workers", "1", *arguments])
    return code, json.loads((folder / "out" / "gpu-heads.json").read_text())


def unpacked(folder: Path, name: str) -> Path:
    """What came back in this file."""
    with tarfile.open(folder / "out" / name) as tar:
        tar.extractall(folder / name.removesuffix(".tar"), filter="data")
    return folder / name.removesuffix(".tar")


def held_to_what_comes_back(folder: Path, code: int, results: dict[str, Any], device: str) -> None:
    parts, out = results["parts"], folder / "out"
    assert {name: part.get("error") for name, part in parts.items()} == dict.fromkeys(STAGES)
    assert code == 0
    assert parts["warm"]["hidden_state_tokens_per_s"] > 0
    assert parts["distil"]["rows"] >= 30
    assert parts["distil"]["exit_codes"] == [0]
    assert parts["train"]["step"] > 5
    # As good as heads are that were trained: random ones are next to useless.
    new, baseline = parts["calibrate"]["new"], parts["calibrate"]["baseline"]
    assert new["held_out_tokens"] == baseline["held_out_tokens"] > 0
    assert new["replayed"][-1] > 1.0
    assert "medusa-serve-heads-" not in json.dumps(results), "that folder is gone"
    assert parts["train"]["heads"] == new["heads"] == "heads/medusa_lm_head.safetensors"
    assert baseline["tree"] == "baseline/medusa_tree.json"
    heads = unpacked(folder, "heads.tar")
    assert {file.name for file in heads.iterdir()} >= {
        "medusa_lm_head.safetensors",
        "medusa_tree.json",
        "medusa_calibration.json",
        "train.jsonl",
        "curves.svg",
    }
    model = str(folder / "model")
    # On a GPU the default settings would capture a hundred graphs.
    few: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "tree": 4, "kv_cache_tokens": 1024}
    llm = LLM(EngineConfig(model=model, heads=str(heads), device=device, **few))
    assert llm.generate("t5 t6")[0].token_ids
    rows = read_shard(out / "held-out.tokens.xz")[1]
    assert len(rows) == parts["collect"]["held_out_rows"] > 0
    keys = {row.key for row in load_shards([unpacked(folder, "data-0.tar")])}
    assert len(keys) == parts["distil"]["rows"]
    assert {row.key for row in rows} < keys


def test_a_stage_that_fails_costs_no_figures_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")

    def answered(stages: gpu_heads.Stages, _run: Run) -> dict[str, Any]:
        write_rows(stages.work / "data" / "1", random_rows(30, 64), 64)
        return {"rows": 30}

    monkeypatch.setattr(gpu_heads, "train", failing)
    monkeypatch.setattr(gpu_heads.Stages, "distil", answered)
    code, results = make(tmp_path, "cpu", "--minutes", "3")
    assert code == 1
    assert "the device is lost" in results["parts"]["train"]["error"]
    assert len(load_shards([unpacked(tmp_path, "data-0.tar")])) == 30


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_prompts_to_heads_that_serve(tmp_path: Path) -> None:
    """Without a GPU tests/test_fake_cuda.py runs it. Its device is asked for by name."""
    # Each stage ends when it has done all there is; most of the time goes to compiling.
    code, results = make(tmp_path, "cuda", "--minutes", "4", "--workers", "2", asked=40)
    results["parts"]["distil"]["exit_codes"] = sorted(set(results["parts"]["distil"]["exit_codes"]))
    held_to_what_comes_back(tmp_path, code, results, "cuda")


def shell(root: Path, *arguments: str, fails_on: str = "nothing") -> subprocess.CompletedProcess[str]:
    """gpu.sh with a `python3` that writes down how it was called, in a folder of its own.

    Args:
        fails_on: calls whose last argument ends so fail.
    """
    stand_in = root / "bin" / "python3"
    stand_in.parent.mkdir(exist_ok=True)
    noted = f'#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH|$*" >>{root}/calls\n'
    stand_in.write_text(noted + f'case "$*" in *{fails_on}) exit 1;; esac\n')
    stand_in.chmod(0o755)
    (root / "benchmarks").mkdir(exist_ok=True)
    (root / "benchmarks" / "gpu.sh").write_bytes((ROOT / "benchmarks" / "gpu.sh").read_bytes())
    (root / "there").mkdir(exist_ok=True)
    environment = {
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "TMPDIR": str(root / "there"),
        "HOME": str(root / "home"),
        "OUT": str(root / "out"),
    }
    command = ["bash", "benchmarks/gpu.sh", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def called(root: Path) -> list[tuple[str, list[str]]]:
    """PYTHONPATH and arguments of each call so far."""
    lines = (root / "calls").read_text().splitlines()
    return [(path, rest.split()) for path, rest in (line.split("|", 1) for line in lines)]


def test_the_script_for_a_bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three calls put the model together and start what our own parsers take."""
    (tmp_path / ".gpu" / "whl").mkdir(parents=True)
    (tmp_path / ".gpu" / "whl" / "some.whl").touch()
    for number in range(3):
        (tmp_path / ".gpu" / f"part{number}").write_bytes(b"part %d, " % number)
    (tmp_path / ".gpu" / "prompts.jsonl.xz").touch()
    assert "part 0 is not there" in shell(tmp_path, "heads").stdout
    assert not (tmp_path / "calls").exists()

    assert shell(tmp_path, "heads0").returncode == 0
    (tmp_path / ".gpu" / "part0").unlink()
    assert "part 1 is not there" in shell(tmp_path, "heads").stdout
    assert shell(tmp_path, "keep").returncode == 0
    (tmp_path / ".gpu" / "part1").unlink()
    assert shell(tmp_path, "heads", "--minutes", "7").returncode == 0
    (tmp_path / ".gpu" / "prompts.jsonl.xz").rename(tmp_path / "prompts")
    assert shell(tmp_path, "second", "--parts", "http").returncode == 0
    site = tmp_path / "there" / "medusa-serve-gpu" / "site"
    (_, install), (path, steps), (_, tests), (_, model), (_, heads), *more = called(tmp_path)
    assert install[-1] == ".gpu/whl/some.whl"
    assert path == f"{site}:{tmp_path}"
    assert tests[:2] == ["-m", "pytest"]
    assert (ROOT / tests[-1]).samefile(__file__)
    assert gpu.parse([*steps[2:], "--device", "cpu", "--tiny"]).cases == [(256, 256)]
    assert Path(model[-1]).read_bytes() == b"part 0, part 1, part 2, "
    assert more[0][1] == model
    assert gpu.parse([*more[1][1][2:], "--device", "cpu", "--tiny"]).parts == ["http"]
    (tmp_path / "prompts").rename(tmp_path / ".gpu" / "prompts.jsonl.xz")
    monkeypatch.chdir(tmp_path)
    args = gpu_heads.parse([*heads[2:], "--device", "cpu"])
    assert (args.minutes, args.output) == (7.0, tmp_path / "out")
    assert args.prompts.is_file()


def test_each_call_has_room_for_what_it_carries() -> None:
    """The tree travels with each, so what is committed must leave room for the parts of the model's wheel."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    first, second = (int(size) for size in re.findall(r"^PART\d=(\d+)$", script, re.MULTILINE))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tree = sum(
        (ROOT / name).lstat().st_size for name in names.decode().split("\0") if (ROOT / name).is_file()
    )
    wheels, model, prompts, most = 14_000_000, 92_871_040, 1_200_000, 64 << 20
    assert max(wheels + first, second, model - first - second + prompts) + tree < most


THERE = {
    *("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "jinja2", "filelock", "numba"),
    *("tqdm", "uvloop", "prometheus-client", "httpx", "typer", "pyyaml"),
}
"""What the lent machines' image holds of our dependencies."""


def test_the_bare_machine_gets_what_it_lacks_of_our_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}  # type: ignore[index]
    carried = re.search(r"PACKAGES='([^']*)'", (ROOT / "benchmarks" / "gpu.sh").read_text())
    assert carried is not None
    assert needed - set(carried[1].split()) == THERE
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(carried[1].split()) <= pinned


def test_what_was_compiled_and_measured_there_is_there_the_next_time(tmp_path: Path) -> None:
    (tmp_path / ".gpu" / "whl").mkdir(parents=True)
    (tmp_path / ".gpu" / "whl" / "some.whl").touch()
    (tmp_path / ".gpu" / "part0").touch()
    (tmp_path / "out").mkdir()
    kept = [".triton/cache/AB12/k.cubin", ".cache/medusa-serve/products-1.json"]
    kept += [".cache/medusa-serve/attention-2.json"]
    left = [
        ".cache/medusa-serve/smollm2/model.safetensors",
        ".cache/medusa-serve/other.json",
        ".cache/x.json",
    ]
    for name in kept + left:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text(name)
    assert shell(tmp_path, "caches").returncode == 0
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "out" / "caches.tar.xz").rename(tmp_path / ".gpu" / "caches.tar.xz")
    assert shell(tmp_path, "first").returncode == 0
    found = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert sorted(str(file.relative_to(tmp_path / "home")) for file in found) == sorted(kept)
    assert all(file.read_text() == str(file.relative_to(tmp_path / "home")) for file in found)


def test_the_script_runs_the_tests_marked_cuda_in_a_call_of_their_own(tmp_path: Path) -> None:
    (tmp_path / ".gpu" / "whl").mkdir(parents=True)
    (tmp_path / ".gpu" / "whl" / "some.whl").touch()
    (tmp_path / "out").mkdir()
    done = shell(tmp_path, "tests", "20")
    assert done.returncode == 0
    (_, install), (path, engine), (_, kernels) = called(tmp_path)
    assert install[-1] == ".gpu/whl/some.whl"
    assert path.endswith(f"site:{tmp_path}")
    assert engine[:2] == kernels[:2] == ["-m", "pytest"]
    assert (ROOT / engine[-1]).is_file()
    assert kernels[-2:] == ["tests/engine", f"--ignore={engine[-1]}"]
    assert re.findall(r"== (\w+): exit code 0", done.stdout) == ["engine", "kernels"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"engine.log", "kernels.log"}
    failed = shell(tmp_path, "tests", fails_on="test_engine_cuda.py")
    assert failed.returncode == 1
    assert len(called(tmp_path)) == 6, "the kernels' tests run all the same"
