# SPDX-License-Identifier: Apache-2.0
"""Headers of files that hold tensors, safetensors and GGUF: names, types, shapes and places. Reads no tensor.

GGUF is read here and not by the package ``gguf``: this runs in the consumer process too, which has no numpy, and in
milliseconds; and of the format no more is needed than the list of tensors and one text.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

GGUF_SUFFIX: Final = ".gguf"
SUFFIXES: Final = (".safetensors", GGUF_SUFFIX)
AGAIN: Final = "download it again"

_MAX_HEADER: Final = 100 << 20
_LENGTH_BYTES: Final = 8
_LFS_POINTER: Final = b"version https://git-lfs"
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_COUNT: Final = 1 << 20
_ALIGNMENT: Final = 32
# GGML's types that torch has too; all others are quantised.
_TYPES: Final = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
# GGUF's types of metadata: struct's letters by number. Text and arrays have their own form.
_LETTERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT: Final = 8
_ARRAY: Final = 9


class FileDamaged(Exception):
    """A file cannot be used; the text continues a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: type in safetensors' words, shape, and offset in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and its metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read a header and compare the file's length with it.

    Raises:
        FileDamaged: it is neither format, it was cut off, or its tensors are quantised.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _gguf(file, size) if path.suffix == GGUF_SUFFIX else _safetensors(file, size)
    except PermissionError as error:
        raise FileDamaged("cannot be read: check its permissions") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise FileDamaged(f"cannot be read ({type(error).__name__}): {AGAIN}") from error


def _safetensors(file: BinaryIO, size: int) -> Header:
    begin = file.read(_LENGTH_BYTES)
    length = int.from_bytes(begin, "little")
    if begin == _LFS_POINTER[:_LENGTH_BYTES]:
        raise FileDamaged("is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")
    if not 0 < length <= min(_MAX_HEADER, size - _LENGTH_BYTES):
        raise FileDamaged(f"is not a safetensors file, or was cut off: {AGAIN}")
    header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    data = _LENGTH_BYTES + length
    whole = data + max((each["data_offsets"][1] for each in header.values()), default=0)
    if size != whole:
        raise FileDamaged(f"has {size:,} of {whole:,} bytes: {AGAIN}")
    return Header(
        {
            name: TensorInfo(each["dtype"], tuple(each["shape"]), data + each["data_offsets"][0])
            for name, each in header.items()
        },
        metadata,
    )


def _gguf(file: BinaryIO, size: int) -> Header:
    if file.read(4) != _MAGIC or _number(file, "I") not in _VERSIONS:
        raise FileDamaged(f"is not a GGUF file of version 2 or 3: {AGAIN}")
    tensors, fields = _count(file), _count(file)
    metadata = {_text(file): _value(file, _number(file, "I")) for _ in range(fields)}
    infos = [_gguf_tensor(file) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    data = -(-file.tell() // alignment) * alignment
    quantised = sorted({kind for _, _, kind, _ in infos if kind not in _TYPES})
    if quantised:
        raise FileDamaged(
            f"holds quantised tensors (GGML types {', '.join(map(str, quantised))}), which cannot be used: "
            "take the file with BF16 or F16 in its name"
        )
    ends = (data + offset + math.prod(shape) * _TYPES[kind][1] for _, shape, kind, offset in infos)
    if size < (whole := max(ends, default=data)):  # what follows is padding
        raise FileDamaged(f"has {size:,} of {whole:,} bytes: {AGAIN}")
    found = {name: TensorInfo(_TYPES[kind][0], shape, data + offset) for name, shape, kind, offset in infos}
    return Header(found, metadata)


def _gguf_tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape, type and offset of a tensor. GGUF lists the innermost dimension first."""
    name, dimensions = _text(file), _number(file, "I")
    if dimensions > 8:  # noqa: PLR2004 - GGML has 4
        raise ValueError("too many dimensions")
    shape = tuple(_number(file, "Q") for _ in range(dimensions))
    return name, shape[::-1], _number(file, "I"), _number(file, "Q")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _count(file)
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _LETTERS[kind])


def _number(file: BinaryIO, letter: str) -> Any:
    return struct.unpack(f"<{letter}", file.read(struct.calcsize(f"<{letter}")))[0]


def _count(file: BinaryIO) -> int:
    count: int = _number(file, "Q")
    if count > _MAX_COUNT:
        raise ValueError("too many entries")
    return count


def _text(file: BinaryIO) -> str:
    length: int = _number(file, "Q")
    if length > _MAX_HEADER:
        raise ValueError("too long a text")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("cut off")
    return content.decode()
