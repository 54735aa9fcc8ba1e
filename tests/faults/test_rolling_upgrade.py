# SPDX-License-Identifier: Apache-2.0
"""Workers of two versions on one queue: what the newer one wrote, the older one reads, and repeats as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from acestep_consumer.broker.topology import CONTROL
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import Verdict
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_consumer.domain.outcome import OTHER_BODY, Outcome, outcome_of
from acestep_consumer.storage.attempts import AttemptRecords
from acestep_schemas import examples
from acestep_schemas.events import parse_event, parse_manifest
from tests.support.fake_store import FakeObjects, FakeStore
from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually

SAMPLES = Path(__file__).parents[1] / "samples"
RELEASES = sorted(path.name for path in SAMPLES.iterdir() if path.is_dir())
MANIFESTS = {
    f"{release} {path.stem}": path.read_bytes()
    for release in RELEASES
    for path in sorted((SAMPLES / release / "manifests").iterdir())
}
ATTEMPTS = {
    release: {path.stem: json.loads(path.read_bytes()) for path in (SAMPLES / release / "attempts").iterdir()}
    for release in RELEASES
}


def newer_manifest(task_id: str) -> bytes:
    """A manifest with fields, words and a spelling that this version would not write."""
    data: dict[str, Any] = examples.completed().data.model_dump(mode="json")
    data |= {"task_id": task_id, "audios": [], "lyrics_timing": [{"at": 1.50, "text": "é…"}]}
    data["lm"] |= {"backend": "sglang", "quantization": "int4"}
    data["request"] |= {"task_type": "cover-nofsq", "sampler_mode": "heun"}
    return json.dumps(data, indent=1, ensure_ascii=False).replace("1.5,", "1.50,").encode()


def newer_failure(task_id: str) -> bytes:
    data: dict[str, Any] = examples.unfinished("failed").data.model_dump(mode="json")
    data |= {"task_id": task_id, "help": "https://docs.example/quota"}
    data["error"] |= {"code": "quota_exceeded", "retry_after_s": 60}
    return json.dumps(data, separators=(", ", ": ")).encode()


async def told(task_id: str, manifest: bytes, body: str | None = None) -> Outcome:
    """What this version tells of a task whose manifest is in the store; ``body``: of the message that asks."""
    store = FakeStore()
    place = ObjectAddress("acestep", f"jobs/{task_id}/manifest.json")
    metadata = {"message": "m1", "body-sha256": "b1", "of-next-version": "x"}
    await store.fake.put(place, ObjectContent.of(manifest, "application/json", metadata))
    record = await store.find(task_id)
    assert record is not None
    return outcome_of(record if body is None else record.for_body(body))


@pytest.mark.parametrize("write", [newer_manifest, newer_failure])
async def test_a_newer_end_is_repeated_byte_for_byte(write: Any) -> None:
    manifest = write("order-1")
    outcome = await told("order-1", manifest)
    assert outcome.event is not None
    body = outcome.event.to_json()
    assert body.endswith(b'"data":' + manifest + b"}")
    assert parse_event(body).id == outcome.event.id
    assert outcome.verdict is (Verdict.ACK if write is newer_manifest else Verdict.DEAD_LETTER)
    if write is newer_failure:
        assert outcome.error is not None
        assert str(outcome.error.code) == "quota_exceeded"


async def test_another_body_under_its_id_gets_it_with_a_warning_and_all_that_it_says() -> None:
    manifest = newer_manifest("order-1")
    outcome = await told("order-1", manifest, body="b2")
    assert outcome.event is not None
    data = json.loads(outcome.event.to_json())["data"]
    assert data.pop("warnings") == [OTHER_BODY]
    expected = json.loads(manifest)
    del expected["warnings"]
    assert data == expected


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
async def test_the_end_of_a_released_version_is_repeated_byte_for_byte(manifest: bytes) -> None:
    outcome = await told(parse_manifest(manifest).task_id, manifest)
    assert outcome.event is not None
    assert outcome.event.to_json().endswith(b'"data":' + manifest + b"}")


@pytest.mark.parametrize(
    ("states", "unexplained"),
    [
        (["begun", "begun"], 3),
        (["excused", "begun"], 2),
        (["excused", "excused"], 1),
    ],
)
@pytest.mark.parametrize("release", RELEASES)
async def test_attempts_of_other_versions_are_counted(release: str, states: list[str], unexplained: int) -> None:
    objects = FakeObjects()
    for number, state in enumerate(states, 2):
        body = json.dumps({**ATTEMPTS[release][state], "by": "a newer worker"}).encode()
        place = ObjectAddress("acestep", f"jobs/order-1/attempts/m1-{number}.json")
        await objects.put(place, ObjectContent.of(body, "application/json"))
    attempt = await AttemptRecords(objects, StorageSettings()).next("order-1", "m1", redelivered=True)
    assert (attempt.number, attempt.unexplained) == (len(states) + 2, unexplained)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"state": 7}', b"null", b"[" * 100_000])
async def test_a_record_of_an_attempt_that_cannot_be_read_counts_as_begun(body: bytes) -> None:
    objects = FakeObjects()
    place = ObjectAddress("acestep", "jobs/order-1/attempts/m1-2.json")
    await objects.put(place, ObjectContent.of(body, "application/json"))
    attempt = await AttemptRecords(objects, StorageSettings()).next("order-1", "m1", redelivered=True)
    assert (attempt.number, attempt.unexplained) == (3, 2)


async def test_a_record_with_more_in_it_equals_itself() -> None:
    """A commit compares the record that it read with the one in force."""
    store = FakeStore()
    place = ObjectAddress("acestep", "jobs/order-1/manifest.json")
    await store.fake.put(place, ObjectContent.of(newer_failure("order-1"), "application/json", {"message": "m1"}))
    found = await store.find("order-1")
    assert found is not None
    ours = replace(found, message="m2", data_json=None)
    assert await store.commit(ours, found) == ours


async def test_a_running_older_worker_tells_a_newer_end_and_is_cancelled_by_a_newer_client(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="2") as seen:
        manifest = newer_manifest("order-1")
        key = f"{seen.object_store.prefix}/order-1/manifest.json"
        seen.object_store.client.put_object(Bucket=seen.object_store.bucket, Key=key, Body=manifest)
        await seen.peer.submit(task_id="order-1")
        await eventually(lambda: seen.recorder.terminal("order-1"), WITHIN_S)
        (end,) = seen.recorder.of("order-1")
        assert end.state == "completed"
        assert end.body.endswith(b'"data":' + manifest + b"}")

        await seen.peer.submit(task_id="order-2", prompt=f"until={tmp_path / 'never'}")
        await eventually(lambda: "started" in seen.recorder.states("order-2"), WITHIN_S)
        control = await seen.peer.channel.get_exchange(CONTROL, ensure=False)
        message = aio_pika.Message(b'{"reason": "of the next version"}', headers={"x-acestep-by": "somebody"})
        await control.publish(message, "cancel.order-2")
        await eventually(lambda: seen.recorder.terminal("order-2"), WITHIN_S)
        assert seen.recorder.states("order-2")[-1] == "cancelled"
