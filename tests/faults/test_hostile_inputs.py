# SPDX-License-Identifier: Apache-2.0
"""Fault: a message names an input that it must not get, or a host answers with more, later or other than it should.

Every refusal here ends as an event that can be published, says what the operator may change, and keeps to itself where
a name of the inner network leads.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from structlog.testing import capture_logs

from acestep_consumer.domain.errors import ConsumerError, InputNotAllowed, InputUnreadable, InvalidRequest
from acestep_consumer.domain.outcome import RunInfo, unfinished
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_schemas.events import unfinished_event
from tests.support.https_server import OTHER_NAME, HttpsServer, RawHttpsServer
from tests.support.inputs import certificate, naming, open_inputs, session, web_host
from tests.support.jobs import make_job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import boto3

    from acestep_consumer.inputs.fetch import AllowedInputs
    from infra.local.s3 import SeaweedFS

    Connect = Callable[..., AbstractAsyncContextManager[AllowedInputs]]

__all__ = ["certificate", "session", "web_host"]

SCENE = RunInfo("w1", 1, datetime.now(UTC))
# One of each kind: loopback, private, carrier-grade NAT, link-local, and so on; then their disguises in IPv6.
NOT_PUBLIC = [
    "127.0.0.1", "127.9.9.9", "0.0.0.7", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "100.100.100.200", "169.254.169.254", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1",
    "2002:7f00:1::1", "2001:0:7f00:1::1",
]  # fmt: skip


class Names(AbstractResolver):
    """Leads every name to the next of ``answers``, and to the last one for good. Counts the look-ups."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = answers
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        return [self._found(host, port, address) for address in addresses]

    def _found(self, host: str, port: int, address: str) -> ResolveResult:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)

    async def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
async def raw_host(certificate: tuple[Path, Path]) -> AsyncIterator[RawHttpsServer]:
    async with RawHttpsServer(*certificate) as server:
        yield server


@pytest.fixture
def connect(s3: SeaweedFS, session: boto3.Session) -> Connect:
    """Opens inputs that may read the named server on this machine; arguments override settings."""

    def opened(
        server: HttpsServer | RawHttpsServer | None = None, resolver: AbstractResolver | None = None, **values: Any
    ) -> AbstractAsyncContextManager[AllowedInputs]:
        here = {"hosts": (server.host,), "tls": server.trust} if server else {}
        return open_inputs(s3, session, **{"resolver": resolver, **here, **values})

    return opened


def redirect(location: bytes) -> bytes:
    """An answer that sends the asker on, and tries to give it a cookie on the way."""
    return (
        b"HTTP/1.1 302 Found\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\nConnection: close\r\n"
        b"Location: " + location + b"\r\n\r\n"
    )


async def fetch(inputs: AllowedInputs, folder: Path, place: str) -> bytes:
    sources = await inputs.fetch(naming(make_job(task_type="cover"), src_audio_path=place), folder)
    assert sources.source is not None
    return sources.source.read_bytes()


async def ending(inputs: AllowedInputs, folder: Path, place: str) -> ConsumerError:
    """How a fetch ends that must not succeed; an event can be made of it."""
    with pytest.raises(ConsumerError) as caught:
        await fetch(inputs, folder, place)
    event = unfinished_event(unfinished(caught.value, None, "t1", SCENE))
    assert json.loads(event.to_json())["data"]["error"]["message"] == str(caught.value)
    return caught.value


async def refusal(inputs: AllowedInputs, folder: Path, place: str) -> str:
    error = await ending(inputs, folder, place)
    assert type(error) is InputNotAllowed, error
    assert list(folder.iterdir()) == []  # noqa: ASYNC240 - a local disk
    return str(error)


async def failure(inputs: AllowedInputs, folder: Path, place: str) -> str:
    error = await ending(inputs, folder, place)
    assert type(error) is InputUnreadable, error
    return str(error)


class TestPlaces:
    @pytest.mark.parametrize(
        "place",
        ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd",
         "~/.ssh/id_rsa", "http://localhost/a.wav", "ftp://localhost/a.wav", "data:audio/wav;base64,UklGRg==",
         "//localhost/a.wav", "smb://host/share", r"\\host\share\a.wav", "jar:https://localhost/a!/b", "s3", "https",
         "https:", "/proc/self/environ"],
    )  # fmt: skip
    async def test_what_is_neither_s3_nor_https_is_refused_by_the_request_and_again_by_the_inputs(
        self, connect: Connect, tmp_path: Path, place: str
    ) -> None:
        for fields in ({"src_audio_path": place}, {"reference_audio_path": place}, {"lora": f"../{place}"}):
            with pytest.raises(InvalidRequest):
                parse(json.dumps(fields).encode(), "t1", RequestRules(max_bytes=1 << 20))
        async with connect() as inputs:
            await refusal(inputs, tmp_path, place)

    @pytest.mark.parametrize(
        "place",
        ["s3://other/a.wav", "s3://acestep.other/a.wav", "s3://ACESTEP/a.wav", "s3://acestep@other/a.wav", "s3://acestep%2Fx/a",
         "s3://acestep/../other/a.wav", "s3://acestep/a/../../other/a.wav", "s3://../acestep/a.wav", "s3:///acestep/a.wav",
         "s3://acestep?x/a.wav", "s3://acestep", "s3://"],
    )  # fmt: skip
    async def test_a_foreign_bucket_is_refused_however_it_is_written(
        self, connect: Connect, tmp_path: Path, place: str
    ) -> None:
        async with connect() as inputs:
            await refusal(inputs, tmp_path, place)

    @pytest.mark.parametrize(
        "key",
        ["%2e%2e/other/a.wav", "a\\..\\b", "a//b", "\u202egnp.wav", "line\nbreak", "nul\x00", "?versions", "#",
         "k" * 1_500, " "],
    )  # fmt: skip
    async def test_an_odd_key_in_an_allowed_bucket_is_only_a_key_that_is_not_there(
        self, connect: Connect, s3: SeaweedFS, tmp_path: Path, key: str
    ) -> None:
        async with connect() as inputs:
            assert "S3 returned" in await failure(inputs, tmp_path, f"s3://{s3.bucket}/{key}")


class TestAddresses:
    @pytest.mark.parametrize("address", NOT_PUBLIC)
    async def test_an_allowed_name_that_leads_to_an_inner_address_is_refused_and_the_address_kept_for_the_log(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, address: str
    ) -> None:
        names = Names([address])
        place = web_host.serve("/a.wav", b"RIFF")
        async with connect(web_host, names, networks=()) as inputs:
            with capture_logs() as logs:
                text = await refusal(inputs, tmp_path, place)
        assert text == (
            f"src_audio_path = {place}: the host 'localhost' is not on the public internet, and its network is not in "
            "ACESTEP_INPUT_NETWORKS"
        )
        [line] = logs
        assert (line["host"], line["address"]) == ("localhost", str(ip_address(address)))
        assert (names.asked, web_host.hits) == (1, [])

    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"])
    async def test_an_address_in_the_place_of_a_name_is_no_way_around(
        self, connect: Connect, tmp_path: Path, host: str
    ) -> None:
        """No resolver is asked for these, and the operator listed the host but not its network."""
        connections: list[object] = []
        async with await asyncio.start_server(lambda *_: connections.append(_), "127.0.0.1", 0) as server:
            entry = f"{host}:{server.sockets[0].getsockname()[1]}"
            async with connect(hosts=(entry,), networks="10.0.0.0/8") as inputs:
                await refusal(inputs, tmp_path, f"https://{entry}/a.wav")
        assert connections == []

    async def test_a_name_that_is_rebound_after_the_first_look_is_refused_at_the_second(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        place = web_host.serve("/a.wav", b"RIFF", Connection="close")
        async with connect(web_host, Names(["127.0.0.1"], ["127.0.0.2"])) as inputs:
            assert await fetch(inputs, tmp_path, place) == b"RIFF"
            connector: Any = inputs._http.connector
            connector.clear_dns_cache()
            (tmp_path / "again").mkdir()
            await refusal(inputs, tmp_path / "again", place)
        assert len(web_host.hits) == 1

    async def test_of_several_addresses_only_allowed_ones_are_connected_to(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        place = web_host.serve("/a.wav", b"RIFF")
        async with connect(web_host, Names(["127.0.0.2", "::1", "127.0.0.1"])) as inputs:
            assert await fetch(inputs, tmp_path, place) == b"RIFF"

    @pytest.mark.parametrize("networks", ["127.0.0.0/8", "10.0.0.0/8, 127.0.0.1", ("::/0", "127.0.0.1/32")])
    async def test_a_network_that_the_operator_allows_is_read(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, networks: Any
    ) -> None:
        place = web_host.serve("/a.wav", b"RIFF")
        async with connect(web_host, Names(["127.0.0.1"]), networks=networks) as inputs:
            assert await fetch(inputs, tmp_path, place) == b"RIFF"

    async def test_a_proxy_in_the_environment_is_not_asked_to_connect_in_our_place(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        place = web_host.serve("/a.wav", b"RIFF")
        async with connect(web_host) as inputs:
            assert await fetch(inputs, tmp_path, place) == b"RIFF"


class TestRedirects:
    @pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "127.0.0.2", "::1", "::ffff:127.0.0.1"])
    async def test_a_redirect_to_an_allowed_name_on_an_inner_address_is_refused(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, address: str
    ) -> None:
        inside = f"{OTHER_NAME}:{web_host.host.partition(':')[2]}"
        place = web_host.redirect("/a.wav", f"https://{inside}/b.wav")
        web_host.serve("/b.wav", b"secret")
        async with connect(web_host, Names(["127.0.0.1"], [address]), hosts=(web_host.host, inside)) as inputs:
            text = await refusal(inputs, tmp_path, place)
        assert f"the host {OTHER_NAME!r} is not on the public internet" in text
        assert address not in text
        assert web_host.hits == ["/a.wav"]

    @pytest.mark.parametrize(
        "target",
        ["https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://other.example/", "https://localhost:1/a.wav",
         "//other.example/a.wav", "http://localhost/a.wav", "file:///etc/passwd", "s3://acestep/a.wav",
         "https://user:pass@localhost/", "https://localhost/"],
    )  # fmt: skip
    async def test_a_redirect_to_what_the_message_itself_might_not_name_is_refused(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path, target: str
    ) -> None:
        place = web_host.redirect("/a.wav", target)
        async with connect(web_host) as inputs:
            text = await refusal(inputs, tmp_path, place)
        assert "redirected to" in text
        assert web_host.hits == ["/a.wav"]

    async def test_an_allowed_host_passes_on_neither_cookies_nor_credentials(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path
    ) -> None:
        raw_host.answer = redirect(b"/c")
        async with connect(raw_host, timeout_s=20) as inputs:
            assert (await failure(inputs, tmp_path, raw_host.url)).endswith("more than 3 redirects")
        assert len(raw_host.requests) == 4
        asked = b"".join(raw_host.requests).lower()
        assert b"cookie" not in asked
        assert b"authorization" not in asked
        assert b"accept-encoding: identity" in asked

    @pytest.mark.parametrize(
        "location", [b"//\xff\xfe/", b"https://\xed\xa0\x80/", b"https://[/", b"x\xff", b"/" * 8_000], ids=ascii
    )
    async def test_a_redirect_to_bytes_that_are_no_url_ends_as_an_event_all_the_same(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path, location: bytes
    ) -> None:
        raw_host.answer = redirect(location)
        async with connect(raw_host, timeout_s=20) as inputs:
            error = await ending(inputs, tmp_path, raw_host.url)
        assert isinstance(error, InputNotAllowed | InputUnreadable)
        assert len(str(error)) < 1_000


class TestBodies:
    async def test_an_endless_body_is_cut_off_at_the_limit(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path
    ) -> None:
        async def pour(writer: asyncio.StreamWriter) -> None:
            while not writer.is_closing():
                writer.write(bytes(1 << 16))
                await writer.drain()
                await asyncio.sleep(0)  # writing to a client that has left does not pause

        raw_host.answer, raw_host.go_on = b"HTTP/1.1 200 OK\r\n\r\n", pour
        async with connect(raw_host, max_bytes=1 << 20) as inputs:
            text = await failure(inputs, tmp_path, raw_host.url)
        assert text.endswith("more than 1,048,576 bytes (ACESTEP_INPUT_MAX_BYTES)")
        assert (tmp_path / "source.wav").stat().st_size <= 1 << 20

    async def test_a_body_that_is_announced_as_too_large_is_not_begun(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path
    ) -> None:
        raw_host.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n"
        async with connect(raw_host, max_bytes=1 << 20, timeout_s=20) as inputs:
            text = await failure(inputs, tmp_path, raw_host.url)
        assert text.endswith("more than 1,048,576 bytes (ACESTEP_INPUT_MAX_BYTES)")
        assert len(raw_host.requests) == 1

    @pytest.mark.parametrize(
        "answer",
        [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nRIFF",
         b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nRI"],
        ids=["no answer", "half a header", "half a body", "half a chunk"],
    )  # fmt: skip
    async def test_a_host_that_falls_silent_costs_no_more_than_the_time_limit(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path, answer: bytes
    ) -> None:
        raw_host.answer = answer
        async with connect(raw_host, timeout_s=0.4) as inputs:
            text = await failure(inputs, tmp_path, raw_host.url)
        assert text.endswith("not fetched within 0.4 s (ACESTEP_INPUT_TIMEOUT_S)")

    async def test_a_host_that_does_not_answer_the_handshake_costs_no_more_than_the_time_limit(
        self, connect: Connect, certificate: tuple[Path, Path], tmp_path: Path
    ) -> None:
        async with (
            RawHttpsServer(*certificate, handshake=False) as server,
            connect(server, timeout_s=0.4) as inputs,
        ):
            assert "not fetched within 0.4 s" in await failure(inputs, tmp_path, server.url)

    @pytest.mark.parametrize("drop", [b"x", b"1\r\nx\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"X-Header: x\r\n"])
    async def test_a_host_that_drips_costs_no_more_than_the_time_limit(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path, drop: bytes
    ) -> None:
        async def drip(writer: asyncio.StreamWriter) -> None:
            while not writer.is_closing():
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0.05)

        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        begun = {b"x": b"HTTP/1.1 200 OK\r\n\r\n", b"1": chunked, b"X": b"HTTP/1.1 200 OK\r\n"}
        raw_host.answer, raw_host.go_on = begun.get(drop[:1], b""), drip
        began = time.monotonic()
        async with connect(raw_host, timeout_s=0.6) as inputs:
            assert "not fetched within 0.6 s" in await failure(inputs, tmp_path, raw_host.url)
        assert time.monotonic() - began < 10  # a busy machine is no failure

    @pytest.mark.parametrize(
        "coding", [["gzip"], ["GZip"], ["deflate"], ["br"], ["zstd"], ["identity, gzip"], ["identity", "gzip"]], ids=str
    )
    async def test_a_body_that_would_unpack_to_a_thousand_times_its_size_is_not_unpacked_nor_kept(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path, coding: list[str]
    ) -> None:
        bomb = gzip.compress(bytes(16 << 20))
        headers = "".join(f"Content-Encoding: {name}\r\n" for name in coding)
        raw_host.answer = f"HTTP/1.1 200 OK\r\n{headers}Content-Length: {len(bomb)}\r\n\r\n".encode() + bomb
        async with connect(raw_host) as inputs:
            text = await failure(inputs, tmp_path, raw_host.url)
        assert text.endswith("compressed in transit, although that was not requested")
        assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - a local disk
        assert len(raw_host.requests) == 1

    async def test_a_compressed_file_counts_as_the_bytes_that_it_has(
        self, connect: Connect, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        bomb = gzip.compress(bytes(16 << 20))
        async with connect(web_host, max_bytes=1 << 20) as inputs:
            assert await fetch(inputs, tmp_path, web_host.serve("/a.wav", bomb)) == bomb

    @pytest.mark.parametrize(
        "headers",
        [
            b"X-Long: " + b"x" * (1 << 20),
            b"x" * (1 << 20),
            b"\r\n".join(b"X-%d: y" % number for number in range(100_000)),
            b"Content-Length: -1",
            b"Content-Length: 1\r\nContent-Length: 2",
        ],
        ids=["one long value", "one long name", "very many", "length below zero", "two lengths"],
    )
    async def test_headers_beyond_all_reason_are_not_read_and_the_host_is_not_asked_again(
        self, connect: Connect, raw_host: RawHttpsServer, tmp_path: Path, headers: bytes
    ) -> None:
        raw_host.answer = b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\nRIFF"
        async with connect(raw_host, timeout_s=20) as inputs:
            text = await failure(inputs, tmp_path, raw_host.url)
        assert text.endswith("the host's response is not HTTP, or has too many or too long headers")
        assert len(raw_host.requests) == 1

    async def test_who_asks_the_same_host_after_that_is_served(
        self, connect: Connect, raw_host: RawHttpsServer, web_host: HttpsServer, tmp_path: Path
    ) -> None:
        """All jobs share one pool of connections: what was left unread in one of them must not come to the next job."""

        async def stumble(_: web.Request) -> web.StreamResponse:
            return web.Response(status=200, headers={"Content-Encoding": "gzip"}, body=b"\x1f\x8b")

        raw_host.answer = b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\nRIFF\r\nHTTP/1.1 200 OK\r\n"
        hostile, hosts = web_host.answer("/bad.wav", stumble), (web_host.host, raw_host.host)
        async with connect(web_host, hosts=hosts) as inputs:
            for folder in (tmp_path / str(number) for number in range(3)):
                folder.mkdir()
                await failure(inputs, folder, hostile)
                await failure(inputs, folder, raw_host.url)
                assert await fetch(inputs, folder, web_host.serve("/good.wav", b"RIFF")) == b"RIFF"
