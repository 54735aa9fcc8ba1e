# SPDX-License-Identifier: Apache-2.0
"""Audio inputs from a real S3 server and a real HTTPS server: what is fetched, what is refused, and in which words."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from aiohttp import web

from acestep_consumer.config.settings import InputSettings, SettingsError, StorageSettings
from acestep_consumer.domain.errors import InputNotAllowed, InputUnreadable
from acestep_consumer.domain.job import Sources
from acestep_consumer.inputs.fetch import AllowedInputs
from infra.local.s3 import SeaweedFS
from tests.support.https_server import HttpsServer
from tests.support.inputs import certificate, naming, open_inputs, session, web_host
from tests.support.jobs import make_job

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["certificate", "session", "web_host"]

Connect = Callable[..., AbstractAsyncContextManager[AllowedInputs]]


@pytest.fixture
def client(s3: SeaweedFS, session: boto3.Session) -> "S3Client":
    return session.client("s3", endpoint_url=s3.endpoint)


@pytest.fixture
def connect(s3: SeaweedFS, session: boto3.Session, web_host: HttpsServer) -> Connect:
    """Opens inputs that allow the web host; arguments override settings."""

    def opened(*, trusting: bool = True, **values: Any) -> AbstractAsyncContextManager[AllowedInputs]:
        tls = web_host.trust if trusting else None
        return open_inputs(s3, session, **{"hosts": (web_host.host,), "tls": tls, **values})

    return opened


async def fetch(inputs: AllowedInputs, folder: Path, source: str) -> Path:
    sources = await inputs.fetch(naming(make_job(task_type="cover"), src_audio_path=source), folder)
    assert sources.source is not None
    return sources.source


async def refusal(inputs: AllowedInputs, folder: Path, source: str) -> str:
    with pytest.raises(InputNotAllowed) as caught:
        await fetch(inputs, folder, source)
    assert os.listdir(folder) == []  # noqa: PTH208 - an empty folder on a local disk blocks nobody
    return str(caught.value)


async def failure(inputs: AllowedInputs, folder: Path, source: str) -> str:
    with pytest.raises(InputUnreadable) as caught:
        await fetch(inputs, folder, source)
    return str(caught.value)


class TestWhichInputsAreFetched:
    async def test_none_when_the_request_names_none(self, connect: Connect, tmp_path: Path) -> None:
        async with connect() as inputs:
            assert await inputs.fetch(make_job(), tmp_path) == Sources()

    async def test_a_song_from_text_needs_its_reference_only(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        reference = web_host.serve("/voice.flac", b"fLaC")
        job = naming(make_job(), src_audio_path="/not/looked/at", reference_audio_path=reference)
        async with connect() as inputs:
            sources = await inputs.fetch(job, tmp_path)
        assert sources == Sources(reference=tmp_path / "reference.flac")

    @pytest.mark.parametrize("task_type", ["cover", "repaint", "extract", "lego", "complete"])
    async def test_every_other_task_gets_its_source_and_its_reference(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, task_type: str
    ) -> None:
        job = make_job(
            task_type=task_type,
            src_audio_path=web_host.serve("/song.mp3", b"ID3 song"),
            reference_audio_path=web_host.serve("/voice.wav", b"RIFF voice"),
        )
        async with connect() as inputs:
            sources = await inputs.fetch(job, tmp_path)
        assert sources == Sources(source=tmp_path / "source.mp3", reference=tmp_path / "reference.wav")
        assert (tmp_path / "source.mp3").read_bytes() == b"ID3 song"
        assert (tmp_path / "reference.wav").read_bytes() == b"RIFF voice"

    async def test_a_refused_reference_is_refused_before_the_source_is_read(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        source = web_host.serve("/song.mp3", b"ID3")
        job = naming(make_job(task_type="cover"), src_audio_path=source, reference_audio_path="/etc/passwd")
        async with connect() as inputs:
            with pytest.raises(InputNotAllowed, match=r"^reference_audio_path = /etc/passwd"):
                await inputs.fetch(job, tmp_path)
        assert web_host.hits == []


class TestRefused:
    @pytest.mark.parametrize(
        "place",
        ["/etc/passwd", "../song.wav", "song.wav", r"C:\song.wav", "file:///etc/passwd", "data:audio/wav;base64,AA",
         "http://localhost/a.wav", "ftp://localhost/a.wav", "//localhost/a.wav", "gopher://x"],
    )  # fmt: skip
    async def test_a_place_of_another_kind_is_told_what_is_accepted_and_what_to_set(
        self, connect: Connect, tmp_path: Path, place: str
    ) -> None:
        async with connect() as inputs:
            text = await refusal(inputs, tmp_path, place)
        assert text.startswith(f"src_audio_path = {place}: audio inputs are s3://bucket/key or https://host/path")
        assert "ACESTEP_INPUT_BUCKETS" in text
        assert "ACESTEP_INPUT_HOSTS" in text

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("s3://elsewhere/a.wav", "the bucket 'elsewhere' is not in ACESTEP_INPUT_BUCKETS"),
            ("s3://acestep", "must look like s3://bucket/key"),
            ("s3://acestep/", "must look like s3://bucket/key"),
            ("s3:acestep/a.wav", "must look like s3://bucket/key"),
            ("s3://acestep/../elsewhere/a.wav", "a key with '.' or '..' between slashes is not accepted"),
            ("s3://acestep/a/./b.wav", "a key with '.' or '..' between slashes is not accepted"),
        ],
    )
    async def test_an_s3_place_that_is_not_allowed_says_why(
        self, connect: Connect, tmp_path: Path, place: str, reason: str
    ) -> None:
        async with connect() as inputs:
            assert await refusal(inputs, tmp_path, place) == f"src_audio_path = {place}: {reason}"

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("https://other.example/a.wav", "the host 'other.example' is not in ACESTEP_INPUT_HOSTS"),
            ("https://localhost/a.wav", "the host 'localhost' is not in ACESTEP_INPUT_HOSTS"),
            ("https://sub.{host}/a.wav", "is not in ACESTEP_INPUT_HOSTS"),
            ("https://127.0.0.1:{port}/a.wav", "is not in ACESTEP_INPUT_HOSTS"),
            ("https://other.example#@{host}/a.wav", "the host 'other.example' is not in ACESTEP_INPUT_HOSTS"),
            ("https://{host}@other.example/a.wav", "a URL with a user name is not accepted"),
            ("https://me:secret@{host}/a.wav", "a URL with a user name is not accepted"),
            ("https:///a.wav", "must look like https://host/path"),
            ("https://{host}\\@other.example/a.wav", "not a valid URL"),
            ("https://{host}99999/a.wav", "not a valid URL"),
        ],
    )
    async def test_an_https_place_that_is_not_allowed_says_why(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, template: str, reason: str
    ) -> None:
        place = template.format(host=web_host.host, port=web_host.host.partition(":")[2])
        async with connect() as inputs:
            text = await refusal(inputs, tmp_path, place)
        assert reason in text
        assert "secret" not in text
        assert web_host.hits == []

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ("https://other.example/a.wav?token=secret", "the host 'other.example' is not in ACESTEP_INPUT_HOSTS"),
            ("http://localhost/a.wav", "http:// is not accepted, https:// is"),
            ("file:///etc/passwd", "file:// is not accepted, https:// is"),
            ("//169.254.169.254/latest", "the host '169.254.169.254' is not in ACESTEP_INPUT_HOSTS"),
        ],
    )
    async def test_a_redirect_is_checked_as_the_first_url_was(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, target: str, reason: str
    ) -> None:
        place = web_host.redirect("/a.wav", target)
        async with connect() as inputs:
            text = await refusal(inputs, tmp_path, place)
        assert text == f"src_audio_path = {place}: redirected to {target.partition('?')[0]}: {reason}"

    @pytest.mark.parametrize("host", ["https://a.example", "a.example/path", "a b", "me@a.example", "a.example:123456"])
    def test_a_malformed_host_setting_stops_the_start(self, host: str) -> None:
        with pytest.raises(SettingsError, match=r"^ACESTEP_INPUT_HOSTS: '"):
            AllowedInputs(None, StorageSettings(), InputSettings(hosts=(host,)))  # type: ignore[arg-type]


class TestFromS3:
    async def test_the_result_bucket_is_always_allowed(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        body = bytes(range(256)) * 20_000
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/ä song+1.MP3", Body=body)
        async with connect() as inputs:
            path = await fetch(inputs, tmp_path, f"s3://{s3.bucket}/{s3_prefix}/ä song+1.MP3")
        assert path == tmp_path / "source.mp3"
        assert path.read_bytes() == body

    async def test_another_bucket_is_allowed_by_setting(
        self, connect: Connect, client: "S3Client", s3_prefix: str, tmp_path: Path
    ) -> None:
        bucket = f"in-{s3_prefix[5:25]}"
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="a.wav", Body=b"RIFF")
        async with connect(buckets=(bucket,)) as inputs:
            assert (await fetch(inputs, tmp_path, f"s3://{bucket}/a.wav")).read_bytes() == b"RIFF"

    async def test_a_missing_object_is_unreadable(self, connect: Connect, s3: SeaweedFS, tmp_path: Path) -> None:
        async with connect() as inputs:
            text = await failure(inputs, tmp_path, f"s3://{s3.bucket}/none.wav")
        assert text == f"src_audio_path = s3://{s3.bucket}/none.wav: S3 returned NoSuchKey"

    async def test_more_bytes_than_allowed_are_not_read(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/a.wav", Body=bytes(1_001))
        async with connect(max_bytes=1_000) as inputs:
            text = await failure(inputs, tmp_path, f"s3://{s3.bucket}/{s3_prefix}/a.wav")
        assert text.endswith("more than 1,000 bytes (ACESTEP_INPUT_MAX_BYTES)")


async def lora_of(inputs: AllowedInputs, folder: Path, path: str, **request: Any) -> Path | None:
    """Fetch the LoRA of a job whose folder is ``folder``, which is made as the worker makes it."""
    await asyncio.to_thread(folder.mkdir)
    loras = (await inputs.fetch(make_job(lora=path, **request), folder)).loras
    return loras[0] if loras else None


class TestLora:
    async def test_it_is_fetched_once_for_all_jobs_until_it_changes(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        key = f"{s3_prefix}/jazz.safetensors"
        client.put_object(Bucket=s3.bucket, Key=key, Body=b"first")
        async with connect() as inputs:
            first = await lora_of(inputs, tmp_path / "1", f"s3://{s3.bucket}/{key}")
            again = await lora_of(inputs, tmp_path / "2", f"s3://{s3.bucket}/{key}")
            client.put_object(Bucket=s3.bucket, Key=key, Body=b"other")
            other = await lora_of(inputs, tmp_path / "3", f"s3://{s3.bucket}/{key}")
        assert first is not None
        assert again is not None
        assert other is not None
        assert first == tmp_path / "1/lora-0/lora.safetensors"
        assert first.samefile(again)
        assert (again.read_bytes(), other.read_bytes()) == (b"first", b"other")

    async def test_jobs_that_come_together_share_one_fetch(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        place = f"s3://{s3.bucket}/{s3_prefix}/jazz.safetensors"
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/jazz.safetensors", Body=bytes(3 << 20))
        async with connect() as inputs:
            copies = await asyncio.gather(*(lora_of(inputs, tmp_path / str(job), place) for job in range(4)))
        assert len({path.stat().st_ino for path in copies if path}) == 1

    async def test_one_that_peft_wrote_comes_with_its_configuration(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/jazz/adapter_model.safetensors", Body=b"weights")
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/jazz/adapter_config.json", Body=b"{}")
        async with connect() as inputs:
            weights = await lora_of(inputs, tmp_path / "1", f"s3://{s3.bucket}/{s3_prefix}/jazz/")
            client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/jazz/adapter_config.json", Body=b"{ }")
            anew = await lora_of(inputs, tmp_path / "2", f"s3://{s3.bucket}/{s3_prefix}/jazz/adapter_model.safetensors")
        assert weights == tmp_path / "1/lora-0/adapter_model.safetensors"
        assert anew is not None
        assert weights.with_name("adapter_config.json").read_bytes() == b"{}"
        assert anew.with_name("adapter_config.json").read_bytes() == b"{ }"

    async def test_several_are_fetched_in_the_requests_order(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        places = [f"s3://{s3.bucket}/{s3_prefix}/{name}.safetensors" for name in ("jazz", "blues", "jazz")]
        for name in ("jazz", "blues"):
            client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/{name}.safetensors", Body=name.encode())
        for folder in ("1", "2"):
            (tmp_path / folder).mkdir()
        async with connect() as inputs:
            found = await inputs.fetch(make_job(lora=places[0], loras=places[1:]), tmp_path / "1")
            with pytest.raises(InputUnreadable, match=r"^loras\.1\.path = s3://.*none\.safetensors"):
                await inputs.fetch(make_job(loras=[places[0], f"s3://{s3.bucket}/none.safetensors"]), tmp_path / "2")
        assert [path.read_bytes() for path in found.loras] == [b"jazz", b"blues", b"jazz"]

    async def test_a_missing_one_is_unreadable(self, connect: Connect, s3: SeaweedFS, tmp_path: Path) -> None:
        place = f"s3://{s3.bucket}/none.safetensors"
        async with connect() as inputs:
            with pytest.raises(InputUnreadable) as caught:
                await lora_of(inputs, tmp_path / "1", place)
        assert str(caught.value) == f"lora.path = {place}: S3 returned NoSuchKey"

    async def test_more_bytes_than_allowed_are_not_read(
        self, connect: Connect, client: "S3Client", s3: SeaweedFS, s3_prefix: str, tmp_path: Path
    ) -> None:
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/jazz.safetensors", Body=bytes(1_001))
        async with connect(lora_max_bytes=1_000, max_bytes=10) as inputs:
            with pytest.raises(InputUnreadable, match=r"more than 1,000 bytes \(ACESTEP_LORA_MAX_BYTES\)$"):
                await lora_of(inputs, tmp_path / "1", f"s3://{s3.bucket}/{s3_prefix}/jazz.safetensors")
        assert list(tmp_path.glob("**/*.safetensors")) == []  # noqa: ASYNC240 - a local disk

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("s3://elsewhere/a.safetensors", "the bucket 'elsewhere' is not in ACESTEP_INPUT_BUCKETS"),
            ("s3://acestep/../elsewhere/a.safetensors", "a key with '.' or '..' between slashes is not accepted"),
            ("s3:///a.safetensors", "the bucket '' is not in ACESTEP_INPUT_BUCKETS"),
        ],
    )
    async def test_it_comes_from_the_buckets_that_audio_comes_from(
        self, connect: Connect, tmp_path: Path, place: str, reason: str
    ) -> None:
        async with connect() as inputs:
            with pytest.raises(InputNotAllowed) as caught:
                await lora_of(inputs, tmp_path / "1", place)
        assert str(caught.value).endswith(reason)

    async def test_a_name_is_looked_up_in_the_checkpoint_folder(self, connect: Connect, tmp_path: Path) -> None:
        (tmp_path / "loras").mkdir()
        (tmp_path / "loras/jazz.safetensors").write_bytes(b"jazz")
        async with connect(checkpoint_dir=tmp_path) as inputs:
            assert await lora_of(inputs, tmp_path / "1", "jazz") == tmp_path / "loras/jazz.safetensors"
            with pytest.raises(InputUnreadable, match=r"^lora.path = blues: not found"):
                await lora_of(inputs, tmp_path / "2", "blues")
        async with connect() as inputs:
            with pytest.raises(InputNotAllowed, match=r"no checkpoint folder \(ACESTEP_CHECKPOINT_DIR\)"):
                await lora_of(inputs, tmp_path / "3", "jazz")

    async def test_an_analysis_fetches_none(self, connect: Connect, tmp_path: Path) -> None:
        async with connect() as inputs:
            assert await lora_of(inputs, tmp_path / "1", "s3://elsewhere/a.safetensors", analysis_only=True) is None


class TestFromHttps:
    @pytest.mark.parametrize(
        ("path", "name"),
        [("/a.OGG", "source.ogg"), ("/a", "source"), ("/a.toolongending", "source"), ("/a.b%2Fc", "source")],
    )
    async def test_the_copy_keeps_a_plausible_ending(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, path: str, name: str
    ) -> None:
        web_host.serve(path.replace("%2F", "/"), b"audio")
        async with connect() as inputs:
            assert (await fetch(inputs, tmp_path, web_host.url(path))).name == name

    async def test_a_redirect_within_the_allowed_host_is_followed(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        web_host.serve("/there.wav", b"RIFF")
        async with connect() as inputs:
            path = await fetch(inputs, tmp_path, web_host.redirect("/here.wav", "/there.wav"))
        assert path.read_bytes() == b"RIFF"

    async def test_redirects_end_after_three(self, connect: Connect, web_host: HttpsServer, tmp_path: Path) -> None:
        place = web_host.redirect("/a.wav", "/a.wav")
        async with connect() as inputs:
            text = await failure(inputs, tmp_path, place)
        assert text == f"src_audio_path = {place}: more than 3 redirects"
        assert len(web_host.hits) == 4

    async def test_a_missing_file_is_unreadable_and_its_query_stays_secret(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        async with connect() as inputs:
            text = await failure(inputs, tmp_path, web_host.url("/a.wav?X-Amz-Signature=secret"))
        assert text == f"src_audio_path = {web_host.url('/a.wav')}: the host returned 404"

    async def test_a_host_that_stumbles_is_asked_again(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        async def stumble(_: web.Request) -> web.StreamResponse:
            return web.Response(status=503) if len(web_host.hits) < 3 else web.Response(body=b"RIFF")

        place = web_host.answer("/a.wav", stumble)
        async with connect() as inputs:
            assert (await fetch(inputs, tmp_path, place)).read_bytes() == b"RIFF"

    async def test_a_host_that_stays_down_is_given_up(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        async def down(_: web.Request) -> web.StreamResponse:
            return web.Response(status=503)

        place = web_host.answer("/a.wav", down)
        async with connect() as inputs:
            assert await failure(inputs, tmp_path, place) == f"src_audio_path = {place}: the host returned 503"
        assert len(web_host.hits) == 3

    async def test_an_answer_that_breaks_off_is_read_again_from_the_start(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        async def break_off_once(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "8"})
            await response.prepare(request)
            await response.write(b"RIFF")
            if len(web_host.hits) == 1:
                assert isinstance(request.transport, asyncio.Transport)
                request.transport.close()
            else:
                await response.write(b"WAVE")
            return response

        place = web_host.answer("/a.wav", break_off_once)
        async with connect() as inputs:
            assert (await fetch(inputs, tmp_path, place)).read_bytes() == b"RIFFWAVE"

    async def test_more_bytes_than_allowed_are_not_read_even_when_unannounced(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        async def long(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            for _ in range(64):
                await response.write(bytes(65_536))
                await asyncio.sleep(0)  # writing to a client that has left does not pause
            return response

        place = web_host.answer("/a.wav", long)
        async with connect(max_bytes=1 << 20) as inputs:
            text = await failure(inputs, tmp_path, place)
        assert text == f"src_audio_path = {place}: more than 1,048,576 bytes (ACESTEP_INPUT_MAX_BYTES)"

    async def test_a_host_that_drips_is_given_up(self, connect: Connect, web_host: HttpsServer, tmp_path: Path) -> None:
        async def drip(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(500):
                await response.write(b"x")
                await asyncio.sleep(0.02)
            return response

        place = web_host.answer("/a.wav", drip)
        async with connect(timeout_s=0.5) as inputs:
            text = await failure(inputs, tmp_path, place)
        assert text == f"src_audio_path = {place}: not fetched within 0.5 s (ACESTEP_INPUT_TIMEOUT_S)"

    @pytest.mark.parametrize(
        ("body", "headers", "said"),
        [
            (b"", {}, "empty"),
            (
                b"\x1f\x8b",
                {"Content_Encoding": "gzip"},
                "compressed in transit, although that was not requested",
            ),
        ],
        ids=["nothing", "compressed"],
    )
    async def test_an_answer_that_is_no_audio_file_is_unreadable(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, body: bytes, headers: dict[str, str], said: str
    ) -> None:
        place = web_host.serve("/a.wav", body, **headers)
        async with connect() as inputs:
            assert await failure(inputs, tmp_path, place) == f"src_audio_path = {place}: {said}"

    async def test_a_certificate_that_nobody_vouches_for_is_not_trusted(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        place = web_host.serve("/a.wav", b"RIFF")
        async with connect(trusting=False) as inputs:
            text = await failure(inputs, tmp_path, place)
        assert text == f"src_audio_path = {place}: the host's certificate is not trusted"
        assert web_host.hits == []
