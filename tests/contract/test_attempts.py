# SPDX-License-Identifier: Apache-2.0
"""What the ledger of tries remembers, on a real S3 server."""

from collections.abc import AsyncIterator

import boto3
import pytest

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.storage.attempts import S3AttemptStore
from acestep_consumer.storage.objects import Objects
from acestep_consumer.storage.s3_client import S3Connection
from infra.local.s3 import SeaweedFS

FIRST = "a" * 32


@pytest.fixture
async def ledger(s3: SeaweedFS, s3_prefix: str) -> AsyncIterator[S3AttemptStore]:
    session = boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key)
    settings = StorageSettings(endpoint=s3.endpoint, bucket=s3.bucket, prefix=s3_prefix)
    async with S3Connection(settings, session=session, patience_s=5) as connection:
        yield S3AttemptStore(Objects(connection), settings)


async def numbers(ledger: S3AttemptStore, message: str = FIRST) -> tuple[int, int]:
    attempt = await ledger.next("song", message, redelivered=True)
    return attempt.number, attempt.unexplained


async def test_a_message_that_comes_again_was_tried_once_by_somebody_who_said_nothing(ledger: S3AttemptStore) -> None:
    assert await numbers(ledger) == (2, 1)
    assert await numbers(ledger) == (2, 1)


async def test_each_try_that_begins_and_ends_without_a_word_counts(ledger: S3AttemptStore) -> None:
    for expected in (2, 3, 4):
        attempt = await ledger.next("song", FIRST, redelivered=True)
        assert (attempt.number, attempt.unexplained) == (expected, expected - 1)
        await ledger.begin(attempt)


async def test_a_try_that_was_excused_does_not_count(ledger: S3AttemptStore) -> None:
    await ledger.excuse(await ledger.next("song", FIRST, redelivered=False))
    assert await numbers(ledger) == (2, 0)
    for _ in range(5):
        attempt = await ledger.next("song", FIRST, redelivered=True)
        await ledger.begin(attempt)
        await ledger.excuse(attempt)
    assert await numbers(ledger) == (7, 0)


async def test_another_message_of_the_same_task_begins_at_one(ledger: S3AttemptStore) -> None:
    await ledger.begin(await ledger.next("song", FIRST, redelivered=True))
    first = await ledger.next("song", "b" * 32, redelivered=False)
    assert (first.number, first.unexplained) == (1, 0)
    assert await numbers(ledger, "b" * 32) == (2, 1)


async def test_a_first_try_leaves_nothing_behind(ledger: S3AttemptStore) -> None:
    await ledger.begin(await ledger.next("song", FIRST, redelivered=False))
    assert await numbers(ledger) == (2, 1)
