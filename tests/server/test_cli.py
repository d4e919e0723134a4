"""The command line, generated from the settings."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.lifecycle
from server import __version__
from server.cli import app
from server.settings import Settings, option_name

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **environment})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of each server the command would have run."""
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(server.lifecycle, "run", run)
    return seen


def test_version() -> None:
    assert invoke("--version") == (0, f"medusa-serve {__version__}\n", "")


def test_help_shows_every_setting_with_its_default() -> None:
    code, out, _ = invoke("serve", "--help")
    assert code == 0
    for name, field in Settings.model_fields.items():
        assert ("MODEL" if name == "model" else option_name(name)) in out
        if field.default is not None:
            assert f"[default: {field.default}]" in " ".join(out.split())


def test_help_of_training_shows_what_kind_of_value_is_meant() -> None:
    code, out, _ = invoke("train", "--help")
    assert code == 0
    words = " ".join(out.split())
    for shown in (
        "--heads INT ",
        "--lr FLOAT ",
        "--vocabulary INT|full ",
        "--output PATH ",
        "--minutes FLOAT ",
    ):
        assert shown in words
    assert not re.search(r"--\S+ <str>", out)


def test_options_environment_and_file(started: list[Settings], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("port: 1001\nhost: 10.0.0.1\ntree: off\nmax_waiting: 7\n")
    arguments = ["serve", "some/model", "--config", str(config), "--port", "3003", "--heads", "none"]
    code, _, err = invoke(*arguments, MEDUSA_PORT="2002", MEDUSA_HOST="10.0.0.2")
    assert code == 0, err
    (settings,) = started
    assert (settings.model, settings.port, settings.host) == ("some/model", 3003, "10.0.0.2")
    assert (settings.tree, settings.heads, settings.max_waiting) == ("off", "none", 7)


@pytest.mark.parametrize(("given", "tree"), [("off", "off"), ("33", 33), ("1", 1)])
def test_tree(started: list[Settings], given: str, tree: object) -> None:
    assert invoke("serve", "--tree", given)[0] == 0
    assert started[0].tree == tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "many"], "error: --port: must be a valid integer"),
        (["--port", "70000"], "error: --port: must be less than or equal to 65535"),
        (["--tree", "65"], "error: --tree: must be 'auto', 'off' or a number of nodes from 1 to 64"),
        (["--tree", "maybe"], "error: --tree: must be 'auto', 'off' or a number of nodes from 1 to 64\n"),
        (["--lookup", "0"], "error: --lookup: must be 'on', 'off' or a number of nodes from 1 to 63\n"),
        (["--dtype", "float8"], "error: --dtype: must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--config", "/none.yaml"], "error: cannot read /none.yaml: No such file or directory"),
        (["--prot", "1"], "No such option: --prot"),
    ],
)
def test_bad_value_is_one_clear_line_and_exit_code_2(
    started: list[Settings], arguments: list[str], message: str
) -> None:
    code, _, err = invoke("serve", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert message.startswith("No such") or len(err.splitlines()) == 1
    assert not started


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'uvicorn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=30)
    assert result.returncode == 1
    expected = f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    assert result.stderr == expected


def test_model_that_does_not_load_is_one_line_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", str(tmp_path), "--port", "0"]
    env = {**os.environ, "MEDUSA_PROT": "8001"}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=env, check=False, timeout=60
    )
    assert result.returncode == 1
    assert "did_you_mean=MEDUSA_PORT" in result.stderr.splitlines()[0]
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
