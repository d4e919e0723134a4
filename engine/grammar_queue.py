"""Grammars of requests for an engine in a process of its own, compiled while its steps go on."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

from engine.errors import told
from engine.grammar import CompilerThreads, Grammar, GrammarCompiler, GrammarSpec, KeptGrammars
from engine.types import FinishReason, Request, TokenDelta
from engine.worker import EngineWorker

__all__ = ["GrammarQueue"]


class GrammarQueue:
    """Adds requests to an engine, those with a grammar when that is compiled. One thread may use it.

    Each grammar has been compiled in the server's process before, and is kept here by the same bounds.

    Args:
        compiler: the model's.
        worker: of the engine.
    """

    def __init__(self, compiler: GrammarCompiler, worker: EngineWorker) -> None:
        self._compiler, self._worker = compiler, worker
        self._threads = CompilerThreads()
        self._lock = threading.Lock()
        self._kept: KeptGrammars[Grammar] = KeptGrammars()
        self._waiting: dict[GrammarSpec, list[Request]] = {}
        """For grammars that are being compiled, each once for all who have asked by then."""
        self._behind: dict[str, list[int | None]] = {}
        """Aborts of requests whose grammars are being compiled: choices, or None for all."""

    def add(self, request: Request, spec: GrammarSpec | None) -> None:
        """Have the engine take a request, which has come without its grammar."""
        if spec is None:
            self._worker.add(request)
            return
        with self._lock:
            if (grammar := self._kept.get(spec)) is not None:
                self._worker.add(replace(request, grammar=grammar))
                return
            self._behind[request.request_id] = []
            if (waiting := self._waiting.get(spec)) is not None:
                waiting.append(request)
                return
            self._waiting[spec] = [request]
        self._threads.submit(self._compile, spec)

    def abort(self, request_id: str, index: int | None) -> None:
        """Have the engine drop a request or one choice of it, once it has been added."""
        with self._lock:
            if (behind := self._behind.get(request_id)) is not None:
                behind.append(index)
                return
        self._worker.abort(request_id, index)

    def _compile(self, spec: GrammarSpec) -> None:
        grammar, failed = None, ""
        try:
            grammar = self._compiler.compile(spec)
        except BaseException as error:  # a panic of llguidance's is no Exception
            failed = told(error)
        with self._lock:
            if grammar is not None:
                self._kept.put(spec, grammar)
            for request in self._waiting.pop(spec):
                if grammar is None:
                    self._worker.put(partial(_errors, request, failed))
                else:
                    self._worker.add(replace(request, grammar=grammar))
                for index in self._behind.pop(request.request_id):
                    self._worker.abort(request.request_id, index)


def _errors(request: Request, error: str) -> list[TokenDelta]:
    return [
        TokenDelta(request.request_id, index, [], FinishReason.ERROR, error=error)
        for index in range(request.sampling.n)
    ]
