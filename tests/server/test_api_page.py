"""/docs: whole without internet where its package is there, and a hint where it is not."""

from __future__ import annotations

import re
import sys

import pytest

from tests.server.conftest import RunningServer, Serve, says


def test_with_its_package_nothing_comes_from_elsewhere(hello: RunningServer) -> None:
    page = hello.http.get("/docs").text
    assert "url: '/openapi.json'" in page
    parts = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {part.rpartition(".")[2] for part in parts} == {"css", "js", "png"}
    for part in parts:
        assert part.startswith("/")
        assert hello.http.head(part).status_code == 200
    assert b"SwaggerUIBundle" in hello.http.get(next(part for part in parts if part.endswith(".js"))).content
    assert hello.http.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_without_it_the_page_says_what_to_do(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi_offline", None)
    server = serve(says("x"))
    page = server.http.get("/docs").text
    assert "https://cdn.jsdelivr.net" in page
    assert "url: '/openapi.json'" in page
    shown = re.search(r'<div id="swagger-ui">(.*?)</div>', page, re.S)
    assert shown is not None
    assert "pip install fastapi-offline" in shown[1]
    assert server.http.head("/docs").status_code == 200
    assert "/docs" not in server.http.get("/openapi.json").json()["paths"]
