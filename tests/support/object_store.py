# SPDX-License-Identifier: Apache-2.0
"""The bucket as somebody sees it who heard an event: is everything there that it promises?"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mypy_boto3_s3 import S3Client

MANIFEST = "manifest.json"
# A song is a whole number of latent frames, 25 a second.
_LATENT_S = 0.04


@dataclass(frozen=True)
class ObjectStore:
    """A key prefix of a bucket.

    ``lengths`` says how long a WAV file has to be, which shows whose song it is: ``bytes=`` in the request's prompt, as
    the renderer process without a model takes it; or the request's seconds. None: not looked at.
    """

    client: S3Client
    bucket: str
    prefix: str
    lengths: Literal["bytes", "seconds"] | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str], lengths: Literal["bytes", "seconds"] | None = None) -> Self:
        """Look where a worker with these variables puts its songs."""
        client = boto3.client(
            "s3",
            endpoint_url=environment["ACESTEP_S3_ENDPOINT"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        return cls(client, environment["ACESTEP_S3_BUCKET"], environment["ACESTEP_S3_PREFIX"], lengths)

    async def names(self, task_id: str) -> set[str]:
        """Return the last parts of the keys of one job's objects."""
        return await asyncio.to_thread(self._names, f"{self.prefix}/{task_id}/")

    async def delete(self, uri: str) -> None:
        """Delete one object, as a lifecycle rule would."""
        await asyncio.to_thread(self.client.delete_object, Bucket=self.bucket, Key=self._key(uri))

    async def wrongs(self, data: Mapping[str, Any]) -> list[str]:
        """Compare the data of a ``completed`` event with what lies here; a line for each difference."""
        return await asyncio.to_thread(lambda: list(self._wrongs(data)))

    def open_uploads(self) -> list[str]:
        """Return the keys of uploads in parts that nobody has ended."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def _names(self, folder: str) -> set[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=folder)
        return {item["Key"].removeprefix(folder) for item in found.get("Contents", ())}

    def _wrongs(self, data: Mapping[str, Any]) -> Iterator[str]:
        task_id, audios = data["task_id"], data["audios"]
        names = self._names(f"{self.prefix}/{task_id}/")
        promised = {audio["uri"].rpartition("/")[2] for audio in audios}
        if missing := (promised | {MANIFEST}) - names:
            yield f"missing: {', '.join(sorted(missing))}"
            return
        manifest = json.loads(self._read(f"{self.prefix}/{task_id}/{MANIFEST}"))
        # Another message with the same id is told of the task's songs with one warning more.
        if manifest | {"warnings": data["warnings"]} != data or not set(manifest["warnings"]) <= set(data["warnings"]):
            yield "the manifest is not what the event says"
        for audio in audios:
            body = self._read(self._key(audio["uri"]))
            if (len(body), hashlib.sha256(body).hexdigest()) != (audio["bytes"], audio["sha256"]):
                yield f"{audio['uri']}: {len(body)} bytes with another sha256 than the event's {audio['bytes']}"
            elif self.lengths is not None:
                yield from (f"{audio['uri']}: {wrong}" for wrong in self._wrong_length(body, data["request"]))

    def _key(self, uri: str) -> str:
        return uri.removeprefix(f"s3://{self.bucket}/")

    def _wrong_length(self, body: bytes, request: Mapping[str, Any]) -> Iterator[str]:
        with wave.open(io.BytesIO(body)) as song:
            size = song.getnframes() * song.getsampwidth() * song.getnchannels()
            length_s = song.getnframes() / song.getframerate()
        if self.lengths == "bytes":
            asked = re.search(r"bytes=(\d+)", request["prompt"])
            if asked is None or size != int(asked[1]):
                yield f"{size} bytes of samples, and not as in {request['prompt']}"
        elif abs(length_s - request["audio_duration"]) > _LATENT_S:
            yield f"{length_s:.2f} s, and not {request['audio_duration']:.2f} s"

    def _read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
