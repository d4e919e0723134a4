"""Head files: where they are, and what their tensors say, whichever project wrote them.

Formats are told apart by the names of the tensors; a config is asked only for what these leave open.

- Official (FasterDecoding/Medusa, medusa_model.py; TGI's version "2"): `{i}.{j}.linear.weight|bias` of head
  i's residual layer j, and `{i}.{layers}.weight`, the head's own lm_head. Without it heads share one:
  `lm_head.weight` where the file has it, else the base model's.
- Medusa-2 (medusa_model_new.py): the same as `medusa_head.{i}.…` inside the base model's own shards.
- vLLM (model_executor/models/medusa.py): `blocks.{i}.layers.{j}.weight`, the bias optional,
  `lm_heads.{i}.weight`, or one `lm_head.weight` (`original_lm_head`).

In any of them `token_map` [draft_vocab] lists the tokens the heads draft from: row r of an lm_head stands
for token `token_map[r]`. An lm_head of all tokens is cut to these rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import HeadsError, WeightsError
from engine.model.files import SafetensorsFile, TorchFile

__all__ = ["JOINT_PREFIX", "HeadTensors", "TensorSource", "joint_heads", "read_heads"]

JOINT_PREFIX = "medusa_head."
"""Of the heads' tensors inside a Medusa-2 base model."""

TensorSource = Mapping[str, Callable[[], Tensor]]
"""Tensors by name, each read when it is asked for."""

# In a folder, the first that is there. Heads saved as a model of their own (vLLM's) and Medusa-2 models
# have a model's file names.
_FILES = (
    "medusa_lm_head.safetensors",
    "medusa_lm_head.safetensors.index.json",
    "medusa_lm_head.pt",
    "medusa_lm_head.bin",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".pt", ".bin", ".json")
# What to fetch from the hub, in turn, until one of _FILES is there.
_HUB_PATTERNS = (
    ("medusa_lm_head.*",),
    ("*.safetensors", "*.safetensors.index.json"),
    ("*.bin", "*.bin.index.json"),
)

_LAYER = re.compile(r"(?:(\d+)\.(\d+)\.linear|blocks\.(\d+)\.layers\.(\d+))\.(weight|bias)")
_OWN_LM_HEAD = re.compile(r"(?:(\d+)\.(\d+)|lm_heads\.(\d+))\.weight")
_PREFIX = re.compile(r"medusa_heads?\.")
_SHARED_LM_HEAD, _TOKEN_MAP = "lm_head.weight", "token_map"


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """Heads as their files hold them, checked against the base model's sizes; on the CPU, in stored dtypes.

    Args:
        weights: [layers][heads] of [hidden, hidden].
        biases: the same of [hidden]; None where the layers have none.
        num_heads: how many there are.
        lm_heads: [draft_vocab or vocab, hidden], one per head, one for all, or none: the base model's.
        token_map: [draft_vocab] int64, the token of each row of an lm_head; None: row r is token r.
    """

    weights: list[list[Tensor]]
    biases: list[list[Tensor]] | None
    num_heads: int
    lm_heads: list[Tensor]
    token_map: Tensor | None


def read_heads(source: str, *, hidden_size: int, vocab_size: int) -> HeadTensors:
    """Read a head file, a folder or a hub repository.

    Args:
        source: a .safetensors, .pt or .bin file (or a shard index), a folder that holds one, or a hub id.

    Raises:
        HeadsError: not found, unreadable, or not matching the base model; the text names the tensor.
    """
    file = _find(source)
    config = file.parent / "config.json"
    values = _read_json(config) if config.is_file() else {}
    return _parse(_open(file), str(file), values, hidden_size, vocab_size)


def joint_heads(tensors: TensorSource, where: str, *, hidden_size: int, vocab_size: int) -> HeadTensors:
    """The heads inside a Medusa-2 model, from its tensors that start with `JOINT_PREFIX`.

    Raises:
        HeadsError: as `read_heads`.
    """
    joint = {name: read for name, read in tensors.items() if name.startswith(JOINT_PREFIX)}
    return _parse(joint, where, {}, hidden_size, vocab_size)


# --- what the tensors say


@dataclass(slots=True)
class _Names:
    """The tensors' names by what they are."""

    heads: set[int] = field(default_factory=set)  # every head that any name speaks of
    weights: dict[tuple[int, int], str] = field(default_factory=dict)  # (head, layer) to name
    biases: dict[tuple[int, int], str] = field(default_factory=dict)
    own: dict[int, str] = field(default_factory=dict)
    shared: str | None = None
    token_map: str | None = None
    other: list[str] = field(default_factory=list)


def _parse(
    tensors: TensorSource, where: str, config: Mapping[str, Any], hidden_size: int, vocab_size: int
) -> HeadTensors:
    if any(name.startswith(JOINT_PREFIX) for name in tensors):  # a whole Medusa-2 model: the heads of it
        tensors = {name: read for name, read in tensors.items() if name.startswith(JOINT_PREFIX)}
    names = _classify(tensors)
    if not names.weights and not names.own:
        raise HeadsError(
            f"{where} holds no tensor like 0.0.linear.weight or blocks.0.layers.0.weight; "
            "is it a Medusa head file?"
        )
    num_heads, num_layers = _check(names, where)

    def take(name: str, *shapes: tuple[int, ...]) -> Tensor:
        tensor = tensors[name]()
        if tuple(tensor.shape) not in shapes:
            needed = " or ".join(str(list(shape)) for shape in shapes)
            raise HeadsError(f"{where}: {name} has shape {list(tensor.shape)}, the model needs {needed}")
        return tensor

    grid = [[(i, j) for i in range(num_heads)] for j in range(num_layers)]
    token_map = _token_map(tensors, names.token_map, where, config, vocab_size)
    rows = {vocab_size} if token_map is None else {len(token_map), vocab_size}
    shapes = [(count, hidden_size) for count in sorted(rows)]
    lm_heads = [take(name, *shapes) for name in _lm_heads(names, num_heads, where, config)]
    return HeadTensors(
        weights=[[take(names.weights[at], (hidden_size, hidden_size)) for at in layer] for layer in grid],
        biases=[[take(names.biases[at], (hidden_size,)) for at in layer] for layer in grid]
        if names.biases
        else None,
        num_heads=num_heads,
        lm_heads=lm_heads if token_map is None else [_cut(rows, token_map) for rows in lm_heads],
        token_map=token_map,
    )


def _cut(lm_head: Tensor, token_map: Tensor) -> Tensor:
    return lm_head if len(lm_head) == len(token_map) else lm_head[token_map]


def _classify(tensors: Iterable[str]) -> _Names:
    names = _Names()
    own_at: dict[int, list[tuple[int, str]]] = {}  # official: head to (index in the head, name)
    for name in tensors:
        prefix = _PREFIX.match(name)
        bare = name[prefix.end() :] if prefix else name
        if found := _LAYER.fullmatch(bare):
            head, layer = int(found[1] or found[3]), int(found[2] or found[4])
            names.heads.add(head)
            (names.weights if found[5] == "weight" else names.biases)[head, layer] = name
        elif found := _OWN_LM_HEAD.fullmatch(bare):
            head = int(found[1] or found[3])
            names.heads.add(head)
            if found[3] is not None:
                names.own[head] = name
            else:
                own_at.setdefault(head, []).append((int(found[2]), name))
        elif bare == _SHARED_LM_HEAD:
            names.shared = name
        elif bare == _TOKEN_MAP:
            names.token_map = name
        else:
            names.other.append(name)
    for head, candidates in own_at.items():
        num_layers = sum(at == head for at, _ in names.weights)
        for index, name in candidates:
            if index == num_layers:  # the lm_head stands behind the residual layers
                names.own[head] = name
            else:
                names.other.append(name)
    return names


def _check(names: _Names, where: str) -> tuple[int, int]:
    """(heads, layers): heads are 0 … n - 1, equally deep, and all with biases or none."""
    num_heads = max(names.heads) + 1
    layers = {i: {layer for head, layer in names.weights if head == i} for i in range(num_heads)}
    num_layers = len(layers[0])
    for head, its in layers.items():
        if head not in names.heads:
            raise HeadsError(f"{where}: there is a head {num_heads - 1} and no head {head}")
        if its != set(range(num_layers)):
            raise HeadsError(f"{where}: head {head} has layers {sorted(its)}, head 0 has {num_layers}")
    names.other += [name for at, name in names.biases.items() if at not in names.weights]
    if names.other:
        listed = ", ".join(sorted(names.other)[:8])
        raise HeadsError(f"{where}: unexpected tensors {listed} ({len(names.other)} in all)")
    official = any(name.endswith(".linear.weight") for name in names.weights.values())
    if names.biases or official:
        for at, name in names.weights.items():
            if at not in names.biases:
                raise HeadsError(f"{where}: tensor {name.removesuffix('weight')}bias is missing")
    return num_heads, num_layers


def _lm_heads(names: _Names, num_heads: int, where: str, config: Mapping[str, Any]) -> list[str]:
    """Names of the lm_heads: one for each head, one for all, or none."""
    if config.get("original_lm_head"):  # vLLM: all share one, which may be stored as the first head's
        first = names.shared or names.own.get(0)
        return [first] if first is not None else []
    if len(names.own) == num_heads:
        return [names.own[i] for i in range(num_heads)]
    if names.shared is not None:
        return [names.shared]
    if names.own:
        example = next(iter(names.own.values()))
        lacking = sorted(set(range(num_heads)) - names.own.keys())
        missing = ", ".join(re.sub(r"\d+", str(head), example, count=1) for head in lacking)
        raise HeadsError(f"{where}: some heads have their own lm_head and these do not: {missing}")
    return []


def _token_map(
    tensors: TensorSource, name: str | None, where: str, config: Mapping[str, Any], vocab_size: int
) -> Tensor | None:
    size = config.get("truncated_vocab_size")
    if name is None:
        if size is not None and size != vocab_size:
            raise HeadsError(
                f"{where}: config.json says truncated_vocab_size {size}, and no tensor token_map says which "
                f"of the model's {vocab_size} tokens these are"
            )
        return None
    token_map = tensors[name]()
    if token_map.dim() != 1 or token_map.is_floating_point() or token_map.dtype == torch.bool:
        found = f"{token_map.dtype} {list(token_map.shape)}"
        raise HeadsError(f"{where}: {name} must be a list of token ids, got {found}")
    token_map = token_map.to(torch.int64)
    if not len(token_map) or int(token_map.min()) < 0 or int(token_map.max()) >= vocab_size:
        raise HeadsError(f"{where}: {name} must hold token ids from 0 to {vocab_size - 1}")
    if len(token_map.unique()) != len(token_map):  # type: ignore[no-untyped-call]
        raise HeadsError(f"{where}: {name} lists a token twice")
    if size is not None and size not in (len(token_map), vocab_size):
        raise HeadsError(
            f"{where}: {name} lists {len(token_map)} tokens, and config.json says truncated_vocab_size {size}"
        )
    return token_map


# --- where the tensors are


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if file := _in_folder(path):
            return file
        raise HeadsError(f"{path} holds no head file; looked for {', '.join(_FILES)}")
    if path.suffix in _SUFFIXES or source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise HeadsError(f"head file {source} does not exist")
    return _download(source)


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def _download(source: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import errors, snapshot_download

    try:
        for patterns in _HUB_PATTERNS:
            folder = Path(snapshot_download(source, allow_patterns=["config.json", *patterns]))
            if file := _in_folder(folder):
                return file
    except errors.GatedRepoError as error:
        raise HeadsError(
            f"heads {source} are gated: accept their terms at https://huggingface.co/{source}, then set "
            "HF_TOKEN"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, HTTPError, OSError) as error:
        raise HeadsError(f"no heads at {source}, neither a local path nor on the hub: {error}") from error
    raise HeadsError(f"{source} on the hub holds no head file; looked for {', '.join(_FILES)}")


def _open(file: Path) -> TensorSource:
    """All tensors of a file, or of the shards an index names."""
    if file.suffix != ".json":
        return _open_one(file)
    weight_map = _read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeadsError(f"{file} has no weight_map, so it is not an index of shards")
    if any(name.startswith(JOINT_PREFIX) for name in weight_map):  # leave the base model's shards closed
        weight_map = {name: shard for name, shard in weight_map.items() if name.startswith(JOINT_PREFIX)}
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not (file.parent / shard).is_file():
            raise HeadsError(f"{file} names {shard}, which is not there; download the heads again")
        shards[shard] = _open_one(file.parent / shard)
    if lacking := [name for name, shard in weight_map.items() if name not in shards[shard]]:
        raise HeadsError(f"{file} names {lacking[0]}, which {weight_map[lacking[0]]} does not hold")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_one(file: Path) -> TensorSource:
    try:
        opened = SafetensorsFile(file) if file.suffix == ".safetensors" else TorchFile(file)
    except WeightsError as error:
        raise HeadsError(f"cannot read the head file: {error}") from error
    return {name: partial(opened.get, name) for name in opened.names()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise HeadsError(f"{path} must hold a JSON object")
    return value
