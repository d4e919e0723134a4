"""What an operator polls."""

from __future__ import annotations

from engine.fake import FakeEngine
from server import __version__
from tests.server.conftest import RunningServer, Serve, says


def test_healthy_ready_and_version(hello: RunningServer) -> None:
    assert hello.http.get("/health").status_code == 200
    assert hello.http.get("/ready").status_code == 200
    assert hello.http.get("/version").json() == {"version": __version__}


def test_draining_server_is_healthy_but_not_ready(serve: Serve) -> None:
    engine = FakeEngine(says("x"))
    server = serve(engine)
    server.in_loop(engine.stop())
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 503
