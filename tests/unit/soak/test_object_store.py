# SPDX-License-Identifier: Apache-2.0
"""The bucket as the audit sees it: it finds the song of another request, and one that is gone."""

import hashlib
import io
import json
import wave
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.object_store import MANIFEST, ObjectStore


def song(samples_bytes: int) -> bytes:
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(bytes(samples_bytes))
    return written.getvalue()


def event_of(audio: bytes, asked_bytes: int) -> dict[str, Any]:
    """The data of a completed job's event."""
    about = {"uri": "s3://b/soak/a/0.wav", "bytes": len(audio), "sha256": hashlib.sha256(audio).hexdigest()}
    request = {"prompt": f"takes=1 bytes={asked_bytes}", "audio_duration": 10}
    return {"task_id": "a", "audios": [about], "warnings": [], "request": request}


def object_store_with(**objects: bytes) -> ObjectStore:
    """A bucket with these objects of the job."""

    def get_object(*, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803 - boto3's names
        return {"Body": io.BytesIO(objects[Key.removeprefix("soak/a/")])}

    listed = {"Contents": [{"Key": f"soak/a/{name}"} for name in objects]}
    client: Any = SimpleNamespace(list_objects_v2=lambda **_: listed, get_object=get_object)
    return ObjectStore(client, "b", "soak", "bytes")


async def test_a_song_as_the_event_says_is_right() -> None:
    audio = song(2_000)
    done = event_of(audio, 2_000)
    assert await object_store_with(**{"0.wav": audio, MANIFEST: json.dumps(done).encode()}).wrongs(done) == []


async def test_the_song_of_the_request_that_had_the_id_before_is_found_though_its_checksum_fits() -> None:
    audio = song(2_000)
    done = event_of(audio, 2_004)
    (wrong,) = await object_store_with(**{"0.wav": audio, MANIFEST: json.dumps(done).encode()}).wrongs(done)
    assert "2000 bytes of samples, and not as in takes=1 bytes=2004" in wrong


@pytest.mark.parametrize("left", [MANIFEST, "0.wav"])
async def test_a_song_or_a_manifest_that_is_gone_is_found(left: str) -> None:
    done = event_of(song(2_000), 2_000)
    (wrong,) = await object_store_with(**{left: json.dumps(done).encode()}).wrongs(done)
    assert wrong.startswith("missing: ")
