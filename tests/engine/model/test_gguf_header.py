"""The reader of GGUF's metadata against gguf's own, and on files that are not what they should be."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import ModelError, UnsupportedModelError
from engine.model.embedded import find_gguf
from engine.model.gguf_header import GgufTensor, dequantized, read_header
from engine.model.weights import resolve_model
from tests.engine.model.gguf_files import write

NUMBERS = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60000,
    "int16": -30000,
    "uint32": 2**31 + 5,
    "int32": -(2**30),
}
NUMBERS |= {"uint64": 2**63 + 7, "int64": -(2**62), "float32": 0.1, "float64": 0.1}


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key.encode()) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return string(name.encode()) + numbers


def header(*entries: bytes, tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(entries))
    return b"GGUF" + counts + b"".join(entries) + b"".join(tensors)


def read_by_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: GgufTensor(
            tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset, tensor.n_bytes
        )
        for tensor in reader.tensors
    }
    return fields, tensors


def test_everything_is_read_as_gguf_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for kind, number in NUMBERS.items():
        getattr(writer, f"add_{kind}")(f"one.{kind}", number)
        writer.add_key_value(
            f"several.{kind}", [number] * 3, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind.upper()]
        )
    writer.add_bool("one.bool", True)
    writer.add_array("several.bool", [True, False, True])
    writer.add_string("one.text", "\u00e9\U0001f642\0")
    writer.add_array("several.texts", ["", "a", "\u65e5\u672c"])
    writer.add_tensor("f32", np.ones((3, 5), dtype=np.float32))
    writer.add_tensor("f16", np.ones(7, dtype=np.float16))
    writer.add_tensor("q8_0", np.ones((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert found == read_by_gguf(path)
    assert all(type(value) is type(found.fields[f"one.{kind}"]) for kind, value in NUMBERS.items())
    assert found.tensors["q8_0"].shape == (2, 32)


def test_the_embedded_models_file_is_read_as_gguf_reads_it() -> None:
    assert read_header(find_gguf()) == read_by_gguf(find_gguf())


UINT, TEXT, ARRAY, BOOL = 4, 8, 9, 7
PLACED = entry("general.alignment", UINT, struct.pack("<I", 64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "does not begin with GGUF"),
        (b"GGUF", "cut off: it ends after 4 bytes"),
        (header(version=1), "version is 1, and 2 and 3 are known"),
        (header(version=4), "version is 4, and"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
        (header(entry("a", 13, b"")), r"type of 'a' is unknown \(13\)"),
        (header(entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))), "'a' is a list of lists"),
        (header(entry("a", TEXT, string(b"\xff"))), "string at byte 45 is not UTF-8"),
        (header(entry("a", TEXT, struct.pack("<Q", 2**63))), "cut off: it ends after 45 bytes"),
        (header(entry("a", ARRAY, struct.pack("<IQ", TEXT, 2**60))), "cut off"),
        (header(entry("a", ARRAY, struct.pack("<IQ", UINT, 2**62))), "cut off"),
        (header(entry("a", BOOL, b"\x02")), "truth value at byte 37 or behind is 2"),
        (header(entry("a", BOOL, b"\1"), entry("a", BOOL, b"\1")), "has 'a' twice"),
        (header(entry("general.alignment", UINT, struct.pack("<I", 48))), "48 is no power of two"),
        (header(entry("general.alignment", UINT, struct.pack("<I", 0))), "0 is no power of two"),
        (header(entry("general.alignment", BOOL, b"\1")), "True is no power of two"),
        (header(entry("general.alignment", TEXT, string(b"32"))), "'32' is no power of two"),
        (header(tensors=(tensor("t", (1,) * 5),)), "'t' has 5 dimensions"),
        (header(tensors=(tensor("t", (4,), kind=4),)), r"type of the tensor 't' is unknown \(4\)"),
        (header(tensors=(tensor("t", (40, 4), kind=8),)), "rows of 40 .* not made of whole blocks of 32"),
        (header(tensors=(tensor("t", (4,)), tensor("t", (4,)))) + bytes(99), "the tensor 't' twice"),
        (header(PLACED, tensors=(tensor("t", (4,), offset=32),)) + bytes(199), "at a multiple of 64 bytes"),
        (
            header(tensors=(tensor("t", (16, 2)),)) + bytes(128),
            "193 bytes, and the tensor 't' ends at byte 224",
        ),
    ],
)
def test_what_is_no_whole_gguf_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    numbers = entry("numbers", ARRAY, struct.pack("<IQ3I", UINT, 3, 1, 2, 3))
    texts = entry("texts", ARRAY, struct.pack("<IQ", TEXT, 2) + string(b"ab") + string(b"c" * 22))
    whole = header(PLACED, numbers, texts, tensors=(tensor("t", (4,)),))
    assert len(whole) % 64 in range(1, 33)  # where the next multiple of 32 is none of 64
    whole += bytes(-len(whole) % 64 + 16)
    path.write_bytes(whole)
    assert read_header(path).tensors == {"t": GgufTensor("F32", (4,), len(whole) - 16, 16)}
    for size in range(4, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"it is cut off: it (ends after|has) \d+ bytes"):
            read_header(path)


def test_the_user_is_told_what_is_wrong_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, "llama", {})
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as a GGUF model: it is cut off: "):
        resolve_model(str(path))

    def fails(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("engine.model.gguf.read_header", fails)
    with pytest.raises(ModelError, match=r"cannot read .*tiny\.gguf: Permission denied"):
        resolve_model(str(path))


def test_tensors_of_types_that_are_not_dequantised_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(64))
    data = np.memmap(path, mode="r")
    with pytest.raises(UnsupportedModelError, match="GGUF tensors of type I32 are not supported"):
        dequantized(data, GgufTensor("I32", (4,), 0, 16))
    for kind, size in {"F32": 32, "F16": 16, "BF16": 16}.items():
        values = dequantized(data, GgufTensor(kind, (2, 4), 0, size))
        values += 1
        assert values.dtype == np.float32
        assert values.tolist() == [[1.0] * 4] * 2
