# SPDX-License-Identifier: Apache-2.0
"""Requests to S3: credentials, addressing, signatures, retries, and which failures may pass.

boto3 decides credentials, region, addressing and signature. The rare calls are its own, in a small thread pool. Those
that every job makes are signed by botocore and sent by aiohttp from the event loop: a boto3 call through a thread costs
several times the CPU, and cannot be cancelled.
"""

import asyncio
import hashlib
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import boto3
import botocore.session
import structlog
from aiohttp.abc import AbstractStreamWriter
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    HTTPClientError,
    InvalidConfigError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    UnknownCredentialError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from multidict import CIMultiDict
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_before_delay, wait_random_exponential
from yarl import URL

from acestep_consumer.config.http import NETWORK_ERRORS, RETRYABLE, authorities, open_session
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageMisconfigured, StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ObjectAddress, Traffic
from acestep_consumer.storage.retry import failed_once

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as Boto3Client

T = TypeVar("T")

log = structlog.get_logger()

DEFAULT_REGION: Final = "us-east-1"
CHUNK_BYTES: Final = 1 << 20

_OK: Final = range(200, 300)
_THREADS: Final = 8
_CONNECTIONS: Final = 32
_CONNECT_S: Final = 5
_READ_S: Final = 30
_CREDENTIALS_FRESH_S: Final = 60
_NO_BYTES: Final = hashlib.sha256(b"").hexdigest()
_ERROR_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")

_RETRYABLE_CODES: Final = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
    }
)
_MISSING: Final = frozenset({"NoSuchKey", "404"})
_WRONG_SETTINGS: Final = (
    ConfigNotFound,
    ConfigParseError,
    InvalidConfigError,
    PartialCredentialsError,
    ProfileNotFound,
    UnknownCredentialError,
)
"""What botocore raises for AWS settings that no retry can mend. Their texts hold names and paths, and no keys."""

_FILES: Final = frozenset({"config-file", "shared-credentials-file"})
"""How botocore calls it when keys come from a file."""

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


# Errors of a wrong endpoint. They may pass all the same: a proxy in between may say such things while S3 restarts.
_NO_S3 = {
    "ClientConnectorError": "no connection; check ACESTEP_S3_ENDPOINT",
    "ClientConnectorDNSError": "unknown host; check ACESTEP_S3_ENDPOINT",
    "ClientConnectorSSLError": "does the endpoint speak TLS? if not, begin ACESTEP_S3_ENDPOINT with http://",
    "ConnectionTimeoutError": "no connection in time; check ACESTEP_S3_ENDPOINT",
    "SocketTimeoutError": "no answer in time; check ACESTEP_S3_ENDPOINT",
    "ClientResponseError": "no HTTP; check the port in ACESTEP_S3_ENDPOINT",
}


class TransientS3Error(Exception):
    """One attempt failed; the next one may not. The text names no address: it ends up in events.

    ``answered``: S3 answered, with an error that may pass.
    """

    def __init__(self, text: str, *, answered: bool = False) -> None:
        super().__init__(text)
        self.answered = answered


def refused(address: ObjectAddress, code: str) -> StorageRefused:
    """Return the error for an answer that stays. ``code`` is S3's error code, or the HTTP status."""
    return StorageRefused(address, code, hint=_HINTS.get(code), missing=code in _MISSING)


def failure(address: ObjectAddress, status: int, code: str) -> Exception:
    """Return the error for an answer other than 2xx: transient, or refused."""
    return TransientS3Error(code, answered=True) if _is_retryable(status, code) else refused(address, code)


def network_failure(address: ObjectAddress, error: Exception) -> Exception:
    """Return the error for no answer: a certificate stays wrong, all else on the wire may pass.

    The texts of network errors hold the endpoint, so only their names go on.
    """
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return refused(address, "SSLError")
    name = type(error).__name__
    return TransientS3Error(f"{name} ({_NO_S3[name]})" if name in _NO_S3 else name)


@dataclass(frozen=True, slots=True)
class FilePart:
    """``size`` bytes of a file from ``offset`` on."""

    path: Path
    offset: int
    size: int

    def read(self, offset: int) -> bytes:
        """Return a chunk, from ``offset`` in this part on. Blocks."""
        with self.path.open("rb") as file:
            file.seek(self.offset + offset)
            return file.read(min(CHUNK_BYTES, self.size - offset))


def sha256_of(body: bytes | FilePart) -> str:
    """Return the digest, hexadecimal. Blocks."""
    if isinstance(body, bytes):
        return hashlib.sha256(body).hexdigest()
    digest = hashlib.sha256()
    for offset in range(0, body.size, CHUNK_BYTES):
        digest.update(body.read(offset))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class S3Payload:
    """Body of a request. ``sha256`` is hexadecimal; it is part of the signature, and most stores check it."""

    body: bytes | FilePart = b""
    sha256: str = _NO_BYTES

    @property
    def size(self) -> int:
        """Bytes."""
        return self.body.size if isinstance(self.body, FilePart) else len(self.body)


NOTHING: Final = S3Payload()


class _Body(aiohttp.Payload):
    """A payload as aiohttp sends it, chunk by chunk, from the start at each attempt; ``on_chunk`` is called between."""

    def __init__(self, payload: S3Payload, on_chunk: Callable[[], None]) -> None:
        super().__init__(payload)
        self._size = payload.size
        self._body = payload.body
        self._on_chunk = on_chunk
        self.error: OSError | None = None
        """Why the file could not be read: aiohttp makes an error of the network of it."""

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002 - aiohttp's interface
        raise TypeError("a body of bytes has no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        for offset in range(0, self._size or 0, CHUNK_BYTES):
            self._on_chunk()
            await writer.write(await self._chunk(offset))
        self._on_chunk()

    async def _chunk(self, offset: int) -> bytes:
        if isinstance(self._body, bytes):
            return self._body[offset : offset + CHUNK_BYTES]
        try:
            return await asyncio.to_thread(self._body.read, offset)
        except OSError as error:
            self.error = error
            raise


@dataclass(frozen=True, slots=True)
class S3Response:
    """Response of S3."""

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
        return self.status in _OK


class _Headers(CIMultiDict[str]):
    """Headers as botocore's signer reads and writes them. Its own type parses each one as an e-mail's."""

    def get_all(self, name: str) -> list[str]:
        return self.getall(name)


class _Signer(S3SigV4Auth):
    """Signature Version 4 over a body whose SHA-256 is known: botocore would hash it again, on the event loop."""

    def payload(self, request: AWSRequest) -> str:
        return str(request.context["sha256"])

    def headers_to_sign(self, request: AWSRequest) -> _Headers:  # type: ignore[override]  # see _Headers
        """Return all headers, ``Host`` among them; it is called twice, before and after the signature."""
        signed: _Headers | None = request.context.get("signed")
        if signed is None:
            signed = _Headers((name.lower(), value) for name, value in request.headers.items())
            request.context["signed"] = signed
        return signed


class S3Client:
    """Signed requests with retries. An async context manager: entering finds the keys, leaving closes connections.

    Args:
        settings: where S3 is.
        session: keys and region; by default what the AWS environment says.
        retry_s: how long a call is tried again while its failures may pass, seconds.
        read_s: how long a silent server is waited for, seconds, each time; None: half a minute.

    Every call raises ``StorageUnavailable`` when S3 stays out of reach, and ``StorageRefused`` when it says no. Making
    and entering one raise ``StorageMisconfigured`` for an AWS environment that cannot work.
    """

    def __init__(
        self,
        settings: StorageSettings,
        *,
        session: boto3.Session | None = None,
        retry_s: float = 30,
        read_s: float | None = None,
    ) -> None:
        self.endpoint = settings.endpoint
        with _explained():
            self._botocore = botocore.session.get_session()
            self._session = session or boto3.Session(botocore_session=self._botocore)
            self.region = self._session.region_name or DEFAULT_REGION
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        self._retry_s = retry_s
        self._read_s = _READ_S if read_s is None else read_s
        self.traffic = Traffic()
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientS3Error),
            stop=stop_before_delay(retry_s),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self._count_retry,
            reraise=True,
        )
        self._bases: dict[str, str] = {}
        self._signer_until = 0.0
        self._renewal: asyncio.Task[None] | None = None
        self._signer: _Signer
        self.boto3: Boto3Client
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        try:
            with _explained():
                trusted = _authorities(self._botocore.get_config_variable("ca_bundle"))
                self.boto3 = await self._in_thread(self._make_boto3_client)
            await self._renew_signer()
        except BaseException:
            self._threads.shutdown(wait=False)
            raise
        self._http = open_session(
            aiohttp.TCPConnector(limit=_CONNECTIONS, ssl=trusted),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self._read_s),
            # Not `trust_env`: that looks for a netrc file before each request, in a thread.
            proxy=_proxy_for(self.boto3.meta.endpoint_url),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
        await self._http.close()
        self._threads.shutdown(wait=False)
        self.boto3.close()

    async def ask(
        self,
        method: str,
        address: ObjectAddress,
        payload: S3Payload = NOTHING,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> S3Response:
        """Make one request, with retries. The answer, whatever it is in the end, is the caller's to judge."""
        return await self.retry(address, partial(self._ask_once, method, address, payload, headers or {}, query or {}))

    async def retry(self, address: ObjectAddress, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what ``attempt`` returns; it is made again while it raises ``TransientS3Error``."""
        try:
            return await attempt()
        except TransientS3Error as error:
            again = failed_once(error, attempt)
        try:
            result: T = await self._retrying(again)
        except TransientS3Error as error:
            raise StorageUnavailable(f"{address}: {error}; gave up after {self._retry_s:g} s") from error
        return result

    async def open_once(self, address: ObjectAddress, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Return the answer to one GET, its body unread; the caller closes it. Raises ``TransientS3Error`` too."""
        url, signed = await self._sign("GET", address, _NO_BYTES, headers, {})
        try:
            response = await self._http.get(url, headers=signed, allow_redirects=False)
            if response.status in _OK:
                return response
            async with response:
                answer = S3Response(response.status, response.headers, await response.read())
        except NETWORK_ERRORS as error:
            raise network_failure(address, error) from error
        raise failure(address, answer.status, answer.code)

    async def call(self, address: ObjectAddress, call: Callable[[], T]) -> T:
        """Make a call of ``boto3`` in a thread, with retries."""
        return await self.retry(address, partial(self._call_once, address, call))

    def submit(self, call: Callable[[], object]) -> None:
        """Make a call of ``boto3`` in a thread some time; its result is lost."""
        self._threads.submit(call)

    async def _ask_once(
        self,
        method: str,
        address: ObjectAddress,
        payload: S3Payload,
        headers: Mapping[str, str],
        query: Mapping[str, str],
    ) -> S3Response:
        url, signed = await self._sign(method, address, payload.sha256, headers, query)
        body: _Body | None = None
        try:
            async with asyncio.timeout(None) as stall:
                # aiohttp bounds the time to connect, and for the answer, but not for a body that the server won't take.
                body = _Body(payload, partial(_postpone, stall)) if payload.size else None
                async with self._http.request(
                    method, url, data=body, headers=signed, allow_redirects=False
                ) as response:
                    answer = S3Response(response.status, response.headers, await response.read())
        except NETWORK_ERRORS as error:
            if body is not None and body.error is not None:
                raise body.error from error
            raise network_failure(address, error) from error
        self.traffic.sent_bytes += payload.size
        self.traffic.received_bytes += len(answer.body)
        if _is_retryable(answer.status, answer.code) and not answer.ok:
            raise TransientS3Error(answer.code, answered=True)
        return answer

    async def _call_once(self, address: ObjectAddress, call: Callable[[], T]) -> T:
        try:
            return await self._in_thread(call)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            raise failure(address, status, error.response.get("Error", {}).get("Code") or str(status)) from error
        except BotoCoreError as error:
            name = type(error).__name__
            transient = isinstance(error, HTTPClientError | BotoConnectionError) and not isinstance(error, SSLError)
            raise (TransientS3Error(name) if transient else refused(address, name)) from error

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _sign(
        self, method: str, address: ObjectAddress, sha256: str, headers: Mapping[str, str], query: Mapping[str, str]
    ) -> tuple[URL, Mapping[str, str]]:
        if time.monotonic() > self._signer_until:
            await asyncio.shield(self._renewing())
        text = self._base(address.bucket) + quote(address.key, safe="/~")
        if query:
            text += "?" + urlencode(query, quote_via=quote, safe="~")
        url, request = URL(text, encoded=True), AWSRequest(method=method, url=text)
        request.headers = signed = _Headers(headers, Host=url.host_port_subcomponent or "")  # type: ignore[assignment]
        request.context["sha256"] = sha256
        self._signer.add_auth(request)
        return url, signed

    def _renewing(self) -> asyncio.Task[None]:
        """Return the task that renews the signer, one for all requests that need it: one look-up, one answer."""
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew_signer(), name="S3 keys")
            self._renewal.add_done_callback(_retrieve)
        return self._renewal

    async def _renew_signer(self) -> None:
        """Look up the keys again: temporary ones change, and renewing them can be a network call of its own."""
        try:
            credentials = await self._in_thread(self._read_credentials)
            frozen = await self._in_thread(credentials.get_frozen_credentials) if credentials else None
        except _WRONG_SETTINGS as error:
            raise StorageMisconfigured(f"the keys for S3 cannot be read: {error}") from error
        except (BotoCoreError, ClientError, OSError, RuntimeError) as error:
            # Temporary keys come from a service, or a file with a token, which may be away as the storage may.
            file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
            raise StorageUnavailable(f"the keys for S3 cannot be read: {type(error).__name__}{file}") from error
        if frozen is None:
            raise StorageMisconfigured("no keys for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if not f"{frozen.access_key}{frozen.token or ''}".isprintable():
            raise StorageMisconfigured("AWS_ACCESS_KEY_ID or AWS_SESSION_TOKEN holds a line break, which no key has")
        self._signer = _Signer(frozen, "s3", self.region)
        self._signer_until = time.monotonic() + _CREDENTIALS_FRESH_S

    def _read_credentials(self) -> Credentials | None:
        """Return the keys; those from a file are read again, since somebody may have replaced it. Blocks."""
        credentials: Credentials | None = self._session.get_credentials()
        if credentials is not None and credentials.method in _FILES:
            # botocore reads files once a session. The object stays the same: boto3's client has it too.
            found = botocore.session.get_session().get_credentials()
            if found is not None and found.get_frozen_credentials() != credentials.get_frozen_credentials():
                credentials.access_key, credentials.secret_key = found.access_key, found.secret_key
                credentials.token = found.token
                log.info("storage keys read again", source=credentials.method)
        return credentials

    def _base(self, bucket: str) -> str:
        """The URL that keys are appended to, as boto3 addresses this bucket."""
        if bucket not in self._bases:
            try:
                url = self.boto3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
            except BotoCoreError as error:
                raise refused(ObjectAddress(bucket), type(error).__name__) from error
            self._bases[bucket] = url.partition("?")[0].removesuffix("k")
        return self._bases[bucket]

    def _make_boto3_client(self) -> "Boto3Client":
        return self._session.client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            config=Config(
                signature_version="s3v4",  # presigned URLs would be version 2 otherwise
                request_checksum_calculation="when_required",  # the signature covers the body, and not every store
                response_checksum_validation="when_required",  # understands the newer checksums
                connect_timeout=_CONNECT_S,
                read_timeout=self._read_s,
                retries={"mode": "standard", "total_max_attempts": 1},  # retries are made in one place: here
                max_pool_connections=_THREADS,
                # "auto" would presign for AWS's global endpoint, which redirects for other regions than its own.
                s3={"addressing_style": "path" if self.endpoint else "virtual"},
            ),
        )

    def _count_retry(self, _: RetryCallState) -> None:
        self.traffic.retries += 1


@contextmanager
def _explained() -> Iterator[None]:
    """Raise ``StorageMisconfigured`` for what botocore says of settings: it has no base class for that.

    An ``OSError`` is one of a file or of a program that prints keys; nothing is sent yet.
    """
    try:
        yield
    except (BotoCoreError, ValueError, OSError) as error:
        raise StorageMisconfigured(f"the AWS settings cannot be used: {error}") from error


def _authorities(bundle: str | None) -> ssl.SSLContext:
    try:
        return authorities(bundle)
    except OSError as error:
        raise StorageMisconfigured(f"AWS_CA_BUNDLE: {bundle} cannot be used: {error.strerror or error}") from error


def _is_retryable(status: int, code: str) -> bool:
    return status in RETRYABLE or code in _RETRYABLE_CODES


def _retrieve(task: asyncio.Task[None]) -> None:
    """Take a task's error, which every waiter has got: asyncio would log it when all of them were cancelled."""
    if not task.cancelled():
        task.exception()


def _postpone(stall: asyncio.Timeout) -> None:
    """Give a request another ``_READ_S``; called by aiohttp's writer, which may outlive a request that was answered."""
    with suppress(RuntimeError):
        stall.reschedule(asyncio.get_running_loop().time() + _READ_S)


def _proxy_for(url: str) -> str | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for ``url``, as boto3 reads them."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
