"""What a failure looks like in the log."""

from __future__ import annotations

import io
import logging

import pytest
import structlog

from server.logs import configure_logging
from tests.server.conftest import logs_as_before


def fail(prompt: str) -> None:
    raise RuntimeError(f"a prompt of {len(prompt)} characters")


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize(
    "logger", [structlog.stdlib.get_logger("server"), logging.getLogger("uvicorn.error")]
)
def test_a_traceback_holds_no_text_of_a_prompt(log_format: str, logger: logging.Logger) -> None:
    """Nor any other local variable; rich, which many a library brings along, would show them."""
    pytest.importorskip("rich")
    stream = io.StringIO()
    with logs_as_before():
        configure_logging("info", log_format, stream)  # type: ignore[arg-type]
        try:
            fail(" ".join(("my", "secret")))  # a traceback does show the source
        except RuntimeError:
            logger.exception("failed")
        structlog.reset_defaults()
    text = stream.getvalue()
    assert "in fail" in text
    assert "a prompt of 9 characters" in text
    assert "my secret" not in text
