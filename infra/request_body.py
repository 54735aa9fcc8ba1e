# SPDX-License-Identifier: Apache-2.0
"""Generates the fields of ``RequestBody`` from ``GenerationRequest``, so that a new field is written once.

``python -m infra.request_body`` writes them between the class's docstring and its aliases.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from acestep_schemas import request_body
from acestep_schemas.request import AudioFormat, GenerationRequest, LoraChoice, TaskType

FILE: Final = Path(request_body.__file__)
# What a field may hold besides what the model makes of it.
_LOOSER: Final = MappingProxyType(
    {"seed": "int | Sequence[int]", "lora": "LoraBody | str | None", "audio_code_string": "str | Sequence[str]"}
)
_NAMES: Final = MappingProxyType(
    {LoraChoice: "LoraBody | str", TaskType: "TaskType", AudioFormat: "AudioFormat", NoneType: "None"}
)
_GENERIC: Final = MappingProxyType({tuple: "Sequence", Mapping: "Mapping"})
_BEGIN: Final = "    # Fields of GenerationRequest, written by `bash infra/dev fix`.\n"
_END: Final = "\n    # Aliases"


def with_fields() -> str:
    """Return the text of the module with the fields as they should be."""
    before, _, rest = FILE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    fields = GenerationRequest.model_fields.items()
    lines = (
        f'    {name}: {_LOOSER.get(name) or _written(field.annotation)}\n    """{field.description}"""\n'
        for name, field in fields
    )
    return f"{before}{_BEGIN}{''.join(lines)}{_END}{after}"


def _written(kind: Any) -> str:
    """Return a type as a producer's code names it: without bounds, and any sequence in place of a tuple."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Annotated:
        return _written(parts[0])
    if origin is Literal:
        return f"Literal[{', '.join(map(_value, parts))}]"
    if origin in _GENERIC:
        return f"{_GENERIC[origin]}[{', '.join(_written(part) for part in parts if part is not Ellipsis)}]"
    if origin in (Union, UnionType):
        return " | ".join(map(_written, parts))
    name: str = kind.__name__
    return name


def _value(value: object) -> str:
    return f"{value:_}" if isinstance(value, int) else f'"{value}"'


if __name__ == "__main__":
    FILE.write_text(with_fields(), encoding="utf-8")
