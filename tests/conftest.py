# SPDX-License-Identifier: Apache-2.0
"""The fixtures that several rooms of tests share.

Servers start when the first test asks for them, on free ports, one of each per pytest session. Tests keep apart by
their own virtual host and their own object prefix, so none sees another's queues or files.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import signal
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest

from infra.local.packages import ensure_rabbitmq
from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support.browser import shared_browser, tab
from tests.support.servers import ManagementApi

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__ = ["shared_browser", "tab"]

# Models as small as the tests' get nothing from several threads, and processes side by side fight over the cores: one
# thread each is many times faster. Set before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As glibc has it, memory of a few MB goes back to the system as often as a tensor is freed, and its pages of 4 KiB are
# cleared anew one by one: two fifths of the time of models as small as these. The variable is for the processes that
# tests start, xdist's among them; mallopt is for this one.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
if platform.libc_ver()[0] == "glibc":
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 1 << 28)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 25)


# Every run tries the same examples: one that fails does so on the machine of whoever made it fail. Others are tried by
# `bash infra/dev test --hypothesis-profile default --hypothesis-seed N`.
hypothesis.settings.register_profile("same-examples", derandomize=True)
hypothesis.settings.load_profile("same-examples")

# A shell starts what it puts into the background with Ctrl-C ignored, nohup starts it with SIGHUP ignored, and both are
# inherited: commands under test would not end at the one and not reload at the other.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


_MUCH_BYTES: Final = 1 << 29
_kept_bytes: Final = [_MUCH_BYTES]
"""What was left each time that memory was given back."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from what imports and collection made, nearly a million objects that all stay.

    It would go through them again and again: a fifth of the processor time of these tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        # Otherwise Triton's objects are told as leaked at the end.
        atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="module")
def _memory_is_given_back() -> Iterator[None]:
    """Give free memory back to the system after a file: glibc keeps what models and songs of all sizes have left.

    A process that runs tests grew to 6 GB without it, three of them beside each other. One that has grown by little is
    left alone, since a collection with torch loaded takes half a second.
    """
    yield
    if sys.platform == "linux" and _resident_bytes() > _kept_bytes[-1] + _MUCH_BYTES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _kept_bytes.append(_resident_bytes())


@pytest.fixture
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines that died restarted at once."""
    monkeypatch.setattr("acestep_consumer.engine.supervisor.FIRST_RESTART_S", 0.01)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """The session's broker, with its HTTP API. Do not stop it: `own_rabbitmq` is for that."""
    ensure_rabbitmq()
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq"), management=True) as broker:
        yield broker


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The session's S3 server. Do not stop it: `own_s3` is for that."""
    with SeaweedFS(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def management(rabbitmq: RabbitMQ) -> ManagementApi:
    """The HTTP API of the session's broker."""
    return ManagementApi(rabbitmq)


@pytest.fixture
def amqp_vhost(management: ManagementApi) -> Iterator[str]:
    """The name of a fresh virtual host, removed after the test."""
    vhost = f"test-{uuid.uuid4().hex}"
    management.add_vhost(vhost)
    yield vhost
    management.delete_vhost(vhost)


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ, amqp_vhost: str) -> str:
    """The AMQP URL of this test's own virtual host."""
    return rabbitmq.vhost_url(amqp_vhost)


@pytest.fixture
def s3_prefix() -> str:
    """A key prefix that no other test uses, without a slash at the end."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def service_environment(amqp_url: str, s3: SeaweedFS, s3_prefix: str) -> dict[str, str]:
    """The variables that point a worker or a client at this test's virtual host and prefix."""
    servers = Environment.of(amqp_url, s3)
    return servers.variables() | {"ACESTEP_S3_PREFIX": s3_prefix}


@pytest.fixture
def own_rabbitmq(tmp_path: Path) -> Iterator[RabbitMQ]:
    """A running broker of this test's own, to stop, kill and restart (about five seconds a start)."""
    ensure_rabbitmq()
    with RabbitMQ(tmp_path / "rabbitmq") as broker:
        yield broker


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[SeaweedFS]:
    """A running S3 server of this test's own, to stop, kill and restart (about a second a start)."""
    with SeaweedFS(tmp_path / "s3") as server:
        yield server
