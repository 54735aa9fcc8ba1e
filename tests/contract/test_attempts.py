# SPDX-License-Identifier: Apache-2.0
"""Attempt records, on a real S3 server and on the fake in memory."""

from collections.abc import AsyncIterator

import boto3
import pytest

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.storage.attempts import AttemptRecords
from acestep_consumer.storage.s3.objects import S3Objects
from infra.local.s3 import SeaweedFS
from tests.support.fake_store import FakeObjects

FIRST = "a" * 32


@pytest.fixture(params=["fake", "s3"])
async def records(request: pytest.FixtureRequest) -> AsyncIterator[AttemptRecords]:
    if request.param == "fake":
        yield AttemptRecords(FakeObjects(), StorageSettings())
        return
    s3: SeaweedFS = request.getfixturevalue("s3")
    session = boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key)
    settings = StorageSettings(endpoint=s3.endpoint, bucket=s3.bucket, prefix=request.getfixturevalue("s3_prefix"))
    async with S3Objects(settings, session=session, retry_s=5) as objects:
        yield AttemptRecords(objects, settings)


async def numbers(records: AttemptRecords, message: str = FIRST) -> tuple[int, int]:
    attempt = await records.next("song", message, redelivered=True)
    return attempt.number, attempt.unexplained


async def test_a_message_that_comes_again_was_tried_once_by_somebody_who_said_nothing(records: AttemptRecords) -> None:
    assert await numbers(records) == (2, 1)
    assert await numbers(records) == (2, 1)


async def test_each_try_that_begins_and_ends_without_a_word_counts(records: AttemptRecords) -> None:
    for expected in (2, 3, 4):
        attempt = await records.next("song", FIRST, redelivered=True)
        assert (attempt.number, attempt.unexplained) == (expected, expected - 1)
        await records.begin(attempt, expires=False)


async def test_a_try_that_was_excused_does_not_count(records: AttemptRecords) -> None:
    await records.excuse(await records.next("song", FIRST, redelivered=False))
    assert await numbers(records) == (2, 0)
    for _ in range(5):
        attempt = await records.next("song", FIRST, redelivered=True)
        await records.begin(attempt, expires=False)
        await records.excuse(attempt)
    assert await numbers(records) == (7, 0)


async def test_another_message_of_the_same_task_begins_at_one(records: AttemptRecords) -> None:
    await records.begin(await records.next("song", FIRST, redelivered=True), expires=False)
    first = await records.next("song", "b" * 32, redelivered=False)
    assert (first.number, first.unexplained) == (1, 0)
    assert await numbers(records, "b" * 32) == (2, 1)


async def test_the_records_of_a_message_that_has_ended_are_removed_and_no_others(records: AttemptRecords) -> None:
    other = "b" * 32
    await records.excuse(await records.next("song", FIRST, redelivered=False))
    for message in (FIRST, FIRST, FIRST, other):
        await records.begin(await records.next("song", message, redelivered=True), expires=False)
    assert await numbers(records) == (5, 3)
    await records.forget("song", FIRST)
    assert await numbers(records) == (2, 1)
    assert await numbers(records, other) == (3, 2)
    await records.forget("song", FIRST)


async def test_a_first_try_leaves_nothing_behind(records: AttemptRecords) -> None:
    await records.begin(await records.next("song", FIRST, redelivered=False), expires=False)
    assert await numbers(records) == (2, 1)


async def unfinished(records: AttemptRecords, *, delivered: bool = False) -> int:
    return len(await records.unfinished("song", FIRST, delivered=delivered))


async def test_the_first_try_of_a_message_that_expires_is_recorded_until_it_has_ended(records: AttemptRecords) -> None:
    assert await unfinished(records) == 0
    await records.begin(await records.next("song", FIRST, redelivered=False), expires=True)
    assert await unfinished(records) == 1
    assert await numbers(records) == (2, 1)
    await records.begin(await records.next("song", FIRST, redelivered=True), expires=True)
    assert await unfinished(records) == 2
    await records.forget("song", FIRST)
    assert await unfinished(records) == 0


async def test_a_try_that_is_renewed_goes_on_and_is_excused(records: AttemptRecords) -> None:
    attempt = await records.next("song", FIRST, redelivered=False)
    looks = []
    for count in (1, 2):
        await records.renew(attempt, count)
        looks.append(await records.unfinished("song", FIRST, delivered=True))
    assert (len(looks[0]), looks[0] == looks[1]) == (1, False)
    assert await numbers(records) == (2, 0)
    await records.excuse(attempt)
    assert await unfinished(records, delivered=True) == 0


async def test_a_message_that_somebody_had_may_be_tried_without_a_record(records: AttemptRecords) -> None:
    assert await unfinished(records, delivered=True) == 1
