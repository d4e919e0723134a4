"""transformers' configs without the half of torch and transformers that only its own models need."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["import_validators"]

_ACTIVATIONS = "transformers.activations"
_VALIDATORS = "transformers.utils.type_validators"


def import_validators() -> None:
    """Import what the configs check their fields with, and leave out what it imports for a single table.

    Its validators import the activations for their names; with these come transformers' kernels, its loading
    of weights, torch's distributed tensors, Dynamo and sympy: two and a half seconds, a third of a server's
    start. So the table is put off until it is asked for, which the configs of our families never do.
    A transformers that is built otherwise takes its own way.
    """
    import transformers  # noqa: F401  # the package itself, whose import may bring either

    if _ACTIVATIONS in sys.modules or _VALIDATORS in sys.modules:
        return
    stand_in = _StandIn(_ACTIVATIONS)
    sys.modules[_ACTIVATIONS] = stand_in
    try:
        import_module(_VALIDATORS)
    except ImportError:
        pass  # there is no such module, or it wants more: who needs it will say so
    finally:
        stand_in.make_way()


class _StandIn(ModuleType):
    """In the module's place while it is not needed."""

    def __getattr__(self, name: str) -> Any:
        if name == "ACT2FN":
            return _Table()
        if name.startswith("__"):
            raise AttributeError(name)  # what the import itself looks for
        self.make_way()
        return getattr(import_module(_ACTIVATIONS), name)

    def make_way(self) -> None:
        if sys.modules.get(_ACTIVATIONS) is self:
            del sys.modules[_ACTIVATIONS]


class _Table(Mapping[str, Any]):
    """`ACT2FN`, imported when it is first looked into."""

    def _table(self) -> Mapping[str, Any]:
        table: Mapping[str, Any] = import_module(_ACTIVATIONS).ACT2FN
        return table

    def __getitem__(self, name: str) -> Any:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())
