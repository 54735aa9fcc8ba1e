# SPDX-License-Identifier: Apache-2.0
"""Answers in ACE-Step's forms: the envelope, soft errors in it, and HTTP errors.

An HTTP error has ``detail``, as FastAPI has it, and the same text as ``error``: clients read one or the other.
"""

import json
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final
from uuid import uuid4

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

REQUEST_ID: Final = "X-Request-Id"

_ID: Final = web.RequestKey("id", str)
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

log = structlog.get_logger()


class ApiError(Exception):
    """The request is answered with this HTTP status; the text is for a person.

    Attributes:
        status: the HTTP status.
        headers: sent with it.
    """

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


def busy(status: int, text: str, retry_after_s: float) -> ApiError:
    """Return the error for a client that should try again after some seconds."""
    return ApiError(status, text, {"Retry-After": str(max(1, round(retry_after_s)))})


def dumps(value: object) -> str:
    """Return JSON text, not ASCII-escaped, as ACE-Step writes it."""
    return json.dumps(value, ensure_ascii=False)


def envelope(data: object, *, code: int = HTTPStatus.OK, error: str | None = None) -> web.Response:
    """Return ``data`` in ACE-Step's envelope. With ``code`` and ``error`` it is a soft error, whose status is 200."""
    body = {"data": data, "code": int(code), "error": error, "timestamp": time.time_ns() // 1_000_000, "extra": None}
    return web.json_response(body, dumps=dumps)


def soft_error(code: int, error: str) -> web.Response:
    """Return an error as ACE-Step's routes around models do: status 200, the code in the envelope."""
    return envelope(None, code=code, error=error)


def problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an HTTP error."""
    return web.json_response({"detail": text, "error": text}, status=status, headers=headers, dumps=dumps)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into answers, and give each request an id, which its log lines and its answer carry."""
    given = request.headers.get(REQUEST_ID, "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
    request[_ID] = request_id
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        return await _answered(request, handler)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """For the application's ``on_response_prepare``."""
    if _ID in request:
        response.headers[REQUEST_ID] = request[_ID]


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return problem(error.status, str(error), error.headers)
    except web.HTTPException as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return problem(error.status, error.reason, allow)
    except (ConnectionError, web.RequestPayloadError):
        return problem(HTTPStatus.BAD_REQUEST, "the request's body cannot be read")  # or the client is gone
    except Exception:
        # The query string is left out: it may hold a key.
        log.exception("request failed", method=request.method, path=request.path)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error")
