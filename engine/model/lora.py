"""LoRA adapters merged into a checkpoint's tensors as these are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import AdapterError
from engine.model.adapter_files import Adapter, Factors, Whole
from engine.model.files import TensorFile
from engine.model.text_part import is_vision

__all__ = ["MergedFile", "part_tied"]

log = logging.getLogger(__name__)

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MAX_NAMED = 8


@dataclass(slots=True)
class _Changes:
    """What the adapters make of one tensor, in their order.

    Args:
        whole: what takes its place.
        rows: what takes the place of some of its rows.
        factors: what is added to it then; of a bias, where its name is `bias`.
    """

    whole: list[tuple[Adapter, Whole]] = field(default_factory=list)
    rows: list[tuple[Adapter, Whole]] = field(default_factory=list)
    factors: list[tuple[Adapter, Factors]] = field(default_factory=list)


def part_tied(adapters: Iterable[Adapter]) -> bool:
    """Whether an embedding that is `lm_head` too is no longer so with these: one of the two is changed alone,
    or each in its own way. Rows of the embedding are changed in both."""
    return any(
        "model.embed_tokens" in adapter.factors
        or "lm_head" in adapter.factors
        or _LM_HEAD in adapter.whole
        or (_EMBEDDING in adapter.whole and adapter.whole[_EMBEDDING].rows is None)
        for adapter in adapters
    )


class MergedFile:
    """The checkpoint with adapters merged: W + s * (B A) in float32, one after the other.

    A tensor is merged when it is read, so that none but that one is held.

    Args:
        files: the checkpoint's tensors by the names they are read by, quantised ones dequantised.
        adapters: what to merge, in this order.
        tied: the model's `lm_head` is its embedding. Where only one of the two is changed, or each in its own
            way, they are two matrices from then on: see `untied`.
        mxfp4: the checkpoint's experts are in 4 bits, which take no adapter: on CUDA they stay so.
        leaves_vision: the checkpoint's vision tensors are left out, and so are the adapters'.

    Raises:
        AdapterError: a tensor of theirs fits nothing here, or is of another shape; it is named.
    """

    def __init__(
        self,
        files: Mapping[str, TensorFile],
        adapters: Sequence[Adapter],
        *,
        tied: bool,
        mxfp4: bool = False,
        leaves_vision: bool = False,
    ) -> None:
        self._files, self._tied = files, tied
        self._changes: dict[str, _Changes] = {}
        for adapter in adapters:
            self._take(adapter, mxfp4, leaves_vision)
        self._check_one_whole()
        self.untied = tied and part_tied(adapters)
        """Whether `lm_head` is no longer the embedding, which it was."""

    @property
    def changed(self) -> Iterable[str]:
        """The tensors that are not as they were."""
        return self._changes.keys()

    def names(self) -> Iterable[str]:
        return {*self._files, _LM_HEAD} if self.untied else self._files.keys()

    def get(self, name: str) -> Tensor:
        """As the checkpoint has it, or merged in float32.

        Raises:
            AdapterError: what takes its place is damaged.
        """
        base = self._replaced(name)
        merged = base
        for adapter, factors in self._changes.get(name, _Changes()).factors:
            if name.endswith(".bias"):
                merged = _read(adapter, factors.bias).mul_(factors.scale).add_(merged)
            else:
                merged = _added(adapter, factors, merged, base)
        return merged

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._source(name)
        return self._files[source].shape(source)

    def _source(self, name: str) -> str:
        return _EMBEDDING if self._tied and name == _LM_HEAD else name

    def _replaced(self, name: str) -> Tensor:
        """Before anything is added."""
        source = self._source(name)
        changes = self._changes.get(name, _Changes())
        tensor = _read(*changes.whole[0]) if changes.whole else self._files[source].get(source)
        rows = changes.rows
        if source != name and source in self._changes:  # rows that are trained alone stay tied
            rows = [*self._changes[source].rows, *rows]
        for adapter, each in rows:
            tensor = tensor.float().index_copy(0, torch.tensor(each.rows), _read(adapter, each))
        return tensor

    def _take(self, adapter: Adapter, mxfp4: bool, leaves_vision: bool) -> None:
        where = f"adapter {adapter.source}"
        unknown: list[str] = []
        changed, of_vision = set(), set()

        def known(name: str, stored: str) -> bool:
            if mxfp4 and ".mlp.experts." in name:
                raise AdapterError(f"{where} changes {stored}: experts in MXFP4 stay as they are")
            if leaves_vision and is_vision(name):
                of_vision.add(name)
                return False
            if self._source(name) not in self._files:
                unknown.append(stored)
                return False
            changed.add(name)
            return True

        for name, whole in adapter.whole.items():
            if known(name, whole.name):
                self._take_whole(adapter, name, whole)
        for module, factors in adapter.factors.items():
            if known(f"{module}.weight", factors.a):
                self._take_factors(adapter, module, factors)
            if factors.bias and known(f"{module}.bias", factors.bias):
                self._fits(adapter, factors.bias, self.shape(f"{module}.bias"))
                self._of(f"{module}.bias").factors.append((adapter, factors))
        if unknown:
            more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
            raise AdapterError(
                f"{where} fits nothing in the model with {', '.join(unknown[:_MAX_NAMED])}{more}"
            )
        if not changed:
            raise AdapterError(f"{where} changes what sees images alone, and the model is served without it")
        if of_vision:
            log.info("%s: %d changes to what sees images are left out, as that is", where, len(of_vision))
        log.info(
            "%s changes %d tensors; it was trained on %s",
            where,
            len(changed),
            adapter.base_model or "a model that it does not name",
        )

    def _take_whole(self, adapter: Adapter, name: str, whole: Whole) -> None:
        shape = self.shape(name)
        if whole.rows is None:
            self._fits(adapter, whole.name, shape)
            self._of(name).whole.append((adapter, whole))
            return
        if max(whole.rows, default=0) >= shape[0]:
            raise AdapterError(
                f"adapter {adapter.source}: trainable_token_indices has {max(whole.rows)}, and {name} "
                f"{shape[0]} rows"
            )
        self._fits(adapter, whole.name, (len(whole.rows), *shape[1:]))
        self._of(name).rows.append((adapter, whole))

    def _take_factors(self, adapter: Adapter, module: str, factors: Factors) -> None:
        name = f"{module}.weight"
        shape = self.shape(name)
        if len(shape) != 2:
            raise AdapterError(f"adapter {adapter.source}: {factors.a} is of {name} {list(shape)}, no matrix")
        outputs, inputs = shape[::-1] if factors.embedding else shape
        rank = adapter.file.shape(factors.a)[0]
        self._fits(adapter, factors.a, (rank, inputs))
        self._fits(adapter, factors.b, (outputs, rank))
        if factors.magnitude:
            self._fits(adapter, factors.magnitude, (outputs,))
        self._of(name).factors.append((adapter, factors))

    def _fits(self, adapter: Adapter, stored: str, wanted: tuple[int, ...]) -> None:
        if (shape := adapter.file.shape(stored)) != wanted:
            hint = ""
            if "lm_head" in stored or "embed_tokens" in stored:
                hint = "; if it was trained with tokens added, the model has to have them too"
            raise AdapterError(
                f"adapter {adapter.source}: {stored} is {list(shape)}, the model needs {list(wanted)}{hint}"
            )

    def _of(self, name: str) -> _Changes:
        return self._changes.setdefault(name, _Changes())

    def _check_one_whole(self) -> None:
        """Raises AdapterError where two adapters put something else in a tensor's place."""
        for name, changes in self._changes.items():
            for first, other in zip(changes.whole, changes.whole[1:], strict=False):
                if not torch.equal(_read(*first), _read(*other)):
                    raise AdapterError(
                        f"adapters {first[0].source} and {other[0].source} both take the place of {name}, "
                        "with other values; merge one of them alone"
                    )


def _read(adapter: Adapter, stored: str | Whole) -> Tensor:
    """A tensor of the adapter in float32, a copy.

    Raises:
        AdapterError: it holds NaN or infinities.
    """
    name = stored if isinstance(stored, str) else stored.name
    tensor = adapter.file.get(name).to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise AdapterError(f"adapter {adapter.source} is damaged: {name} holds values that are not finite")
    return tensor


def _added(adapter: Adapter, factors: Factors, weight: Tensor, base: Tensor) -> Tensor:
    """The weight with the adapter in it, float32; `base` is what no adapter was added to.

    The sums are PEFT's (`get_delta_weight` and `merge` in its tuners/lora/layer.py, `merge_unsafe` in
    variants.py), so that in float32 the result is the same to the bit.
    """
    delta = torch.mm(_read(adapter, factors.b), _read(adapter, factors.a))
    if factors.embedding:
        delta = delta.t()
    delta.mul_(factors.scale)
    if not factors.magnitude:
        return delta.add_(weight)
    # DoRA: rows, of an embedding columns, of the lengths that were learnt.
    along = 0 if factors.embedding else 1
    lengths = torch.linalg.vector_norm(base.float() + delta, dim=along, keepdim=True)
    magnitude = _read(adapter, factors.magnitude).unsqueeze(along)
    return delta.add_(weight).mul_(magnitude.div_(lengths))
