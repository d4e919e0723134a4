"""LoRA adapters in PEFT's format: where they are, and what their files say.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors have the names of
transformers' modules behind `base_model.model.`:

- `x.lora_A.weight` [r, inputs] and `x.lora_B.weight` [outputs, r] (Hu et al. 2021, arXiv 2106.09685): the
  weight of x gets (B A) * s added, where s is alpha / r, or alpha / sqrt(r) with `use_rslora`;
  `x.lora_B.bias` [outputs] likewise to its bias;
- `x.lora_embedding_A` [r, tokens] and `x.lora_embedding_B` [hidden, r]: the same transposed;
- `x.lora_magnitude_vector` (DoRA, arXiv 2402.09353): the length of each row of the sum, of an embedding of
  each column;
- `x.token_adapter.trainable_tokens_delta`: rows that take the place of those in `trainable_token_indices`;
- any other, perhaps behind `x.base_layer.`: the whole tensor, of a module in `modules_to_save`, a trained
  bias, or embeddings that PEFT saves with their adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import LoraSource
from engine.errors import AdapterError, WeightsError
from engine.model.expert_files import as_published
from engine.model.files import SafetensorsFile
from engine.model.hub import fetch_files
from engine.model.text_part import as_text

__all__ = ["ADAPTER_CONFIG", "Adapter", "Factors", "Whole", "read_adapters"]

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_HUB_FILES = (ADAPTER_CONFIG, "adapter_model.*")

_PREFIX, _BASE_LAYER = "base_model.model.", ".base_layer."
_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(weight|bias))?")
_ROWS = ".token_adapter.trainable_tokens_delta"

_MERGED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "peft_type"}
"""Settings that are read here; `trainable_token_indices` too."""

_TOLD_BY_TENSORS = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "lora_bias",
    "ensure_weight_tying",  # both of the tied tensors are there then
    "fan_in_fan_out",  # a layout of the base model's weights, which no family here has
}
_OF_TRAINING = {
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "lora_dropout",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",  # which has no effect without use_qalora
    "runtime_config",
}
_REFUSED = {
    "alora_invocation_tokens": "it is to act behind certain tokens only (aLoRA), so it cannot be merged",
    "arrow_config": "it chooses among adapters for each token (Arrow), so it cannot be merged",
    "layer_replication": "it is for a model whose layers are repeated (layer_replication)",
    "target_parameters": "it changes parameters that are no linear layer, as of stacked experts "
    "(target_parameters)",
    "use_qalora": "QA-LoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
}

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of `init_lora_weights` that change the weights under the adapter before it is trained."""

_MAX_NAMED = 8


@dataclass(slots=True)
class Factors:
    """What is added to one module's weight and bias: names in the adapter's file, "" for none.

    `embedding`: a and b are of the weight's transpose. `scale`: s and the setting's own factor, multiplied.
    """

    scale: float
    a: str = ""
    b: str = ""
    bias: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """What takes a tensor's place, by its name in the adapter's file; `rows`: of these rows alone.

    `saved_beside`: PEFT saves it with an adapter that changes it, trained or not.
    """

    name: str
    rows: tuple[int, ...] | None = None
    saved_beside: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its files say it, with the model's names for what it changes.

    Args:
        source: as the setting names it.
        scale: the setting's factor.
        folder: where it is.
        file: its tensors.
        factors: by the module that they change.
        whole: by the tensor.
        told: for each name that it changes, the adapter's own.
        digest: SHA-256 of both files, hexadecimal.
        base_model: what it was trained on, as its config says.
    """

    source: str
    scale: float
    folder: Path
    file: SafetensorsFile
    factors: Mapping[str, Factors]
    whole: Mapping[str, Whole]
    told: Mapping[str, str]
    digest: str
    base_model: str | None = None

    @property
    def identity(self) -> str:
        """Equal where it is merged to the same weights, but for its name."""
        return f"{Path(self.source).name}@{self.scale:g} sha256:{self.digest[:16]}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ones of its factors."""
        return tuple(sorted({self.file.shape(each.a)[0] for each in self.factors.values() if each.a}))


def read_adapters(sources: Iterable[LoraSource]) -> tuple[Adapter, ...]:
    """Find each and read what it is, but for its values.

    Raises:
        AdapterError: it is of a kind that is not covered, or damaged; the text names what is.
        ModelError: it is not there, or the hub cannot be reached.
    """
    return tuple(_read(source, scale) for source, scale in sources)


def _read(source: str, scale: float) -> Adapter:
    folder = _find(source)
    config = _read_config(folder / ADAPTER_CONFIG)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        told = f"{', '.join(others)}, not " if others else "no "
        raise AdapterError(
            f"adapter {source} holds {told}{_WEIGHTS}"
            + ("; load it in PEFT and save it with save_pretrained" if others else "")
        )
    try:
        file = SafetensorsFile(weights)
    except WeightsError as error:
        raise AdapterError(f"cannot read the adapter: {error}") from error
    digest = hashlib.sha256()
    for path in (folder / ADAPTER_CONFIG, weights):
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    parsed = _Parsed(f"adapter {source}", config, scale)
    for name in file.names():
        parsed.take(name)
    parsed.check(file)
    return Adapter(
        source=source,
        scale=scale,
        folder=folder,
        file=file,
        factors=parsed.factors,
        whole=parsed.whole,
        told=parsed.told,
        digest=digest.hexdigest(),
        base_model=config.get("base_model_name_or_path") or None,
    )


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return path
        raise AdapterError(f"adapter {source} holds no {ADAPTER_CONFIG}, so it is none in PEFT's format")
    if path.is_file():
        raise AdapterError(
            f"adapter {source} is a file; name the folder that PEFT saved, with {ADAPTER_CONFIG}"
        )
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise AdapterError(f"adapter folder {source} does not exist")
    folder = fetch_files(source, None, _HUB_FILES, what="adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"adapter {source} on the hub holds no {ADAPTER_CONFIG}, so it is none of PEFT's")
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    """The config, refused where it asks for what is not done here."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object")
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"{path}: adapters of type {kind} are not supported; supported is LORA")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise AdapterError(f"{path}: {reason}")
    known = _MERGED | _TOLD_BY_TENSORS | _OF_TRAINING | _REFUSED.keys()
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        raise AdapterError(
            f"{path}: {', '.join(unknown[:_MAX_NAMED])} is not known here, and may change what is to be "
            "merged; merge it with PEFT (merge_and_unload), or take out what has no effect"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: it was trained over weights that its beginning had changed (init_lora_weights "
            f"{start!r}); save it with PEFT's path_initial_model_for_weight_conversion, or merge it there"
        )
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(config.get(name)) not in kinds:
            raise AdapterError(f"{path}: {name} must be a number, got {config.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise AdapterError(f"{path}: {name} must be an object, got {config[name]!r}")
    return config


@dataclass(slots=True)
class _Parsed:
    """An adapter's tensors by what they are."""

    where: str
    config: Mapping[str, Any]
    scale: float
    factors: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, Whole] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    def take(self, stored: str) -> None:
        """Take a tensor in by its name."""
        if not stored.startswith(_PREFIX):
            raise AdapterError(f"{self.where}: {stored} does not begin with {_PREFIX}, as PEFT's tensors do")
        bare = stored.removeprefix(_PREFIX)
        if found := _FACTOR.fullmatch(bare):
            self._take_factor(stored, *found.groups())
            return
        whole = Whole(stored, saved_beside=bare.endswith(f"{_BASE_LAYER}weight"))
        if bare.endswith(_ROWS):
            module = bare.removesuffix(_ROWS)
            whole, bare = Whole(stored, rows=self._indices(module)), f"{module}.weight"
        if self.scale != 1.0 and not whole.saved_beside:
            raise AdapterError(
                f"{self.where}: {stored} takes a tensor's place, which the factor {self.scale:g} cannot scale"
            )
        name = _in_model(bare.replace(_BASE_LAYER, "."))
        self.whole[name], self.told[name] = whole, stored

    def _take_factor(self, stored: str, module: str, part: str, kind: str | None) -> None:
        name = _in_model(f"{module}.weight").removesuffix(".weight")
        factors = self.factors.setdefault(name, Factors(0.0))
        self.told.setdefault(name, f"{_PREFIX}{module}")
        factors.scale = self._scale_of(module)
        if part.startswith("embedding"):
            factors.embedding, part = True, part.removeprefix("embedding_")
        if kind == "bias":
            if part != "B":
                raise AdapterError(f"{self.where}: {stored} is not known here")
            factors.bias = stored
        elif part == "magnitude_vector":
            factors.magnitude = stored
        elif part == "A":
            factors.a = stored
        else:
            factors.b = stored

    def _indices(self, module: str) -> tuple[int, ...]:
        stated = self.config.get("trainable_token_indices")
        if isinstance(stated, dict):
            stated = next((rows for name, rows in stated.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(stated, list) or not all(type(row) is int and row >= 0 for row in stated):
            raise AdapterError(
                f"{self.where}: trainable_token_indices does not name rows of {module}: {stated!r}"
            )
        return tuple(stated)

    def _scale_of(self, module: str) -> float:
        rank = self._rank_of(module)
        alpha = self.scale * float(self._setting("lora_alpha", "alpha_pattern", module))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _rank_of(self, module: str) -> int:
        rank = self._setting("r", "rank_pattern", module)
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{self.where}: the rank of {module} is {rank!r}; it must be 1 or more")
        return rank

    def _setting(self, name: str, patterns: str, module: str) -> Any:
        """By the first pattern that ends the name, as in PEFT (`get_pattern_key` in its utils/other.py)."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        raise AdapterError(f"{self.where}: {patterns} has {value!r} for {pattern}")
                    return value
            except re.error as error:
                raise AdapterError(f"{self.where}: {patterns} has {pattern!r}: {error}") from error
        return self.config[name]

    def check(self, file: SafetensorsFile) -> None:
        """That the parts of each module are all there, and of the rank that the config says.

        Raises:
            AdapterError: they are not.
        """
        if not self.told:
            raise AdapterError(f"{self.where} holds no tensors")
        dora = bool(self.config.get("use_dora"))
        for name, factors in self.factors.items():
            module = self.told[name]
            kind = "lora_embedding_" if factors.embedding else "lora_"
            for part, stored in (("A", factors.a), ("B", factors.b)):
                if not stored:
                    raise AdapterError(f"{self.where}: {module}.{kind}{part} is missing")
            if dora is not bool(factors.magnitude):
                there = "has a" if factors.magnitude else "has no"
                raise AdapterError(
                    f"{self.where}: {module} {there} lora_magnitude_vector, and use_dora is {dora}"
                )
            rank = self._rank_of(module.removeprefix(_PREFIX))
            a, b = file.shape(factors.a), file.shape(factors.b)
            if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
                raise AdapterError(
                    f"{self.where}: {factors.a} {list(a)} and {factors.b} {list(b)} are not of the rank "
                    f"that the config says, {rank}"
                )


def _in_model(name: str) -> str:
    """The model's name for a tensor that transformers has in memory by this one."""
    return as_published(as_text(name))
