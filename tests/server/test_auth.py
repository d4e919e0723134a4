"""API keys and what browsers may do, with real clients."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from engine.errors import ConfigError
from server.auth import ApiKeys
from tests.server.conftest import MODEL, RunningServer, Serve, says, wait_until

KEYS = ("sk-first-1234", "sk-second-5678")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# two clients\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    return file


def client(server: RunningServer, key: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=10, http_client=http
    )


def test_only_the_keys_of_the_file_and_the_environment_are_served(
    serve: Serve, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDUSA_API_KEY", "sk-env-1")
    monkeypatch.setenv("MEDUSA_API_KEYS", "sk-env-2, sk-env-3")
    server = serve(says("hi"), api_key_file=key_file)
    for key in (*KEYS, "sk-env-1", "sk-env-2", "sk-env-3"):
        with client(server, key) as good:
            answer = good.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
            assert answer.choices[0].message.content == "hi"
    for key in ("sk-first-123", "sk-first-12345", "SK-FIRST-1234", "sk-env-2,", "none", "# two clients"):
        with client(server, key) as bad, pytest.raises(openai.AuthenticationError) as caught:
            bad.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert len(server.engine.submitted) == 5


def test_what_needs_a_key(serve: Serve, key_file: Path) -> None:
    server = serve(says("hi"), api_key_file=key_file)
    for path in ("/health", "/ready", "/metrics"):
        assert server.http.get(path).status_code == 200
    for path in ("/v1/models", "/version", "/docs", "/openapi.json", "/nowhere"):
        assert server.http.get(path).status_code == 401, path
        authorized = server.http.get(path, headers={"Authorization": f"bearer {KEYS[0]}"})
        assert authorized.status_code == (404 if path == "/nowhere" else 200)
    for header in (KEYS[0], f"Basic {KEYS[0]}", "Bearer", "Bearer \xe9"):
        refused = server.http.get("/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
        assert refused.status_code == 401


def test_a_key_is_shown_nowhere(serve: Serve, key_file: Path, log_lines: object) -> None:
    server = serve(says("hi"), api_key_file=key_file)
    for key in (KEYS[0], "sk-wrong-9999"):
        server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    server.chat()  # without a key
    assert callable(log_lines)
    wait_until(lambda: sum(line["event"] == "request" for line in log_lines()) == 3)
    shown = [str(log_lines()), server.http.get("/metrics").text]
    shown += [repr(ApiKeys.load(key_file)), str(vars(ApiKeys.load(key_file)))]
    for text in shown:
        assert "sk-" not in text
    assert [line["status"] for line in log_lines() if line["event"] == "request"] == [200, 401, 401]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read --api-key-file"),
        ("# none\n", "holds no API key"),
        ("two words\n", "line 1: an API key must be printable ASCII without spaces"),
        ("# a\n\nsk-1\nschlüssel\n", "line 4: an API key must be printable ASCII without spaces"),
    ],
)
def test_a_bad_key_file_is_told_before_anything_is_loaded(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.load(file, {"MEDUSA_API_KEYS": "sk-2,sk-3"})  # which are counted apart
    assert str(file) in str(caught.value)
    assert "schl" not in str(caught.value)
    assert "words" not in str(caught.value)


def test_a_bad_key_in_the_environment_is_told_with_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"^MEDUSA_API_KEYS: an API key must be") as caught:
        ApiKeys.load(None, {"MEDUSA_API_KEY": "sk-1", "MEDUSA_API_KEYS": "sk-2,two words"})
    assert "words" not in str(caught.value)


def test_no_key_set_is_no_check() -> None:
    assert ApiKeys.load(None, {}) is None
    assert ApiKeys.load(None, {"MEDUSA_API_KEY": "", "MEDUSA_API_KEYS": " , "}) is None


def preflight(server: RunningServer, origin: str) -> dict[str, str]:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    answer = server.http.options("/v1/chat/completions", headers=headers)
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_browsers_are_let_in_from_the_origins_that_are_named(serve: Serve, key_file: Path) -> None:
    server = serve(says("hi"), api_key_file=key_file, cors_origins="https://a.example, http://localhost:3000")
    for origin in ("https://a.example", "http://localhost:3000"):
        allowed = preflight(server, origin)
        assert allowed["access-control-allow-origin"] == origin
        assert "authorization" in allowed["access-control-allow-headers"]
        refused = server.http.get("/v1/models", headers={"Origin": origin})  # no key: the page may read why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
    assert "access-control-allow-origin" not in preflight(server, "https://b.example")


def test_browsers_are_kept_out_by_default(serve: Serve) -> None:
    server = serve(says("hi"))
    assert preflight(server, "https://a.example") == {}
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers={"Origin": "x"}).headers
