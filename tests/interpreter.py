"""Triton's interpreter, without half of its work: what it does anew at every call, and checks of overflow."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Have device functions called sooner, and sums of integers not checked for overflow.

    At each call of a device function the interpreter looks through all of Triton's language for what to
    replace. The launch has done so already; what a function sees beside it is replaced at its first call and
    stays. A Triton that is built otherwise keeps its own way.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "interpreter_builder")):
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, seen = interpreter._patch_lang, set[Any]()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn not in seen:
            patch(self.fn)
            seen.add(self.fn)
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
