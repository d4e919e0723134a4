"""Tells the log when a step of the engine is stuck, and where."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback

import structlog

from server.context import ServerContext

__all__ = ["watch_steps"]

log = structlog.stdlib.get_logger("server.watchdog")


async def watch_steps(context: ServerContext) -> None:
    """Look at the step under way until cancelled; /health and /ready look for themselves."""
    limit = context.settings.step_timeout
    if not limit:
        return
    told = False
    while True:
        await asyncio.sleep(min(1.0, limit / 4))
        if context.stuck and not told:
            age = round(context.engine.stats.step_age(), 1)
            log.error("step_stuck", step_age_s=age, step_timeout_s=limit, stack=_engine_stack())
        elif told and not context.stuck:
            log.warning("step_ended_after_all")
        told = context.stuck


def _engine_stack() -> str:
    """Where the engine's thread is now; empty if there is none."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread.name == "engine"]
    stacks = [traceback.format_stack(frames[t.ident]) for t in threads if t.ident in frames]
    return "".join(line for stack in stacks for line in stack)
