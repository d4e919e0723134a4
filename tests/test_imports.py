"""The direction of imports, as pyproject.toml's contracts have it, and what is imported only where used."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import save_model, tiny_llama

ROOT = Path(__file__).parent.parent
SLOW = {"numba", "scipy", "sympy", "torch", "torchao", "transformers", "triton"}


def test_imports_run_one_way() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
    done = subprocess.run(
        [*lint, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imported(code: str, *arguments: str) -> set[str]:
    """Which of the slow or talkative packages a process has imported that ran this code."""
    told = f"import sys\n{code}\nprint('imported', *{SLOW!r} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", told, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import server.app, server.cli", set()),
        ("import engine.loader, server.lifecycle", {"torch"}),
        (
            "from server.cli import app\n"
            "for given in (['--help'], ['--version'], ['serve', '--help'], ['train', '--help']):\n"
            "    app(given, standalone_mode=False)",
            set(),
        ),
    ],
)
def test_a_command_waits_for_nothing_that_it_does_not_use(code: str, allowed: set[str]) -> None:
    assert imported(code) <= allowed


def test_a_server_on_the_cpu_does_without_torchao_and_sympy(tmp_path: Path) -> None:
    """Where the one is installed, it warns when it is imported; the other comes with seconds of imports."""
    folder = save_model(tiny_llama(), tmp_path)
    code = """
        from engine import warmup
        from engine.engine import Engine
        from engine.loader import load
        from engine.config import EngineConfig
        from engine.types import Request, SamplingParams
        warmup._WARM_S, warmup._ROUNDS, warmup._IN_A_ROW = 0.0, 1, 1
        few = {"device": "cpu", "max_num_seqs": 2, "kv_cache_tokens": 2048}
        for quantization in ("none", "int8"):
            engine = Engine(load(EngineConfig(model=sys.argv[1], quantization=quantization, **few)))
            engine.add(Request("r", (1, 2), SamplingParams(max_tokens=4)))
            while engine.has_work:
                engine.step()
    """
    assert not {"torchao", "sympy"} & imported(textwrap.dedent(code), str(folder))
