# SPDX-License-Identifier: Apache-2.0
"""Reads bodies without files: JSON, forms, and bodies whose type says nothing, as ACE-Step's server reads them."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from aiohttp import web

from acestep_consumer.domain.parse import FORM, form_document
from acestep_consumer.gateway.answers import ApiError
from acestep_schemas.lookup import shown
from acestep_schemas.strict_json import JsonRefused, loads

MULTIPART: Final = "multipart/form-data"
READ_S: Final = 60.0
"""Longest time that a body without files may take to arrive, seconds."""

_UNSUPPORTED: Final = (
    "Unsupported Content-Type: {}. Use application/json, application/x-www-form-urlencoded, or multipart/form-data."
)


async def read_fields(request: web.Request, max_bytes: int) -> dict[str, object]:
    """Read the fields of a body of at most ``max_bytes``. Raises ``ApiError`` (400, 408, 413, 415)."""
    return fields_of(await read_body(request, max_bytes), request.headers.get("Content-Type", ""))


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """Read a whole body into memory. Raises ``ApiError`` (408, 413)."""
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the request's body did not arrive in time") from None
    return bytes(body)


def fields_of(body: bytes, content_type: str) -> dict[str, object]:
    """Return the fields of a body. Raises ``ApiError`` (400, 415)."""
    media = content_type.partition(";")[0].strip().lower()
    if media.startswith("application/json") or media.endswith("+json"):
        return _json_fields(body)
    start = body.lstrip()
    if media == FORM and start[:1] != b"{":  # curl -d calls everything a form, and none begins like that
        return _decoded_form(body)
    if start[:1] in (b"{", b"["):
        return _json_fields(body)
    if b"=" in start:
        return _decoded_form(body)
    raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, _UNSUPPORTED.format(shown(media) if media else "none"))


def _json_fields(body: bytes) -> dict[str, object]:
    try:
        value = loads(body.decode("utf-8-sig")).value
    except JsonRefused as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"Malformed JSON payload: {error}") from error
    except UnicodeDecodeError as error:
        text = f"Malformed JSON payload: not UTF-8 at byte {error.start}"
        raise ApiError(HTTPStatus.BAD_REQUEST, text) from None
    if not isinstance(value, Mapping):
        raise ApiError(HTTPStatus.BAD_REQUEST, "JSON payload must be an object")
    return dict(value)


def _decoded_form(body: bytes) -> dict[str, object]:
    try:
        return form_document(body.decode("utf-8")).fields
    except UnicodeDecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the form is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, str(error)) from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {max_bytes:,} bytes; send audio as a file"
    )
