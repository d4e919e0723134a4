"""What stands before the tensors of a GGUF file, and where these lie.

gguf's own `GGUFReader` makes several numpy arrays of every string, which takes eight seconds for a vocabulary
of 128 thousand tokens. The format is that of ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["GgufHeader", "GgufTensor", "dequantized", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the first had lengths of 32 bits, for two months of 2023
_MAX_DIMENSIONS = 4
_MAX_VALUES = 1 << 23  # of an array: the longest are merges, of which no known vocabulary has a million
_MAX_STRING = 1 << 26  # bytes; the longest are chat templates
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter for each other type of a value."""
_BOOL, _UINT32, _UINT64 = _NUMBERS[7], _NUMBERS[4], _NUMBERS[10]


class GgufTensor(NamedTuple):
    """Where a tensor lies in its file.

    Args:
        type: ggml's name of it, `Q8_0`.
        shape: as numpy has it, the innermost dimension last; of quantised ones too, in values.
        offset, bytes: from the file's beginning.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GgufHeader(NamedTuple):
    """The metadata by key, arrays as lists, and the tensors by name in the file's order."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """All of the metadata, held against the file's size.

    Raises:
        ValueError: it is no GGUF, of an unknown version or of the other byte order, damaged or not whole.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _header(_Cursor(data))
            except struct.error:  # how a number beyond the end is reported
                raise ValueError(_cut(len(data))) from None


class _Cursor:
    """Reads values of a file one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.place = len(_MAGIC)

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        length = struct.calcsize(f"<{letter}") * count  # where there are fewer bytes, unpack_from says so
        start, self.place = self.place, self.place + length
        if letter == _BOOL and (others := set(self.data[start : self.place]) - {0, 1}):
            raise ValueError(f"a truth value at byte {start} or behind is {min(others)}")
        return struct.unpack_from(f"<{count}{letter}", self.data, start)

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, size, place = self.data, self.size, self.place
        length_at = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = place + 8
                place = start + length_at(data, place)[0]
                if place > size:
                    raise ValueError(_cut(size))
                if place - start > _MAX_STRING:
                    raise ValueError(f"the string at byte {start} has {place - start} bytes")
                found.append(data[start:place].decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"the string at byte {start} is not UTF-8 ({error.reason})") from error
        self.place = place
        return found

    def value(self, key: str) -> Any:
        kind = self.number(_UINT32)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_letter(kind, key))
        kind, count = self.number(_UINT32), self.number(_UINT64)
        if count > self.size:
            raise ValueError(_cut(self.size))
        if kind == _ARRAY:
            raise ValueError(f"{key!r} is a list of lists, which nothing here needs")
        if count > _MAX_VALUES:
            raise ValueError(f"{key!r} has {count} values, and {_MAX_VALUES} are the most")
        return self.strings(count) if kind == _STRING else list(self.numbers(_letter(kind, key), count))


def _letter(kind: int, key: str) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"the type of {key!r} is unknown ({kind})")
    return _NUMBERS[kind]


def _cut(size: int) -> str:
    return f"it is cut off: it ends after {size} bytes, in the midst of what describes it"


def _header(cursor: _Cursor) -> GgufHeader:
    version = cursor.number(_UINT32)
    if version and version & 0xFFFF == 0:
        raise ValueError(
            "it is for machines of the other byte order; gguf-convert-endian FILE little turns it"
        )
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    tensor_count, field_count = cursor.numbers(_UINT64, 2)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise ValueError(f"it has {key!r} twice")
        fields[key] = cursor.value(key)
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r} is no power of two")
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name, tensor = _tensor(cursor)
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        tensors[name] = tensor
    start = math.ceil(cursor.place / alignment) * alignment
    for name, tensor in tensors.items():
        if tensor.offset % alignment:
            raise ValueError(f"the tensor {name!r} does not lie at a multiple of {alignment} bytes")
        placed = tensors[name] = tensor._replace(offset=start + tensor.offset)
        if (end := placed.offset + placed.bytes) > cursor.size:
            raise ValueError(
                f"it is cut off: it has {cursor.size} bytes, and the tensor {name!r} ends at byte {end}"
            )
    return GgufHeader(fields, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """Name, and place from where the tensors begin."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = cursor.string(), cursor.number(_UINT32)
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {dimensions} dimensions")
    sizes: tuple[int, ...] = cursor.numbers(_UINT64, dimensions)  # the innermost first
    number, offset = cursor.number(_UINT32), cursor.number(_UINT64)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"the type of the tensor {name!r} is unknown ({number})") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if (sizes or (1,))[0] % block:
        raise ValueError(f"rows of {sizes[0]} in the tensor {name!r} are not made of whole blocks of {block}")
    return name, GgufTensor(kind.name, sizes[::-1], offset, math.prod(sizes) // block * block_bytes)


def dequantized(data: np.memmap[Any, Any], tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """The tensor's values in float32, of its shape.

    Args:
        data: the whole file, uint8.
        tensor: its place there.

    Raises:
        UnsupportedModelError: of a type that gguf does not dequantise.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

    raw = data[tensor.offset : tensor.offset + tensor.bytes]
    if tensor.type == "F32":
        return raw.view(np.float32).reshape(tensor.shape).copy()  # the file's own cannot be written to
    kind = GGMLQuantizationType[tensor.type]
    try:
        return dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"GGUF tensors of type {tensor.type} are not supported") from error
