# SPDX-License-Identifier: Apache-2.0
"""Fetches audio inputs and LoRAs, from places that the operator allowed and nowhere else.

Audio comes from ``s3://`` buckets and ``https://`` hosts, or is in the request itself; a LoRA from the same buckets, or
from this machine by its name.

A message may name any place. Whether this worker reads it is decided here, before the first byte and again at every
redirect; the size limit is enforced while the bytes arrive.

Host names are compared with the operator's list. The addresses of a name may change between two look-ups, so they are
checked where a socket to one is opened, and nowhere else.
"""

import asyncio
import base64
import re
import socket
import ssl
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal, Self

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from yarl import URL

from acestep_consumer.config.http import NETWORK_ERRORS, RETRYABLE, authorities, open_session
from acestep_consumer.config.settings import InputSettings, SettingsError, StorageSettings
from acestep_consumer.domain.errors import (
    WRONG_KEYS,
    InputNotAllowed,
    InputUnreadable,
    StorageMisconfigured,
    StorageRefused,
    StorageUnavailable,
)
from acestep_consumer.domain.job import Job, Sources, SourceSong
from acestep_consumer.domain.objects import ObjectAddress, ObjectHead, UploadAddresses
from acestep_consumer.domain.ports import Objects
from acestep_consumer.domain.tasks import TASKS
from acestep_consumer.inputs.loras import PEFT_CONFIG, PEFT_WEIGHTS, LoraCache, LoraFolder
from acestep_consumer.inputs.ssrf import AddressRefused, require_allowed
from acestep_schemas.lookup import printable
from acestep_schemas.request import GenerationRequest

SOURCE_FIELD: Final = "src_audio_path"
SOURCE_TASK_FIELD: Final = "source_task_id"
REFERENCE_FIELD: Final = "reference_audio_path"

_SUFFIX: Final = re.compile(r"\.[a-z0-9]{1,7}")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/@?#:\\\[\]]+)(:\d{1,5})?")
_ACCEPTED: Final = "audio inputs are s3://bucket/key or https://host/path"
_HTTPS_PORT: Final = 443
_CHUNK_BYTES: Final = 1 << 20
_ATTEMPTS: Final = 3
_MAX_REDIRECTS: Final = 3
_MAX_SHOWN: Final = 200
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_OK: Final = 200
_CONFIG_BYTES: Final = 1 << 20

log = structlog.get_logger()


class _TransientFetchError(Exception):
    """One attempt failed; the next one may not. The text is the public reason."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """Largest size, bytes, and the setting that it comes from, if any."""

    bytes: int
    setting: str = ""

    def __str__(self) -> str:
        return f"more than {self.bytes:,} bytes" + (f" ({self.setting})" if self.setting else "")


@dataclass(frozen=True, slots=True)
class _Input:
    """One input of a request: the field that names it, its address, and its size limit."""

    field: str
    address: ObjectAddress | URL
    limit: _Limit

    def __str__(self) -> str:
        return f"{self.field} = {shown(str(self.address))}"

    @property
    def suffix(self) -> str:
        """The suffix of its name, if it looks like one: a hint for the decoder."""
        path = self.address.key if isinstance(self.address, ObjectAddress) else self.address.path
        suffix = PurePosixPath(path).suffix.lower()
        return suffix if _SUFFIX.fullmatch(suffix) else ""


@dataclass(frozen=True, slots=True)
class _LoraPart(_Input):
    """A file of a LoRA in S3."""

    address: ObjectAddress

    @property
    def name(self) -> str:
        """Its file name on disk: the renderer tells the format from it."""
        name = self.address.key.rpartition("/")[2]
        return name if name in (PEFT_WEIGHTS, PEFT_CONFIG) else "lora.safetensors"

    @property
    def config(self) -> "_LoraPart | None":
        """The configuration that PEFT writes beside these weights; without it their scale is unknown."""
        if self.name != PEFT_WEIGHTS:
            return None
        key = self.address.key.removesuffix(PEFT_WEIGHTS) + PEFT_CONFIG
        return _LoraPart(self.field, ObjectAddress(self.address.bucket, key), _Limit(_CONFIG_BYTES))


class AllowedInputs:
    """``ports.Inputs``, limited to what the operator allows. An async context manager.

    Args:
        objects: reads ``s3://`` inputs with the worker's own keys.
        storage: the result bucket, which is allowed unless ``ACESTEP_INPUT_RESULTS`` is ``none``.
        settings: buckets, hosts, and the limits of one input. A malformed host raises ``SettingsError``.
        checkpoint_dir: its folder ``loras`` holds the LoRAs that requests may name.
        tls: certificate authorities other than the system's.
        resolver: looks up host names, in place of the system's.
    """

    def __init__(  # noqa: PLR0913 - the last three have defaults, two of them for private networks
        self,
        objects: Objects,
        storage: StorageSettings,
        settings: InputSettings,
        *,
        checkpoint_dir: Path | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._objects = objects
        self._storage = storage
        self._uploads = UploadAddresses(storage.bucket, storage.prefix)
        self._checkpoint_dir = checkpoint_dir
        self._lora_cache = LoraCache()
        self._tls = tls
        self._resolver = resolver
        self._http: aiohttp.ClientSession
        self.apply(settings)

    def apply(self, settings: InputSettings) -> None:
        """Use these settings from the next fetch on.

        Raises:
            SettingsError: a host is malformed; nothing has changed then.
        """
        self._hosts = frozenset(map(_host_and_port, settings.hosts))
        own = (self._storage.bucket,) if settings.results == "all" else ()
        self._buckets = frozenset({*own, *settings.buckets})
        self._reads_results = settings.results == "all"
        self._audio_limit = _Limit(settings.max_bytes, "ACESTEP_INPUT_MAX_BYTES")
        self._lora_limit = _Limit(settings.lora_max_bytes, "ACESTEP_LORA_MAX_BYTES")
        self._lora_folder = LoraFolder(self._checkpoint_dir, settings.lora_max_bytes)
        self._timeout_s = settings.timeout_s
        self._networks = settings.networks

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            ssl=self._tls or authorities(), resolver=self._resolver, socket_factory=self._open_socket
        )
        # Without the environment's proxy: that would open the connection in our place, to any address.
        self._http = open_session(connector, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's audio inputs into ``folder``, as ``source`` and ``reference`` with their own suffixes.

        LoRAs from S3 are put into its subfolders ``lora-0`` and so on; those of the checkpoint folder are not copied.
        An analysis has none.

        Raises:
            InputNotAllowed: a place that is not allowed; nothing has been read then.
            InputUnreadable: missing, forbidden, too large or too slow.
            StorageUnavailable: the object storage is out of reach.
        """
        request = job.request
        with_source = _needs_source(request)
        source = self._check_source(job) if with_source else None
        reference = self._check(REFERENCE_FIELD, request.reference_audio_path)
        named = () if job.analysis else request.all_loras
        loras = [await self._check_lora(_lora_field(request, index), each.path) for index, each in enumerate(named)]
        return Sources(
            source_latents=await self._copy_latents(job.source, folder) if source else None,
            source=await self._copy(source, folder / "source")
            or await self._decode("src_audio_base64", with_source and request.src_audio_base64, folder / "source"),
            reference=await self._copy(reference, folder / "reference")
            or await self._decode("reference_audio_base64", request.reference_audio_base64, folder / "reference"),
            loras=tuple([await self._provide_lora(lora, folder / f"lora-{n}") for n, lora in enumerate(loras)]),
        )

    def _check_source(self, job: Job) -> _Input | None:
        if job.source is None:
            return self._check(SOURCE_FIELD, job.request.src_audio_path)
        return self._check(SOURCE_TASK_FIELD, job.source.uri)

    async def _copy_latents(self, song: SourceSong | None, folder: Path) -> Path | None:
        """Copy the latents of an earlier song; None where there are none any more: its audio does as well."""
        if song is None or song.latents is None:
            return None
        try:
            found = self._check(SOURCE_TASK_FIELD, song.latents)
            return await self._copy(found, folder / "source-latents")
        except (InputNotAllowed, InputUnreadable) as error:
            log.warning("latents not fetched", task_id=song.task_id, reason=str(error))
            return None

    def _check(self, field: str, text: str | None) -> _Input | None:
        """Parse and check an address."""
        if text is None:
            return None
        scheme = text.partition(":")[0].lower()
        if text.startswith("s3://") and self._uploads.has(upload := ObjectAddress.of(text)):
            # No result, whatever ACESTEP_INPUT_RESULTS says: whoever names it has sent it, or has learnt its task's id.
            return _Input(field, upload, self._audio_limit)
        try:
            if scheme == "s3":
                return _Input(field, self._require_bucket(text), self._audio_limit)
            if scheme == "https":
                return _Input(field, self._require_host(_url(text)), self._audio_limit)
        except InputNotAllowed as error:
            raise InputNotAllowed(f"{field} = {shown(text)}: {error}") from error
        place = "Put the audio into the result bucket, or have" if self._reads_results else "Have"
        raise InputNotAllowed(
            f"{field} = {shown(text)}: {_ACCEPTED}; local files, http:// and data: are not accepted. "
            f"{place} its bucket added to ACESTEP_INPUT_BUCKETS or its host to ACESTEP_INPUT_HOSTS"
        )

    async def _provide_lora(self, lora: _LoraPart | Path, folder: Path) -> Path:
        return lora if isinstance(lora, Path) else await self._fetch_lora(lora, folder)

    async def _check_lora(self, field: str, text: str) -> _LoraPart | Path:
        """Parse and check the address of a LoRA, or find it on this machine."""
        try:
            if text.startswith("s3://"):
                place = self._require_bucket(text + (PEFT_WEIGHTS if text.endswith("/") else ""))
                return _LoraPart(field, place, self._lora_limit)
            return await asyncio.to_thread(self._lora_folder.find, text)
        except (InputNotAllowed, InputUnreadable) as error:
            raise type(error)(f"{field} = {shown(text)}: {error}") from error

    def _require_bucket(self, text: str) -> ObjectAddress:
        bucket, _, key = text[len("s3://") :].partition("/")
        if not text.lower().startswith("s3://") or not key:
            raise InputNotAllowed("must look like s3://bucket/key")
        if bucket == self._storage.bucket and not self._reads_results and self._is_result(key):
            raise InputNotAllowed("results are no inputs on this worker (ACESTEP_INPUT_RESULTS=none)")
        if bucket not in self._buckets:
            raise InputNotAllowed(f"the bucket {bucket[:63]!r} is not in ACESTEP_INPUT_BUCKETS")
        if not {".", ".."}.isdisjoint(key.split("/")):
            # Servers that normalize paths would read from another bucket.
            raise InputNotAllowed("a key with '.' or '..' between slashes is not accepted")
        return ObjectAddress(bucket, key)

    def _is_result(self, key: str) -> bool:
        """Whether a key of the result bucket is below the prefix of results, also for servers that merge slashes."""
        prefix, parts = _parts(self._storage.prefix), _parts(key)
        return parts[: len(prefix)] == prefix

    def _require_host(self, url: URL) -> URL:
        if url.scheme != "https":
            raise InputNotAllowed(f"{url.scheme}:// is not accepted, https:// is")
        if url.user is not None or url.password is not None:
            raise InputNotAllowed("a URL with a user name is not accepted")
        if not url.raw_host:
            raise InputNotAllowed("must look like https://host/path")
        if (url.raw_host, url.port) not in self._hosts:
            host = url.raw_host if url.port == _HTTPS_PORT else f"{url.raw_host}:{url.port}"
            raise InputNotAllowed(f"the host {host!r} is not in ACESTEP_INPUT_HOSTS")
        return url

    def _open_socket(self, target: aiohttp.AddrInfoType) -> socket.socket:
        """Open a socket to an address of a host, or raise ``AddressRefused``."""
        family, kind, protocol, _, (address, *_) = target
        require_allowed(address, self._networks)
        return socket.socket(family, kind, protocol)

    async def _copy(self, wanted: _Input | None, stem: Path) -> Path | None:
        if wanted is None:
            return None
        target = stem.with_name(stem.name + wanted.suffix)
        async with self._in_time(wanted):
            if isinstance(wanted.address, ObjectAddress):
                await self._copy_object(wanted, wanted.address, target)
            else:
                await self._copy_url(wanted, wanted.address, target)
        return target

    async def _decode(self, field: str, text: str | Literal[False] | None, target: Path) -> Path | None:
        """Write an audio input that is in the request itself. Raises ``InputUnreadable``."""
        if not text:
            return None
        if len(text) * 3 // 4 > self._audio_limit.bytes:
            raise InputUnreadable(f"{field}: {self._audio_limit}")
        await asyncio.to_thread(lambda: target.write_bytes(base64.b64decode(text)))
        return target

    async def _fetch_lora(self, weights: _LoraPart, folder: Path) -> Path:
        """Create ``folder`` with the LoRA's weights, and their configuration if they have one.

        Their version is looked up each time, and they are fetched unless that version is in the cache.
        """
        heads = await self._heads(weights)
        version = "\n".join(f"{part.address} {head.etag} {head.size}" for part, head in heads.items())

        async def fetch(target: Path) -> None:
            for part in heads:
                async with self._in_time(part):
                    await self._copy_object(part, part.address, target / part.name)

        await self._lora_cache.provide(version, folder, fetch)
        return folder / weights.name

    async def _heads(self, weights: _LoraPart) -> dict[_LoraPart, ObjectHead]:
        """Return the heads of the weights, and of their configuration if there is one."""
        parts = (weights, weights.config) if weights.config else (weights,)
        async with self._in_time(weights):
            heads = {part: head for part in parts if (head := await self._head(part))}
        if weights not in heads:
            raise InputUnreadable(f"{weights}: S3 returned NoSuchKey")
        return heads

    async def _head(self, part: _LoraPart) -> ObjectHead | None:
        try:
            head = await self._objects.head(part.address)
        except StorageRefused as error:
            raise _refused_input(part, error) from error
        if head and head.size > part.limit.bytes:
            raise InputUnreadable(f"{part}: {part.limit}")
        return head

    @asynccontextmanager
    async def _in_time(self, wanted: _Input) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s) as clock:
                yield
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise InputUnreadable(
                f"{wanted}: not fetched within {self._timeout_s:g} s (ACESTEP_INPUT_TIMEOUT_S)"
            ) from error

    async def _copy_object(self, wanted: _Input, address: ObjectAddress, target: Path) -> None:
        try:
            async with self._objects.open(address) as stream:
                await _save(wanted, target, stream)
        except StorageRefused as error:
            raise _refused_input(wanted, error) from error

    async def _copy_url(self, wanted: _Input, url: URL, target: Path) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientFetchError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.2, max=2),
            reraise=True,
        )
        try:
            await retrying(self._copy_url_once, wanted, url, target)
        except _TransientFetchError as error:
            raise InputUnreadable(f"{wanted}: {error}") from error

    async def _copy_url_once(self, wanted: _Input, url: URL, target: Path) -> None:
        """Follow redirects by hand: each target must be allowed as the first one was."""
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                async with self._http.get(url, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        _require_readable(wanted, response)
                        return await _save(wanted, target, response.content.iter_chunked(_CHUNK_BYTES))
                    location = response.headers.get("Location", "")
            except NETWORK_ERRORS as error:
                raise _network_failure(wanted, url, error) from error
            url = self._redirect(wanted, url, location)
        raise InputUnreadable(f"{wanted}: more than {_MAX_REDIRECTS} redirects")

    def _redirect(self, wanted: _Input, url: URL, location: str) -> URL:
        try:
            return self._require_host(url.join(_url(location)))
        except InputNotAllowed as error:
            raise InputNotAllowed(f"{wanted}: redirected to {shown(location)}: {error}") from error


async def _save(wanted: _Input, target: Path, chunks: AsyncIterable[bytes]) -> None:
    total = 0
    with await asyncio.to_thread(target.open, "wb") as file:
        async for chunk in chunks:
            total += len(chunk)
            if total > wanted.limit.bytes:
                raise InputUnreadable(f"{wanted}: {wanted.limit}")
            await asyncio.to_thread(file.write, chunk)
    if not total:
        raise InputUnreadable(f"{wanted}: empty")


def shown(uri: str) -> str:
    """Return a URI as it may be published: without query, fragment and user, which may be secrets.

    Characters that cannot be printed are escaped: some bytes of a header cannot be encoded in an event.
    """
    bare = re.split(r"[?#]", uri, maxsplit=1)[0]
    bare = re.sub(r"//[^/]*@", "//", bare)
    return printable(bare if len(bare) <= _MAX_SHOWN else f"{bare[:_MAX_SHOWN]}…")


def _url(text: str) -> URL:
    try:
        return URL(text)
    except ValueError as error:
        raise InputNotAllowed("not a valid URL") from error


def _host_and_port(entry: str) -> tuple[str | None, int | None]:
    """Parse ``host`` or ``host:port`` of the setting; requests must match it exactly."""
    try:
        url = URL(f"https://{entry}") if _HOST.fullmatch(entry) else None
    except ValueError:
        url = None
    if url is None:
        raise SettingsError(f"ACESTEP_INPUT_HOSTS: {entry!r} must be a host name, or host:port")
    return url.raw_host, url.port


def _refused_input(wanted: _Input, error: StorageRefused) -> Exception:
    """Return the input's error; or that of our keys, which somebody has to renew, and which no job fails of."""
    if error.reason in WRONG_KEYS or isinstance(error, StorageMisconfigured):
        return StorageUnavailable(str(error))
    if error.missing and wanted.field == SOURCE_TASK_FIELD:
        return InputUnreadable(
            f"{wanted}: its audio was deleted. Publish the request of that task again under its id, and it is made "
            "again; or name another song"
        )
    return InputUnreadable(f"{wanted}: S3 returned {error.reason}")


def _require_readable(wanted: _Input, response: aiohttp.ClientResponse) -> None:
    if response.status in RETRYABLE:
        raise _TransientFetchError(f"the host returned {response.status}")
    if response.status != _OK:
        raise InputUnreadable(f"{wanted}: the host returned {response.status}")
    codings = ",".join(response.headers.getall("Content-Encoding", ())).split(",")
    if any(coding.strip().lower() not in ("", "identity") for coding in codings):
        raise InputUnreadable(f"{wanted}: compressed in transit, although that was not requested")
    if (response.content_length or 0) > wanted.limit.bytes:
        raise InputUnreadable(f"{wanted}: {wanted.limit}")


def _network_failure(wanted: _Input, url: URL, error: Exception) -> Exception:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return InputUnreadable(f"{wanted}: the host's certificate is not trusted")
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, AddressRefused):
        log.warning("address refused", host=url.raw_host, address=error.os_error.address)
        return InputNotAllowed(
            f"{wanted}: the host {url.raw_host!r} is not on the public internet, and its network is not in "
            "ACESTEP_INPUT_NETWORKS"
        )
    if isinstance(error, aiohttp.ClientResponseError):
        return InputUnreadable(f"{wanted}: the host's response is not HTTP, or has too many or too long headers")
    return _TransientFetchError(f"{type(error).__name__} while reading")


def _parts(key: str) -> list[str]:
    return [part for part in key.split("/") if part]


def _lora_field(request: GenerationRequest, index: int) -> str:
    """Return the field that names the path of one of ``all_loras``."""
    if request.lora is None:
        return f"loras.{index}.path"
    return f"loras.{index - 1}.path" if index else "lora.path"


def _needs_source(request: GenerationRequest) -> bool:
    return TASKS[request.task_type].uses_source(request) or request.full_analysis_only or request.extract_codes_only
