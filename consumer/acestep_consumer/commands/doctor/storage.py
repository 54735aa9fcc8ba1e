# SPDX-License-Identifier: Apache-2.0
"""The storage checks of ``doctor``: keys, bucket, and every operation of a worker on a temporary object."""

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
from acestep_consumer.domain.objects import ObjectAddress, join_key
from acestep_consumer.storage.results import NO_BUCKET
from acestep_consumer.storage.s3.client import NOTHING, S3Client, S3Payload, S3Response, TransientS3Error, refused

CHECKS: Final = ("storage", "storage clock", "bucket", "write and read", "conditional write", "delete")
# Time for one retry.
PATIENCE_S: Final = 1.5
_UNREACHABLE: Final = "start it, or correct ACESTEP_S3_ENDPOINT; keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RISK: Final = "two workers that finish the same job at the same moment may both store it; use S3 with If-None-Match"


async def check_storage(settings: StorageSettings) -> AsyncGenerator[Finding]:
    """Check the bucket with a temporary object, which is deleted again."""
    where = settings.endpoint or "AWS"
    done = 0
    try:
        async with S3Client(settings, retry_s=PATIENCE_S) as connection:
            async for finding in _checks(connection, settings, where):
                done += 1
                yield finding
    except StorageUnavailable as error:
        failed = CHECKS[done]
        if _is_busy(error):
            yield warn(failed, f"{where} answers, but is busy: {error}", "a worker waits for it; try again later")
            for check in CHECKS[done + 1 :]:
                yield skip(check, "the storage is busy")
            return
        said = f"{where}: {error}" if failed == "storage" else str(error)
        fix = _UNREACHABLE if failed == "storage" and not isinstance(error, StorageRefused) else None
        yield fail(failed, said, fix)
        for check in CHECKS[done + 1 :]:
            yield skip(check, f"{failed} failed")


def _is_busy(error: StorageUnavailable) -> bool:
    """Whether S3 answered, and only put the request off: with 503 ``SlowDown``, for instance."""
    return isinstance(error.__cause__, TransientS3Error) and error.__cause__.answered


async def _checks(connection: S3Client, settings: StorageSettings, where: str) -> AsyncGenerator[Finding]:
    """Yield a finding for each of ``CHECKS``, in that order."""
    bucket = ObjectAddress(settings.bucket)
    head = await connection.ask("HEAD", bucket)
    yield ok("storage", f"{where} answers")
    # Before the requests that may be refused: a wrong clock can be the reason.
    yield judge_clock(head.headers.get("Date"), datetime.now(UTC))
    if head.status == HTTPStatus.NOT_FOUND:
        missing = f"{bucket} does not exist"
        if settings.create_bucket:
            yield warn("bucket", missing, "a worker creates it when it starts, if its keys allow that")
        else:
            yield fail("bucket", missing, NO_BUCKET)
        for check in CHECKS[3:]:
            yield skip(check, "there is no bucket")
        return
    await _require(connection, bucket, head)
    yield ok("bucket", f"{bucket} exists and is accessible")
    async for finding in _tries(connection, ObjectAddress(settings.bucket, _key(settings.prefix))):
        yield finding


async def _tries(connection: S3Client, place: ObjectAddress) -> AsyncGenerator[Finding]:
    """Write, read, write conditionally, delete."""
    body = place.key.encode()
    payload = S3Payload(body, hashlib.sha256(body).hexdigest())
    await _require(connection, place, await connection.ask("PUT", place, payload))
    read = await connection.ask("GET", place)
    await _require(connection, place, read)
    if read.body == body:
        yield ok(
            "write and read", f"test object written below {place.key.rpartition('/')[0] or 'the root'}/ and read back"
        )
    else:
        yield fail("write and read", f"{place} was read back changed", "check proxies between here and S3")
    again = await connection.ask("PUT", place, NOTHING, {"If-None-Match": "*"})
    yield judge_condition(again)
    yield judge_delete(place, await connection.ask("DELETE", place))


async def _require(connection: S3Client, place: ObjectAddress, answer: S3Response) -> None:
    """Raise ``StorageRefused`` unless it succeeded. A HEAD has no body: a GET gets the reason."""
    if answer.ok:
        return
    code = answer.code
    if not answer.body:
        code = (await connection.ask("GET", ObjectAddress(place.bucket, place.key or "any"))).code
    raise refused(place, code)


def judge_condition(answer: S3Response) -> Finding:
    """Judge the response to a conditional write (If-None-Match) of an object that exists."""
    if answer.status == HTTPStatus.PRECONDITION_FAILED:
        return ok("conditional write", "supported: a job is stored once, even if two workers finish it")
    if answer.ok:
        return warn("conditional write", "this store ignores If-None-Match", _RISK)
    if answer.status in (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED):
        return warn("conditional write", f"this store does not support If-None-Match ({answer.code})", _RISK)
    return fail("conditional write", f"refused: {answer.code}", "allow s3:PutObject for these keys")


def judge_delete(place: ObjectAddress, answer: S3Response) -> Finding:
    """Judge the response to a delete. Workers hardly ever delete, so a refusal is only a warning."""
    if answer.ok:
        return ok("delete", "test object deleted")
    said = f"refused: {answer.code}; {place} is left behind"
    return warn("delete", said, "harmless; allow s3:DeleteObject, or remove it by hand")


def judge_clock(date: str | None, here: datetime) -> Finding:
    """Compare S3's ``Date`` header with this machine's clock."""
    try:
        there = parsedate_to_datetime(date or "")
    except ValueError:
        return skip("storage clock", "S3 sends no Date header")
    return clock("storage clock", there, here)


def _key(prefix: str) -> str:
    return join_key(prefix, f".doctor-{uuid4().hex}")
