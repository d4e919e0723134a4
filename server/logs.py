"""Structured logs: one format for our lines and for those of the libraries below."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog

__all__ = ["configure_logging"]

_AT_LEAST_WARNING = ("sse_starlette", "uvicorn", "httpx", "httpcore", "urllib3", "filelock", "asyncio")
"""Their info is noise, and sse_starlette's debug lines hold the generated text."""


def configure_logging(
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["console", "json"],
    stream: TextIO | None = None,
) -> None:
    """Send every log line to `stream` (default: standard error) in one format, replacing earlier set-ups."""
    stream = stream or sys.stderr
    common: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor]
    if log_format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(),
                pad_event_to=0,
                sort_keys=False,
                # By default rich would print them, where it is installed, with each frame's local variables:
                # prompts and keys among them, and ten seconds of the event loop for one traceback.
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _AT_LEAST_WARNING:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *common,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
