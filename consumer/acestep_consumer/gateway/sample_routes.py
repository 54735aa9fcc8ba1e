# SPDX-License-Identifier: Apache-2.0
"""Texts by the language model, as tasks that somebody waits for; and examples."""

import random
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from acestep_consumer.gateway.answers import ApiError, busy, envelope, soft_error
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.bodies import read_fields
from acestep_consumer.gateway.submission import AWAITED_PRIORITY, Submission, TaskOrder
from acestep_consumer.gateway.worker_list import WorkerList
from acestep_schemas.coerce import TRUE_WORDS
from acestep_schemas.events import Metas

WITHIN_S: Final = 25.0
"""Longest wait: clients give these routes half a minute."""

_BODY_BYTES: Final = 1 << 20
_RETRY_S: Final = 30.0

SIMPLE_EXAMPLES: Final[tuple[dict[str, Any], ...]] = (
    {"description": "a calm piano piece for a rainy evening", "instrumental": True, "vocal_language": "unknown"},
    {"description": "an upbeat pop song about the first day of summer", "instrumental": False, "vocal_language": "en"},
    {"description": "slow jazz with double bass and brushed drums", "instrumental": True, "vocal_language": "unknown"},
    {"description": "a folk ballad about a lighthouse keeper", "instrumental": False, "vocal_language": "en"},
    {"description": "ein fröhliches Lied über eine Bahnfahrt ans Meer", "instrumental": False, "vocal_language": "de"},
    {"description": "driving techno with a deep bass line", "instrumental": True, "vocal_language": "unknown"},
)
CUSTOM_EXAMPLES: Final[tuple[dict[str, Any], ...]] = (
    {
        "think": True,
        "caption": "warm acoustic folk, fingerpicked guitar, soft female voice, light strings",
        "lyrics": "[verse]\nThe harbour sleeps, the boats are in\nA lantern swings above the pier\n\n"
        "[chorus]\nLeave the light on, leave the light on\nI can see it from here",
        "bpm": 84,
        "duration": 120,
        "keyscale": "G major",
        "language": "en",
        "timesignature": "4",
    },
    {
        "think": True,
        "caption": "energetic synth pop, bright arpeggios, punchy drums, male voice",
        "lyrics": "[verse]\nCity windows blink like code\nEvery corner hums a tune\n\n"
        "[chorus]\nRun with me, the night is new\nWe will catch the morning soon",
        "bpm": 124,
        "duration": 150,
        "keyscale": "A minor",
        "language": "en",
        "timesignature": "4",
    },
    {
        "think": False,
        "caption": "solo cello, slow and wide, a cathedral's reverb",
        "lyrics": "[Instrumental]",
        "bpm": 60,
        "duration": 90,
        "keyscale": "D minor",
        "language": "unknown",
        "timesignature": "3",
    },
)


class SampleRoutes:
    """Routes that answer with texts.

    Args:
        keys: checks keys.
        submission: publishes tasks and waits for them.
        workers: whether any has a language model.
    """

    def __init__(self, keys: ApiKeyCheck, submission: Submission, workers: WorkerList) -> None:
        self._keys = keys
        self._submission = submission
        self._workers = workers

    async def random(self, request: web.Request) -> web.Response:
        """Return an example."""
        body = await read_fields(request, _BODY_BYTES) if request.body_exists else {}
        self._keys.by_body(request, body)
        simple = body.get("sample_type", "simple_mode") == "simple_mode"
        return envelope(random.choice(SIMPLE_EXAMPLES if simple else CUSTOM_EXAMPLES))  # noqa: S311 - an example

    async def format(self, request: web.Request) -> web.Response:
        """Rewrite caption and lyrics, and fill in metadata."""
        body = await read_fields(request, _BODY_BYTES)
        fields = {name: body[name] for name in ("prompt", "caption", "lyrics", "param_obj") if name in body}
        metas = await self._metas(request, body, fields | {"use_format": True})
        if metas is None:
            return soft_error(HTTPStatus.INTERNAL_SERVER_ERROR, "the language model could not rewrite this text")
        return envelope(
            {
                "caption": metas.caption,
                "lyrics": metas.lyrics,
                "bpm": metas.bpm,
                "key_scale": metas.keyscale,
                "time_signature": metas.timesignature,
                "duration": metas.duration,
                "vocal_language": metas.language,
            }
        )

    async def create(self, request: web.Request) -> web.Response:
        """Write a whole song's texts from a description."""
        body = await read_fields(request, _BODY_BYTES)
        fields: dict[str, object] = {"sample_mode": True, "sample_query": body.get("query") or "a song"}
        if body.get("vocal_language"):
            fields["vocal_language"] = body["vocal_language"]
        if str(body.get("instrumental")).strip().lower() in TRUE_WORDS:
            fields["lyrics"] = "[inst]"
        metas = await self._metas(request, body, fields)
        if metas is None:
            return soft_error(HTTPStatus.INTERNAL_SERVER_ERROR, "the language model could not write this song")
        return envelope(
            {
                "caption": metas.caption,
                "lyrics": metas.lyrics,
                "bpm": metas.bpm,
                "keyscale": metas.keyscale,
                "duration": metas.duration,
                "timesignature": metas.timesignature,
                "vocal_language": metas.language,
            }
        )

    async def _metas(
        self, request: web.Request, body: Mapping[str, object], fields: Mapping[str, object]
    ) -> Metas | None:
        """Run an analysis with these fields; None: it failed. Raises ``ApiError``."""
        owner = self._keys.by_body(request, body)
        if self._workers.lacks_language_model:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "no worker has a language model")
        temperature = {} if body.get("temperature") is None else {"lm_temperature": body["temperature"]}
        message = {**fields, **temperature, "analysis_only": True, "batch_size": 1, "queue_deadline_s": WITHIN_S}
        order = TaskOrder.of(request, owner, message, priority=AWAITED_PRIORITY)
        try:
            view = await self._submission.run(order, WITHIN_S)
        except ApiError as error:
            if error.status != HTTPStatus.GATEWAY_TIMEOUT:
                raise
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, "the workers are busy: try again later", _RETRY_S) from error
        return view.metas
