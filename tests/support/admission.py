# SPDX-License-Identifier: Apache-2.0
"""Jobs made the way the worker makes them: read, then admitted."""

from acestep_consumer.domain.job import Job, LoadedModel, Request
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_schemas.request import parse_request

TURBO = LoadedModel("acestep-v15-turbo", Variant.TURBO)
BASE = LoadedModel("acestep-v15-base", Variant.BASE)
FORMATS = frozenset(("mp3", "wav", "wav32", "flac", "ogg", "opus", "aac"))


def make_limits(vram_gb: float = 24, models: tuple[LoadedModel, ...] = (TURBO, BASE)) -> Limits:
    """Limits of a card with ``vram_gb`` GB that holds ``models``."""
    return Limits(
        tier=BUILT_IN.tier_of(vram_gb),
        table_version=BUILT_IN.version,
        vram_gb=vram_gb,
        models=models,
        formats=FORMATS,
    )


def admitted_job(**request_fields: object) -> Job:
    """A job as admission makes it from a request with these fields (``task_id`` defaults to ``task-1``)."""
    body, warnings = parse_request({"prompt": "jazz", **request_fields})
    return admit(Request(body.task_id or "task-1", body, warnings), make_limits())
