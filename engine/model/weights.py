"""A model's files: where they are, what they say about generation, and their tensors into a model's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ModelError, RequestError, WeightsError
from engine.model.adapter_files import ADAPTER_CONFIG, Adapter
from engine.model.embedded import EMBEDDED_MODEL, ensure_converted
from engine.model.expert_files import ExpertsFile, has_experts
from engine.model.files import SafetensorsFile, TensorFile, TorchFile
from engine.model.gguf import GGUF_INDEX, GgufFile, gguf_folder
from engine.model.hub import fetch_file, fetch_files
from engine.model.lora import MergedFile
from engine.model.prequantized import MXFP4, DequantizedFile, stated_quantization
from engine.model.tekken import convert, find_tekken, split_as_stated
from engine.model.text_part import TextPartFile, has_vision_part
from engine.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "load_generation_defaults",
    "load_tokenizer",
    "load_weights",
    "resolve_model",
]

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_BIN_FILE = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_FORMATS: tuple[tuple[str, str, Callable[[Path], TensorFile]], ...] = (
    (INDEX_FILE, SINGLE_FILE, SafetensorsFile),
    (_BIN_INDEX, _BIN_FILE, TorchFile),
)
"""Names of an index and of a single file, the best format first."""

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_CONFIG_FILES = ("config.json", "quantize_config.json")
_HUB_BIN_FILES = ("pytorch_model*.bin",)
# Other formats' folders, though not the chat templates in theirs, and Mistral's second copy of the weights.
_HUB_IGNORED = ("*/*.json", "*/*.safetensors", "*/*.bin", "consolidated*")
_NOT_APPLIED = {"no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_MAX_NAMED = 8  # tensors an error names of each kind


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's publisher recommends; None where nothing is said.

    Args:
        temperature: for requests that name none.
        top_p: likewise.
        top_k: likewise; 0 keeps all.
        min_p: likewise.
        repetition_penalty: likewise.
        eos_token_ids: each of them ends an output; may be empty.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_ids: tuple[int, ...]

    def sampling(self) -> SamplingParams:
        """How a request is drawn that says nothing; it runs to the context's end.

        Raises:
            RequestError: a value is out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {name: getattr(self, name) for name in names}
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def resolve_model(name: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """A folder with config, tokenizer and weights, or the way to them.

    Args:
        name: "smollm2-135m" (embedded), a local folder or .gguf file, a Hugging Face hub id, or a hub id
            with the name of a .gguf file in it (owner/name/file.gguf).
        revision: branch, tag or commit; for a hub id only.
        config_only: of a hub id nothing but what `ModelConfig` reads is downloaded.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached; the text says what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_revision(revision, f"{name} is a local folder")
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            raise ModelError(f"{name} is an adapter: name the model it is for, and it as --lora {name}")
        return folder
    if name == EMBEDDED_MODEL:
        _refuse_revision(revision, f"{name} is embedded")
        return ensure_converted()
    if folder.is_file() and folder.suffix == ".gguf":
        _refuse_revision(revision, f"{name} is a local file")
        return gguf_folder(folder)
    if folder.exists():
        raise ModelError(f"model {name} is a file; name a .gguf, or the folder with config.json and weights")
    if name.endswith(".gguf") and name.count("/") == 2 and not name.startswith((".", "~", "/")):
        repository, _, file = name.rpartition("/")
        return gguf_folder(fetch_file(repository, revision, file, embedded=EMBEDDED_MODEL))
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ModelError(f"model folder {name} does not exist")
    return _download(name, revision, config_only=config_only)


def _refuse_revision(revision: str | None, why: str) -> None:
    if revision is not None:
        raise ModelError(f"revision {revision!r} has no effect, since {why}; leave it out")


def _download(name: str, revision: str | None, *, config_only: bool) -> Path:
    def fetch(files: tuple[str, ...]) -> Path:
        return fetch_files(name, revision, files, ignored=_HUB_IGNORED, embedded=EMBEDDED_MODEL)

    if config_only:
        return fetch(_CONFIG_FILES)
    folder = fetch(_HUB_FILES)
    return folder if any(folder.glob("*.safetensors")) else fetch((*_HUB_FILES, *_HUB_BIN_FILES))


def load_generation_defaults(folder: Path, source: str = "auto") -> GenerationDefaults:
    """Read `generation_config.json`, and config.json for the EOS ids if they are not in there.

    Sampling values count unless `do_sample` is false: transformers would not use them then, and where
    it is left out they are meant as a recommendation (vLLM takes them so).

    Args:
        folder: the model's.
        source: "auto" takes the model's file, "none" no sampling values, else it is a folder with another
            file, whose EOS ids count too. The model's own count where a source has none.

    Raises:
        ModelError: a file is not JSON or a value is not of its type, or `source` has no such file.
    """
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    if source not in ("auto", "none"):
        path = Path(source).expanduser() / "generation_config.json"
        if not path.is_file():
            raise ModelError(f"generation_config is 'auto', 'none' or a folder; there is no {path}")
        own = {"eos_token_id": generation.get("eos_token_id")}
        generation = own | {name: value for name, value in _read_json(path).items() if value is not None}
    sampling = generation if source != "none" and generation.get("do_sample") is not False else {}

    def number(key: str) -> float | None:
        value = sampling.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{path}: {key} must be a number, got {value!r}")
        return value

    if ignored := sorted(_NOT_APPLIED & {key for key, value in sampling.items() if value is not None}):
        log.warning("%s recommends %s, which this server does not apply", path, ", ".join(ignored))
    top_k = number("top_k")
    defaults = GenerationDefaults(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else max(0, int(top_k)),  # some write -1 for all tokens
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        eos_token_ids=_eos_token_ids(folder, generation),
    )
    try:
        defaults.sampling()
    except RequestError as error:
        raise ModelError(f"{path}: {error}") from error
    return defaults


def _eos_token_ids(folder: Path, generation: dict[str, Any]) -> tuple[int, ...]:
    config = _read_json(folder / "config.json")
    sources = (generation, config, config.get("text_config") or {})
    value: Any = next((v for s in sources if (v := s.get("eos_token_id")) is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"{folder}: eos_token_id must be an id or a list of ids, got {value!r}")
    return tuple(dict.fromkeys(ids))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, exactly as its tokenizer.json, or else its tekken.json, says where it has one.

    Raises:
        ModelError: it cannot be read.
    """
    tokenizer = _tokenizer_of(folder)
    path = folder / "chat_template.json"
    if not tokenizer.chat_template and path.is_file():  # where some models of text and images have it alone
        tokenizer.chat_template = _named_templates(_read_json(path).get("chat_template"), path)
    return tokenizer


def _named_templates(stated: Any, path: Path) -> Any:
    """One template, or several by name: `transformers` itself reads lists in tokenizer_config.json alone."""
    if not isinstance(stated, list):
        return stated
    try:
        return {each["name"]: each["template"] for each in stated}
    except (LookupError, TypeError) as error:
        raise ModelError(f"{path}: each template of chat_template must have a name and a template") from error


def _tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tekken = find_tekken(folder)
    if tekken is not None and not (folder / "tokenizer.json").is_file():
        return convert(tekken)
    load: Callable[..., PreTrainedTokenizerBase] = AutoTokenizer.from_pretrained
    if (folder / "tokenizer.json").is_file():
        # By name: for a `tokenizer_class` it knows (GPT2Tokenizer, LlamaTokenizer, …) transformers 5 takes
        # vocabulary and merges from the file but the splitting from the class, and splits digits wrong.
        load = PreTrainedTokenizerFast.from_pretrained
    try:
        tokenizer = load(folder, clean_up_tokenization_spaces=False, local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError, ImportError) as error:
        raise ModelError(f"cannot load the tokenizer of {folder}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises no subclass of its own
            raise
        raise ModelError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
    if tekken is not None:
        split_as_stated(tokenizer, tekken)
    return tokenizer


class Checkpoint:
    """The tensors of a model folder: safetensors, or else `pytorch_model.bin`, in one file or in shards.

    Headers are read at once, tensors when asked for, from a memory map. Of an AWQ or GPTQ checkpoint the
    dequantised tensors are given, of one with a vision model those of the text part under their own names.

    Args:
        mxfp4: experts that it holds in MXFP4 are to be given as kernels take them (see `ExpertsFile`).
        adapters: merged into its tensors as they are read (see `MergedFile`, `tied` too).

    Raises:
        AdapterError: an adapter does not fit.
        ModelError: the folder holds no config.json or no weights.
        UnsupportedModelError: the weights are quantised in a format that is not covered.
        WeightsError: a file is damaged, incomplete or missing; it is named.
    """

    def __init__(
        self, folder: Path, *, mxfp4: bool = False, adapters: Sequence[Adapter] = (), tied: bool = False
    ) -> None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json, so it is not a model folder")
        self.folder = folder
        self._file_of = _open_all(folder, mxfp4=mxfp4)
        if leaves_vision := has_vision_part(self._file_of):
            text = TextPartFile(self._file_of)
            self._file_of = dict.fromkeys(text.names(), text)
        self._quantized: DequantizedFile | None = None
        stated = stated_quantization(folder)
        if stated and stated.get("quant_method") != MXFP4:
            self._quantized = DequantizedFile(self._file_of, stated)
            self._file_of = dict.fromkeys(self._quantized.names(), self._quantized)
        self._experts: ExpertsFile | None = None
        if has_experts(self._file_of):
            self._experts = ExpertsFile(self._file_of, packed=mxfp4)
            self._file_of = dict.fromkeys(self._experts.names(), self._experts)
        self.adapters = tuple(adapters)
        self._merged: MergedFile | None = None
        if adapters:
            in_mxfp4 = stated is not None and stated.get("quant_method") == MXFP4
            self._merged = MergedFile(
                self._file_of, adapters, tied=tied, mxfp4=in_mxfp4, leaves_vision=leaves_vision
            )
            self._file_of = dict.fromkeys(self._merged.names(), self._merged)
        self.untied = self._merged is not None and self._merged.untied
        self.names: frozenset[str] = frozenset(self._file_of)

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU in its stored dtype; a view of the file, so do not write to it.

        Raises:
            WeightsError: there is no such tensor.
        """
        return self._lookup(name).get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header.

        Raises:
            WeightsError: there is no such tensor.
        """
        return self._lookup(name).shape(name)

    def is_padding(self, name: str) -> bool:
        """Whether the tensor says nothing: a bias of zeros that a quantiser wrote."""
        if self._merged is not None and name in self._merged.changed:
            return False
        return self._quantized is not None and self._quantized.is_padding(name)

    def told(self, name: str) -> str:
        """What the files call a tensor."""
        return name if self._experts is None else self._experts.told(name)

    def _lookup(self, name: str) -> TensorFile:
        if name not in self._file_of:
            raise WeightsError(f"{self.folder} holds no tensor {self.told(name)}")
        return self._file_of[name]


def _open_all(folder: Path, *, mxfp4: bool) -> dict[str, TensorFile]:
    """Each tensor's file, opened."""
    if (folder / GGUF_INDEX).is_file():
        gguf = GgufFile(folder / GGUF_INDEX, mxfp4=mxfp4)
        return dict.fromkeys(gguf.names(), gguf)
    for index, single, kind in _FORMATS:
        if (folder / index).is_file():
            return _open_shards(folder / index, kind)
        if (folder / single).is_file():
            file = kind(folder / single)
            return dict.fromkeys(file.names(), file)
    raise ModelError(_no_weights(folder))


def _open_shards(index: Path, kind: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    weight_map = _read_json(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map; download or export the model again")
    shards = sorted(set(weight_map.values()))
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise WeightsError(
            f"{index.name} names files that are not in {index.parent}: {_listed(absent)}; "
            "download the model again"
        )
    files = {shard: kind(index.parent / shard) for shard in shards}
    held = {shard: frozenset(file.names()) for shard, file in files.items()}
    if lacking := [name for name, shard in weight_map.items() if name not in held[shard]]:
        raise WeightsError(
            f"{index.name} names tensors that its files do not hold: {_listed(lacking)}; "
            "download the model again"
        )
    return {name: files[shard] for name, shard in weight_map.items()}


def load_weights(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    weight_map: Mapping[str, tuple[str, ...]],
    *,
    ignored: Collection[str] | Callable[[str], bool] = (),
    progress: bool = False,
    filled: Callable[[str], None] | None = None,
) -> None:
    """Fill each parameter in place, cast to its dtype, on its device.

    Args:
        checkpoint: where the tensors come from.
        parameters: the tensors to fill, by the model's own names.
        weight_map: for each of those names the checkpoint tensors that, joined along dimension 0, make it.
        ignored: checkpoint tensors that may be there unused (a tied `lm_head.weight`), or a test for
            such names. `rotary_emb.inv_freq`, which older checkpoints hold, always is one.
        progress: show a bar on stderr, if that is a terminal.
        filled: is told of each parameter that is whole, which it may replace.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; it names them, and nothing
            was filled.
    """
    from tqdm import tqdm

    _check(checkpoint, parameters, weight_map, ignored)
    bar = tqdm(
        parameters.items(),
        desc="loading weights",
        unit="tensor",
        leave=False,
        disable=None if progress else True,
    )
    with torch.no_grad():
        for name, parameter in bar:
            start = 0
            for source in weight_map[name]:
                tensor = checkpoint.get(source)
                if tensor.dim() == 0:
                    parameter.copy_(tensor)
                    continue
                parameter.narrow(0, start, len(tensor)).copy_(tensor)
                start += len(tensor)
            if filled is not None:
                filled(name)


def _check(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    weight_map: Mapping[str, tuple[str, ...]],
    ignored: Collection[str] | Callable[[str], bool],
) -> None:
    is_ignored = ignored if callable(ignored) else ignored.__contains__
    used = [source for name in parameters for source in weight_map[name]]
    missing = dict.fromkeys(checkpoint.told(source) for source in used if source not in checkpoint.names)
    unexpected = [
        checkpoint.told(name)
        for name in sorted(checkpoint.names.difference(used))
        if not is_ignored(name)
        and not name.endswith("rotary_emb.inv_freq")
        and not checkpoint.is_padding(name)
    ]
    misshapen = []
    for name, parameter in parameters.items():
        if checkpoint.names.issuperset(weight_map[name]):
            misshapen += _misshapen(checkpoint, weight_map[name], tuple(parameter.shape))
    problems = [
        f"{kind} ({len(names)}): {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(f"the tensors in {checkpoint.folder} do not fit the model. {'. '.join(problems)}")


def _misshapen(checkpoint: Checkpoint, sources: tuple[str, ...], wanted: tuple[int, ...]) -> list[str]:
    """What there is to say of tensors that do not make up a parameter."""
    shapes = [checkpoint.shape(source) for source in sources]
    # Experts' weights are of one size, and norms of heads are the same one over and over.
    alike = ".experts." in sources[0] or sources[0] in sources[1:]
    if not alike:
        found = " + ".join(str(list(shape)) for shape in shapes)
        told = f"{' + '.join(sources)} is {found}, not {list(wanted)}"
        return [told] if _joined(shapes) != wanted else []
    each = (wanted[0] // len(sources), *wanted[1:])
    odd = {source: shape for source, shape in zip(sources, shapes, strict=True) if shape != each}
    told_each = (f"{checkpoint.told(name)} is {list(shape)}, not {list(each)}" for name, shape in odd.items())
    return list(dict.fromkeys(told_each))


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of the tensors joined along dimension 0; None if they cannot be."""
    first = shapes[0]
    if len(shapes) == 1:
        return first
    if not first or any(shape[1:] != first[1:] for shape in shapes):
        return None
    return (sum(shape[0] for shape in shapes), *first[1:])


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if gguf := [name for name in others if name.endswith(".gguf")]:
        return f"{folder} holds weights as {_listed(gguf)}; name the file itself as the model"
    if others:
        return (
            f"{folder} holds weights as {_listed(others)} only, not as {SINGLE_FILE} or {_BIN_FILE} (or "
            "their indexes); load the model in transformers and save it with save_pretrained"
        )
    if stray:
        return f"{folder} holds {_listed(stray)}, but neither {SINGLE_FILE} nor {INDEX_FILE}"
    return f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _read_json(path: Path, error_type: type[ModelError] = ModelError) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_type(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object")
    return value
