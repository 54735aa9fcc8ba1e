# SPDX-License-Identifier: Apache-2.0
"""The line to S3: who we are, where things lie, one attempt and the next, and what a failure means.

boto3 decides credentials, region, addressing and signature. The rare calls are its own, in a small thread pool. The
two or three requests that every job makes are signed by botocore and sent by aiohttp from the event loop: a boto3 call
through a thread costs several times the CPU, and cannot be cancelled.
"""

import asyncio
import hashlib
import io
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import boto3
import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, SSLError
from botocore.exceptions import ConnectionError as BotoConnectionError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential
from yarl import URL

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
Receiver = Callable[[AsyncIterator[bytes]], Awaitable[None]]
"""Takes the chunks of one attempt; the next attempt starts from the first byte again."""

DEFAULT_REGION: Final = "us-east-1"
OK: Final = range(200, 300)

_THREADS: Final = 8
_CONNECTIONS: Final = 32
_CONNECT_S: Final = 5
_READ_S: Final = 30
_CREDENTIALS_FRESH_S: Final = 60
_CHUNK_BYTES: Final = 1 << 20
_WARNING_BYTES: Final = 1 << 20  # aiohttp warns about larger bodies unless they are files
_NO_BYTES: Final = hashlib.sha256(b"").hexdigest()
_ERROR_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")

_PASSING_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES: Final = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
    }
)
_HINTS: Final = {
    "301": "set AWS_REGION to the bucket's region",
    "403": "check the AWS keys, and what they may do here",
    "AccessDenied": "these keys may not do that here",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "ExpiredToken": "the session token has expired",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "NoSuchBucket": "create the bucket, or name another",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "SSLError": "the certificate is not trusted; set AWS_CA_BUNDLE",
}


class S3Refused(StorageUnavailable):
    """S3 answered, and waiting will not change the answer. ``s3_code`` is its error code, or the HTTP status."""

    def __init__(self, place: object, s3_code: str) -> None:
        hint = _HINTS.get(s3_code)
        super().__init__(f"{place}: {s3_code}" + (f" ({hint})" if hint else ""))
        self.s3_code = s3_code


class _TransientS3Error(Exception):
    """One attempt failed; the next one may not. The text names no address: it ends up in events."""


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """A bucket, or an object in it."""

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"


@dataclass(frozen=True, slots=True)
class S3Payload:
    """What a request sends. ``sha256`` is hexadecimal; it is part of the signature, and S3 checks it."""

    body: bytes = b""
    sha256: str = _NO_BYTES

    def stream(self) -> bytes | io.BytesIO | None:
        """Return the body in the form that suits its size; a new one for each attempt."""
        return io.BytesIO(self.body) if len(self.body) > _WARNING_BYTES else self.body or None


NOTHING: Final = S3Payload()


@dataclass(frozen=True, slots=True)
class S3Response:
    """What S3 said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The S3 error code; the HTTP status when the body names none (the answer to HEAD has no body)."""
        found = _ERROR_CODE.search(self.body)
        return found[1].decode() if found else str(self.status)

    @property
    def ok(self) -> bool:
        """Whether it did as asked."""
        return self.status in OK


class _Signer(S3SigV4Auth):
    """Signature Version 4 over a body whose SHA-256 is known: botocore would hash it again, on the event loop."""

    def payload(self, request: AWSRequest) -> str:
        return str(request.context["sha256"])


class S3Connection:
    """S3 as far as the wire goes. An async context manager: entering finds the keys, leaving closes connections.

    Args:
        settings: where S3 is.
        session: keys and region; by default what the AWS environment says.
        patience_s: how long a call is tried again while its failures may pass, in seconds.

    Every call raises ``StorageUnavailable`` when S3 stays out of reach, and ``S3Refused`` when it says no.
    """

    def __init__(
        self, settings: StorageSettings, *, session: boto3.Session | None = None, patience_s: float = 30
    ) -> None:
        self.endpoint = settings.endpoint
        self._botocore = botocore.session.get_session()
        self._session = session or boto3.Session(botocore_session=self._botocore)
        self.region = self._session.region_name or DEFAULT_REGION
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        self._patience_s = patience_s
        self.traffic = Traffic()
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientS3Error),
            stop=stop_before_delay(patience_s),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self.traffic.retried,
            reraise=True,
        )
        self._bases: dict[str, str] = {}
        self._signer_until = 0.0
        self._signer: _Signer
        self.client: S3Client
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        try:
            self.client = await self._in_thread(self._make_client)
            await self._renew_signer()
        except BaseException:
            self._threads.shutdown(wait=False)
            raise
        self._http = self._make_http()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()
        self._threads.shutdown(wait=False)

    async def ask(
        self, method: str, place: ObjectAddress, payload: S3Payload = NOTHING, headers: Mapping[str, str] | None = None
    ) -> S3Response:
        """Make one request, again while its failure may pass. What S3 answers in the end is the caller's to judge."""
        return await self._patiently(place, partial(self._ask_once, method, place, payload, headers or {}))

    async def receive(self, place: ObjectAddress, receiver: Receiver) -> None:
        """Stream an object into ``receiver``, which is called anew for each attempt."""
        await self._patiently(place, partial(self._receive_once, place, receiver))

    async def call(self, place: ObjectAddress, call: Callable[[], T]) -> T:
        """Make a call of ``client`` in a thread, again while its failure may pass."""
        return await self._patiently(place, partial(self._call_once, place, call))

    def submit(self, call: Callable[[], object]) -> None:
        """Make a call of ``client`` in a thread some time; nobody hears how it went."""
        self._threads.submit(call)

    async def _patiently(self, place: ObjectAddress, attempt: Callable[[], Awaitable[T]]) -> T:
        try:
            result: T = await self._retrying(attempt)
        except _TransientS3Error as error:
            raise StorageUnavailable(f"{place}: {error}; gave up after {self._patience_s:g} s") from error
        return result

    async def _ask_once(
        self, method: str, place: ObjectAddress, payload: S3Payload, headers: Mapping[str, str]
    ) -> S3Response:
        url, signed = await self._sign(method, place, payload.sha256, headers)
        try:
            async with self._http.request(
                method, url, data=payload.stream(), headers=signed, allow_redirects=False
            ) as response:
                answer = S3Response(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _network_failure(place, error) from error
        self.traffic.sent_bytes += len(payload.body)
        self.traffic.received_bytes += len(answer.body)
        if not answer.ok and _may_pass(answer.status, answer.code):
            raise _TransientS3Error(answer.code)
        return answer

    async def _receive_once(self, place: ObjectAddress, receiver: Receiver) -> None:
        url, signed = await self._sign("GET", place, _NO_BYTES, {})
        try:
            async with self._http.get(url, headers=signed, allow_redirects=False) as response:
                if response.status not in OK:
                    answer = S3Response(response.status, response.headers, await response.read())
                    raise _verdict(place, answer.status, answer.code)
                async with aclosing(self.traffic.receiving(response.content.iter_chunked(_CHUNK_BYTES))) as chunks:
                    await receiver(chunks)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _network_failure(place, error) from error

    async def _call_once(self, place: ObjectAddress, call: Callable[[], T]) -> T:
        try:
            return await self._in_thread(call)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            raise _verdict(place, status, error.response.get("Error", {}).get("Code") or str(status)) from error
        except BotoCoreError as error:
            # The texts of network errors hold the endpoint, so only their names go on.
            name = type(error).__name__
            passing = isinstance(error, HTTPClientError | BotoConnectionError) and not isinstance(error, SSLError)
            raise (_TransientS3Error(name) if passing else S3Refused(place, name)) from error

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _sign(
        self, method: str, place: ObjectAddress, sha256: str, headers: Mapping[str, str]
    ) -> tuple[URL, dict[str, str]]:
        if time.monotonic() > self._signer_until:
            await self._renew_signer()
        url = self._base(place.bucket) + quote(place.key, safe="/~")
        request = AWSRequest(method=method, url=url, headers=headers)
        request.context["sha256"] = sha256
        self._signer.add_auth(request)
        return URL(url, encoded=True), dict(request.headers.items())

    async def _renew_signer(self) -> None:
        """Look up the keys again: temporary ones change, and renewing them can be a network call of its own."""
        try:
            credentials = await self._in_thread(self._session.get_credentials)
            frozen = await self._in_thread(credentials.get_frozen_credentials) if credentials else None
        except BotoCoreError as error:
            raise StorageUnavailable(f"the keys for S3 cannot be had: {type(error).__name__}") from error
        if frozen is None:
            raise StorageUnavailable("no keys for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        self._signer = _Signer(frozen, "s3", self.region)
        self._signer_until = time.monotonic() + _CREDENTIALS_FRESH_S

    def _base(self, bucket: str) -> str:
        """The URL that keys are appended to, as boto3 addresses this bucket."""
        if bucket not in self._bases:
            try:
                url = self.client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
            except BotoCoreError as error:
                raise S3Refused(ObjectAddress(bucket), type(error).__name__) from error
            self._bases[bucket] = url.partition("?")[0].removesuffix("k")
        return self._bases[bucket]

    def _make_client(self) -> "S3Client":
        return self._session.client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            config=Config(
                signature_version="s3v4",  # presigned URLs would be version 2 otherwise
                request_checksum_calculation="when_required",  # the signature covers the body, and not every store
                response_checksum_validation="when_required",  # understands the newer checksums
                connect_timeout=_CONNECT_S,
                read_timeout=_READ_S,
                retries={"mode": "standard", "total_max_attempts": 1},  # trying again happens in one place: here
                max_pool_connections=_THREADS,
                # "auto" would presign for AWS's global endpoint, which redirects for other regions than its own.
                s3={"addressing_style": "path" if self.endpoint else "virtual"},
            ),
        )

    def _make_http(self) -> aiohttp.ClientSession:
        bundle = self._botocore.get_config_variable("ca_bundle")
        tls = ssl.create_default_context(cafile=bundle) if bundle else True
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS, ssl=tls),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "acestep-consumer"},
            skip_auto_headers=("Accept", "Accept-Encoding"),
            auto_decompress=False,
            # Not `trust_env`: that looks for a netrc file before each request, in a thread.
            proxy=_proxy_for(self.client.meta.endpoint_url),
        )


def _proxy_for(url: str) -> str | None:
    """What HTTPS_PROXY, HTTP_PROXY and NO_PROXY say about ``url``, as boto3 reads them."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _may_pass(status: int, code: str) -> bool:
    return status in _PASSING_STATUS or code in _PASSING_CODES


def _verdict(place: ObjectAddress, status: int, code: str) -> Exception:
    return _TransientS3Error(code) if _may_pass(status, code) else S3Refused(place, code)


def _network_failure(place: ObjectAddress, error: Exception) -> Exception:
    """A certificate stays wrong; all else on the wire may pass. The texts hold the endpoint, so names only."""
    wrong_certificate = isinstance(error, aiohttp.ClientConnectorCertificateError)
    return S3Refused(place, "SSLError") if wrong_certificate else _TransientS3Error(type(error).__name__)


@dataclass(slots=True)
class Traffic:
    """Bytes of bodies, without headers, and tries after the first. All on the event loop, so no locks."""

    sent_bytes: int = 0
    received_bytes: int = 0
    retries: int = 0

    def retried(self, _state: object) -> None:
        """Count one more try; tenacity calls it before it waits."""
        self.retries += 1

    async def receiving(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Pass chunks on, and count their bytes."""
        async for chunk in chunks:
            self.received_bytes += len(chunk)
            yield chunk
