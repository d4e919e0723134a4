"""Tells the log when a step of the engine is stuck, and where."""

from __future__ import annotations

import asyncio

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
        stuck = context.stuck
        if stuck and not told:
            age = round(context.engine.stats.step_age(), 1)
            log.error("step_stuck", step_age_s=age, step_timeout_s=limit, stack=await context.engine.stack())
        elif told and not stuck:
            log.warning("step_ended_after_all")
        told = stuck
