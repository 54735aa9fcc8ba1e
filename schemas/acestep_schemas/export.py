# SPDX-License-Identifier: Apache-2.0
"""Exports the schemas as documents for programs in other languages.

Copies are in the folder ``schemas``. After a change to a model: ``acestep-consumer schema export schemas``.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from acestep_schemas import examples
from acestep_schemas.asyncapi import asyncapi
from acestep_schemas.events import Event, Manifest, WorkerEvent
from acestep_schemas.request import request_json_schema

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def event_schema() -> dict[str, Any]:
    """Return the schema of every event, a union discriminated by ``type``."""
    return _schema_of(Event, "Event")


def manifest_schema() -> dict[str, Any]:
    """Return the schema of the manifest that is stored beside the songs of a job."""
    return _schema_of(Manifest, "Manifest")


SCHEMAS: Final[Mapping[str, Callable[[], dict[str, Any]]]] = {
    "request": request_json_schema,
    "events": event_schema,
    "manifest": manifest_schema,
}
"""JSON Schema (draft 2020-12) by name."""


def documents() -> dict[str, str]:
    """Return all documents, the text of each by file name: JSON Schemas, and ``asyncapi.json``."""
    found = {
        "request.schema.json": request_json_schema(),
        "event.schema.json": event_schema(),
        "manifest.schema.json": manifest_schema(),
        **{f"{_short(kind)}.schema.json": _schema_of(kind, kind.__name__) for kind in examples.events()},
        "asyncapi.json": asyncapi(),
    }
    return {name: json.dumps(document, indent=2, ensure_ascii=False) + "\n" for name, document in found.items()}


def write(folder: Path) -> tuple[Path, ...]:
    """Write all documents to ``folder`` (made when missing); return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / name: text for name, text in documents().items()}
    for path, text in paths.items():
        path.write_text(text, encoding="utf-8")
    return tuple(paths)


def _schema_of(model: Any, title: str) -> dict[str, Any]:
    """Return the schema of a message as it is sent: with every field, also those with a default."""
    schema = TypeAdapter(model).json_schema(mode="serialization")
    return {"$schema": _DIALECT, "title": title, **schema}


def _short(kind: Any) -> str:
    return "worker" if kind is WorkerEvent else "job." + kind.__name__.removeprefix("Job").lower()
