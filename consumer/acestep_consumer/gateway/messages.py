# SPDX-License-Identifier: Apache-2.0
"""Turns the fields of a REST request into the message to publish: the same JSON, and what must be set or left out.

Workers read the fields. Here the task id, the number of songs and the deadline are set, keys are removed, and audio
inputs are checked: a client of this API may use songs that it has the id of, its uploads, and places that the operator
allows.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from acestep_consumer.config.settings import GatewaySettings, InputSettings
from acestep_consumer.domain import edits
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.gateway.answers import ApiError
from acestep_consumer.gateway.auth import TOKEN
from acestep_schemas.aliases import ALIASES, METAS, PARAM_OBJ
from acestep_schemas.envelope import open_envelope
from acestep_schemas.lookup import FieldNames, Lookup, blank, shown
from acestep_schemas.request import GenerationRequest, RequestInvalid, parse_request
from acestep_schemas.strict_json import JsonRefused, loads

AUDIO_FIELDS: Final = ("src_audio_path", "reference_audio_path")
FindSong = Callable[[str, str], Awaitable[str | None]]
"""Returns the address in storage of a task's song by its name; None: there is none."""

_SONG: Final = re.compile(r"/?([A-Za-z0-9_-]{1,128})/([0-9]{1,3}(?:-[0-9a-f]{1,64})?\.[a-z0-9]{1,5})")
_READ: Final = ("batch_size", "queue_deadline_s", "task_id")
_NAMES: Final = FieldNames({name: (name, *ALIASES.get(name, ())) for name in (*AUDIO_FIELDS, *_READ)})
_OWN: Final = "task_id"


def song_name(path: str) -> tuple[str, str] | None:
    """Return task id and file name of a song's path, or of its whole ``/v1/audio?path=…``; None: it is neither."""
    text = path.strip()
    try:
        parts = urlsplit(text)
    except ValueError:  # a bracket of an IPv6 address without the other one
        return None
    if parts.path.endswith("/v1/audio"):
        text = parse_qs(parts.query).get("path", [""])[0]
    elif "%2F" in text or "%2f" in text:
        text = unquote(text)
    found = _SONG.fullmatch(text)
    return (found[1], found[2]) if found else None


def idempotency_key(fields: Mapping[str, object]) -> str | None:
    """Return the ``task_id`` of a body, which is a client's own name for its request; None: there is none."""
    hits = Lookup(fields, _NAMES).hits.get(_OWN)
    return str(hits[0].value)[:1_000] if hits and not blank(hits[0].value) else None


def request_fields(body: Mapping[str, object]) -> Mapping[str, object]:
    """Return the fields of the request in a body. Raises ``ApiError`` (400) where there are none."""
    found = open_envelope({name: value for name, value in body.items() if name != TOKEN})
    if found.problem is not None:
        raise ApiError(HTTPStatus.BAD_REQUEST, str(RequestInvalid((found.problem,))))
    return found.fields


class MessageBuilder:
    """Builds messages by the operator's settings.

    Args:
        settings: number of songs, deadline.
        inputs: buckets and hosts that audio may come from.
        find_song: finds a task's song in storage.
    """

    def __init__(self, settings: GatewaySettings, inputs: InputSettings, find_song: FindSong) -> None:
        self._settings = settings
        self._inputs = inputs
        self._find_song = find_song

    async def build(
        self, task_id: str, fields: Mapping[str, object], uploads: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the message for a request.

        Args:
            task_id: the id of the task.
            fields: as the client sent them.
            uploads: address in storage of each uploaded file, by the field that it replaces.

        Raises:
            ApiError: 400, where an input is not allowed or the request cannot be made at all.
        """
        message = {name: _without_token(name, value) for name, value in fields.items() if name not in (TOKEN, _OWN)}
        lookup, trusted = Lookup(message, _NAMES), set((uploads or {}).values())
        for name in AUDIO_FIELDS:
            if name not in (uploads or {}) and _is_given(lookup, name):
                message[name] = await self._address(name, str(lookup.hits[name][0].value), trusted)
        message |= uploads or {}
        request = self._check(message, trusted)
        # A song that comes from an earlier one is one song, unless the client says otherwise.
        counted = _is_given(lookup, "batch_size") or request.candidates is not None
        if not counted and request.source_task_id is None:
            message["batch_size"] = self._settings.batch_size
        if self._settings.queue_deadline_s and not _is_given(lookup, "queue_deadline_s"):
            message["queue_deadline_s"] = self._settings.queue_deadline_s
        return {**message, _OWN: task_id}

    async def _address(self, name: str, text: str, trusted: set[str]) -> str:
        """Return where a worker finds the audio that a client names. Raises ``ApiError`` (400)."""
        place = text.strip()
        if (song := song_name(place)) is not None:
            if self._inputs.results == "none":
                raise _refused(name, "songs are no sources here (ACESTEP_INPUT_RESULTS=none): upload the file")
            address = await self._find_song(*song)
            if address is None:
                raise _refused(name, f"there is no song {shown(place)}")
            trusted.add(address)
            return address
        if "://" in place:
            return place
        if ".." in place.replace("\\", "/").split("/"):
            raise _refused(name, "path traversal is not allowed")
        why = "absolute audio file paths are not allowed" if place.startswith("/") else "this is no file of this server"
        upload = "src_audio" if name == "src_audio_path" else "reference_audio"
        raise _refused(name, f"{why}: upload the file as {upload} in multipart/form-data, or name a song of this API")

    def _check(self, message: Mapping[str, object], trusted: set[str]) -> GenerationRequest:
        """Return the request as a worker reads it, after a check of every place in it. Raises ``ApiError`` (400)."""
        try:
            request, _ = parse_request(message, strict=False)
            edits.check(request)
        except (RequestInvalid, InvalidRequest) as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, str(error)) from error
        for name, place in _places(request):
            if place not in trusted:
                self._require_allowed(name, place)
        return request

    def _require_allowed(self, name: str, place: str) -> None:
        """Check a place that a client named. Raises ``ApiError`` (400)."""
        scheme, mark, rest = place.partition("://")
        if not mark:
            return  # the name of a LoRA in the workers' own folder
        if scheme.lower() == "s3" and rest.partition("/")[0] not in self._inputs.buckets:
            raise _refused(name, "its bucket is not one of ACESTEP_INPUT_BUCKETS")
        if scheme.lower() == "https" and _host(place) not in {host.lower() for host in self._inputs.hosts}:
            raise _refused(name, "its host is not one of ACESTEP_INPUT_HOSTS")


def _is_given(lookup: Lookup, name: str) -> bool:
    hits = lookup.hits.get(name)
    return hits is not None and not blank(hits[0].value)


def _places(request: GenerationRequest) -> list[tuple[str, str]]:
    audio = [(name, str(place)) for name in AUDIO_FIELDS if (place := getattr(request, name)) is not None]
    return audio + [("lora", lora.path) for lora in request.all_loras]


def _host(url: str) -> str:
    """Return host and port of a URL, as ACESTEP_INPUT_HOSTS has them; empty: it cannot be read."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower().removesuffix(":443")
    except ValueError:
        return ""


def _refused(name: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{name}: {why}")


def _without_token(name: str, value: object) -> object:
    """Return a value without the key, which some clients put into a nested object or the JSON text of one."""
    if name not in (PARAM_OBJ, *METAS):
        return value
    inner = value
    if isinstance(value, str) and TOKEN in value:
        try:
            inner = loads(value).value
        except JsonRefused:
            return None  # no worker could read it, and it would lie in the dead-letter queue with the key in it
    if isinstance(inner, Mapping) and TOKEN in inner:
        return {key: part for key, part in inner.items() if key != TOKEN}
    return value
