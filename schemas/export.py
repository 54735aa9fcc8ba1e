# SPDX-License-Identifier: Apache-2.0
"""The schemas as documents for programs in other languages."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from schemas.events import event_json_schema
from schemas.request import request_json_schema

SCHEMAS: Final[Mapping[str, Callable[[], dict[str, Any]]]] = {
    "request": request_json_schema,
    "events": event_json_schema,
}
"""JSON Schema (draft 2020-12) by name."""
