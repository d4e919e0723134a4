"""Grammars for requests: compiled off the event loop, and kept for requests that ask for the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from engine.errors import RequestError
from engine.grammar import CompilerThreads, Grammar, GrammarCompiler, GrammarSpec, KeptGrammars

__all__ = ["Grammars"]

IDLE_POLL_S = 1.0

log = structlog.stdlib.get_logger("server.grammars")


class Grammars:
    """Compiles grammars in threads of its own. Used from one event loop.

    Args:
        compiler: the model's.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = CompilerThreads()
        self._kept: KeptGrammars[asyncio.Future[Grammar]] = KeptGrammars()

    async def compiled(self, spec: GrammarSpec) -> Grammar:
        """The grammar; requests at once for the same one wait for one compilation.

        Raises:
            RequestError: as `GrammarCompiler.compile`; without `param`, since several may wait.
        """
        job = self._kept.get(spec)
        if job is None:
            loop = asyncio.get_running_loop()
            job = loop.run_in_executor(self._threads, self._compiler.compile, spec)
            self._kept.put(spec, job)
            job.add_done_callback(partial(self._drop_failed, spec))
        return await asyncio.shield(job)  # one that waits may be cancelled; the others go on

    async def prepare(self, idle: Callable[[], bool], spec: GrammarSpec) -> None:
        """Compile `spec` as soon as the server is idle, so that the first user does not wait for it.

        The first grammar of all has the tokenizer read, a second and more of it without letting any other
        thread run. At the start that would delay the first answers, and with the first request for a
        grammar it would stall every stream beside it; between requests nobody notices.

        Args:
            idle: whether nothing runs or waits.
            spec: a grammar that many ask for.
        """
        await asyncio.sleep(IDLE_POLL_S)
        while not idle():
            await asyncio.sleep(IDLE_POLL_S)
        try:
            await self.compiled(spec)
        except RequestError as error:
            log.warning("no_grammars", reason=str(error))

    def close(self) -> None:
        """Compile nothing more. What is under way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _drop_failed(self, spec: GrammarSpec, job: asyncio.Future[Grammar]) -> None:
        if job.cancelled() or job.exception() is not None:
            self._kept.drop(spec, job)
