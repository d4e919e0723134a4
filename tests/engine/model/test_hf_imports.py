"""tests/test_imports.py shows that a server's start imports less; here, that nothing is missing after it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import transformers.utils
import transformers.utils.type_validators as known

from engine.model.hf_imports import import_validators

ACTIVATIONS, VALIDATORS = "transformers.activations", "transformers.utils.type_validators"


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The validators as imported where nobody has asked for the activations."""
    monkeypatch.setattr(transformers.utils, "type_validators", known)  # puts it back
    monkeypatch.setattr(transformers, "activations", sys.modules[ACTIVATIONS])
    for name in (ACTIVATIONS, VALIDATORS):
        monkeypatch.delitem(sys.modules, name)
    import_validators()
    assert ACTIVATIONS not in sys.modules
    validators: ModuleType = sys.modules[VALIDATORS]
    assert validators is not known
    return validators


def test_the_activations_are_there_when_they_are_asked_for(anew: ModuleType) -> None:
    assert "relu" in anew.ACT2FN
    assert ACTIVATIONS in sys.modules
    assert "no such" not in anew.ACT2FN
    assert list(anew.ACT2FN.keys()) == list(known.ACT2FN.keys())
    assert len(anew.ACT2FN) == len(known.ACT2FN)


def test_what_is_imported_already_stays(anew: ModuleType) -> None:
    assert anew.ACT2FN["relu"]
    before = sys.modules[ACTIVATIONS], sys.modules[VALIDATORS]
    import_validators()
    assert (sys.modules[ACTIVATIONS], sys.modules[VALIDATORS]) == before


def test_another_transformers_takes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without such a module, and one whose validators want more of the activations than the table."""
    monkeypatch.setattr(transformers.utils, "type_validators", known)
    monkeypatch.setattr(transformers, "activations", sys.modules[ACTIVATIONS])
    for name in (ACTIVATIONS, VALIDATORS):
        monkeypatch.delitem(sys.modules, name)

    class More:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == VALIDATORS:
                from transformers.activations import get_activation

                assert get_activation("relu") is not None
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [More, *sys.meta_path])
    import_validators()
    assert isinstance(sys.modules[ACTIVATIONS].ACT2FN, dict)
    assert VALIDATORS not in sys.modules
