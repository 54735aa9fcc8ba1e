# SPDX-License-Identifier: Apache-2.0
"""``doctor`` at S3: keys, bucket, and each thing that a worker does there, on a throw-away object."""

import hashlib
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final
from uuid import uuid4

from acestep_consumer.commands.doctor.broker import clock
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.storage.s3.client import NOTHING, S3Client, S3Payload, S3Response, refused

CHECKS: Final = ("storage", "storage clock", "bucket", "write and read", "conditional write", "delete")
# One more try after the first: a doctor that waits long is not asked.
PATIENCE_S: Final = 1.5
_REACH: Final = "start it, or correct ACESTEP_S3_ENDPOINT; keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RISK: Final = "two workers that finish the same task in the same moment both write; use a store that has them"


async def look_at_storage(settings: StorageSettings) -> AsyncGenerator[Finding]:
    """Try the bucket. What is written is deleted again."""
    where = settings.endpoint or "AWS"
    done = 0
    try:
        async with S3Client(settings, retry_s=PATIENCE_S) as connection:
            async for finding in _tour(connection, settings, where):
                done += 1
                yield finding
    except StorageUnavailable as error:
        failed = CHECKS[done]
        said = f"{where}: {error}" if failed == "storage" else str(error)
        fix = _REACH if failed == "storage" and not isinstance(error, StorageRefused) else None
        yield fail(failed, said, fix)
        for check in CHECKS[done + 1 :]:
            yield skip(check, f"{failed} failed")


async def _tour(connection: S3Client, settings: StorageSettings, where: str) -> AsyncGenerator[Finding]:
    """Yield a finding for each of ``CHECKS``, in that order."""
    bucket = ObjectAddress(settings.bucket)
    head = await connection.ask("HEAD", bucket)
    yield ok("storage", f"{where} answers")
    # Before anything that may be refused: a wrong clock is a reason to be refused.
    yield judge_clock(head.headers.get("Date"), datetime.now(UTC))
    if head.status == HTTPStatus.NOT_FOUND:
        yield warn("bucket", f"{bucket} is not there", "a worker makes it when it starts, if its keys may")
        for check in CHECKS[3:]:
            yield skip(check, "there is no bucket")
        return
    await _require(connection, bucket, head)
    yield ok("bucket", f"{bucket} is there, and these keys may look")
    async for finding in _tries(connection, ObjectAddress(settings.bucket, _key(settings.prefix))):
        yield finding


async def _tries(connection: S3Client, place: ObjectAddress) -> AsyncGenerator[Finding]:
    """Write, read, write under a condition, delete."""
    body = place.key.encode()
    payload = S3Payload(body, hashlib.sha256(body).hexdigest())
    await _require(connection, place, await connection.ask("PUT", place, payload))
    read = await connection.ask("GET", place)
    await _require(connection, place, read)
    if read.body == body:
        yield ok("write and read", f"an object under {place.key.rpartition('/')[0] or 'the bucket'}/ came back equal")
    else:
        yield fail("write and read", f"{place} does not read as it was written", "what stands between here and S3?")
    again = await connection.ask("PUT", place, NOTHING, {"If-None-Match": "*"})
    yield judge_condition(again)
    yield judge_delete(place, await connection.ask("DELETE", place))


async def _require(connection: S3Client, place: ObjectAddress, answer: S3Response) -> None:
    """Raise ``StorageRefused`` unless it did as asked. An answer to HEAD has no body: a GET's says why."""
    if answer.ok:
        return
    code = answer.code
    if not answer.body:
        code = (await connection.ask("GET", ObjectAddress(place.bucket, place.key or "any"))).code
    raise refused(place, code)


def judge_condition(answer: S3Response) -> Finding:
    """Judge the answer to a write of an object that is there, under the condition that it is not."""
    if answer.status == HTTPStatus.PRECONDITION_FAILED:
        return ok("conditional write", "honoured: a task has one manifest, whoever writes it")
    if answer.ok:
        return warn("conditional write", "this store ignores the condition", _RISK)
    if answer.status in (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED):
        return warn("conditional write", f"this store has none ({answer.code})", _RISK)
    return fail("conditional write", f"refused: {answer.code}", "these keys must be allowed to put objects")


def judge_delete(place: ObjectAddress, answer: S3Response) -> Finding:
    """Judge the answer to a delete. A worker deletes next to nothing, so that keys that may not are good enough."""
    if answer.ok:
        return ok("delete", "the object is gone again")
    said = f"refused: {answer.code}; {place} stays behind"
    return warn("delete", said, "harmless; allow s3:DeleteObject, or remove it by hand")


def judge_clock(date: str | None, here: datetime) -> Finding:
    """Judge S3's ``Date`` header."""
    try:
        there = parsedate_to_datetime(date or "")
    except ValueError:
        return skip("storage clock", "S3 does not tell the time")
    return clock("storage clock", there, here)


def _key(prefix: str) -> str:
    return "/".join(part for part in (prefix.strip("/"), f".doctor-{uuid4().hex}") if part)
