"""Models on the Hugging Face hub: the real client, in a process of its own, with a small hub of ours."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.engine.model.adapters import save_adapter
from tests.support import save_model, tiny_llama

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the repository someone/model, at tag v2 too, and notes who asked for what."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.asked: list[str] = []
        self.keys: set[str | None] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "someone/model" in path:  # not what the client asks for its own purposes
            self.server.keys.add(self.headers["Authorization"])
        if path in ("/api/models/someone/model/revision/v2", "/api/models/someone/model/revision/main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            content = json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/someone/model/tree/{COMMIT}":
            files = self.server.files.items()
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files]
            content = json.dumps(tree).encode()
        elif path.startswith(f"/someone/model/resolve/{COMMIT}/"):
            name = path.partition(f"{COMMIT}/")[2]
            self.server.asked.append(name)
            content = self.server.files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at what was asked."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = save_model(tiny_llama(), tmp_path / "repository")
    for name in ("additional_chat_templates/tool_use.jinja", "onnx/model.json", "original/params.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(hub: Hub, home: Path, *arguments: str, **environment: str) -> str:
    variables = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    result = subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_info_needs_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    arguments = ("-m", "server.cli", "info", "someone/model", "--revision", "v2", "--device", "cpu", "--json")
    found = json.loads(run(hub, tmp_path / "home", *arguments))
    assert (found["architecture"], found["num_layers"]) == ("LlamaForCausalLM", 2)
    assert set(hub.asked) == {"config.json"}


def test_a_model_is_downloaded_at_its_revision_with_the_token(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from engine.model.weights import Checkpoint, resolve_model\n"
        "folder = resolve_model('someone/model', 'v2')\n"
        "print(folder.name, 'model.norm.weight' in Checkpoint(folder).names)"
    )
    home = tmp_path / "home"
    assert run(hub, home, "-c", code, HF_TOKEN="hf_secret").split() == [COMMIT, "True"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.asked)
    assert {name for name in hub.asked if "/" in name} == {"additional_chat_templates/tool_use.jinja"}
    assert hub.keys == {"Bearer hf_secret"}
    hub.asked.clear()
    assert run(hub, home, "-c", code, HF_HUB_OFFLINE="1").split() == [COMMIT, "True"]
    assert hub.asked == []


def test_an_adapter_is_downloaded_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path / "adapter")
    (folder / "training_args.bin").write_bytes(b"x")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = (
        "from engine.config import LoraSource\n"
        "from engine.model.adapter_files import read_adapters\n"
        "(adapter,) = read_adapters([LoraSource('someone/model', 0.5)])\n"
        "print(adapter.folder.name, adapter.identity.partition(' ')[0], *adapter.ranks)"
    )
    home = tmp_path / "home"
    assert run(hub, home, "-c", code).split() == [COMMIT, "model@0.5", "4"]
    assert set(hub.asked) == {"adapter_config.json", "adapter_model.safetensors"}
    hub.asked.clear()
    assert run(hub, home, "-c", code, HF_HUB_OFFLINE="1").split() == [COMMIT, "model@0.5", "4"]
    assert hub.asked == []
