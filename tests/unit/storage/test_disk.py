# SPDX-License-Identifier: Apache-2.0
"""A scratch disk that fills up: what the guard reports, and when it lets jobs in again."""

import asyncio
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import (
    Cancelled,
    ConsumerError,
    DiskFull,
    InputNotAllowed,
    RenderFailed,
    ScratchLost,
)
from acestep_consumer.storage.disk import DiskGuard, DiskSpace
from tests.support.waiting import eventually

GIB = 1 << 30


@dataclass
class FakeScratch:
    """A scratch folder that cannot be had while ``error`` is set."""

    folder: Path
    error: Exception | None = None

    def ensure(self) -> Path:
        if self.error is not None:
            raise self.error
        self.folder.mkdir(exist_ok=True)
        return self.folder

    def new_folder(self, task_id: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=task_id, dir=self.ensure()))


@dataclass
class Scenario:
    """A disk whose free space a test sets, and the changes that its guard reported."""

    disk: DiskGuard
    changes: list[bool]
    place: "FakeScratch"
    space: list[DiskSpace] = field(default_factory=lambda: [DiskSpace(100 * GIB, 50 * GIB)])

    async def check(self, free_gb: float) -> list[bool]:
        self.space[0] = DiskSpace(self.space[0].total, int(free_gb * GIB))
        await self.disk.check()
        return self.changes


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    changes: list[bool] = []

    async def on_change(full: bool) -> None:  # noqa: FBT001 - a callback's one argument
        changes.append(full)

    place = FakeScratch(tmp_path)
    made = Scenario(DiskGuard(place, 1.0, on_change, first_pause_s=0.1), changes, place)
    monkeypatch.setattr(DiskSpace, "of", lambda _: made.space[0])
    return made


async def test_less_than_the_minimum_stops_and_a_little_more_resumes_and_each_is_reported_once(
    scenario: Scenario,
) -> None:
    assert await scenario.check(50) == []
    assert await scenario.check(0.99) == [True]
    assert await scenario.check(0.5) == [True]
    assert await scenario.check(1.01) == [True], "not at the first byte: it would go back and forth"
    assert await scenario.check(1.2) == [True, False]


async def test_a_quarter_of_a_small_disk_is_enough(scenario: Scenario) -> None:
    scenario.space[0] = DiskSpace(2 * GIB, 2 * GIB)
    assert await scenario.check(0.51) == []
    assert await scenario.check(0.49) == [True]


async def test_a_failed_write_stops_whatever_is_reported_as_free(scenario: Scenario) -> None:
    """A quota is not seen in the free space of the disk."""
    with pytest.raises(DiskFull):
        async with scenario.disk.guarding():
            raise OSError(errno.EDQUOT, "quota")
    assert scenario.changes == [True]
    assert await scenario.check(50) == [True], "it pauses first"

    deadline = time.monotonic() + 20
    while await scenario.check(50) != [True, False]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_failure_that_a_full_disk_caused_requeues_the_job(scenario: Scenario) -> None:
    failure = RenderFailed("the encoder failed")
    failure.__cause__ = OSError(errno.ENOSPC, "no space left")
    with pytest.raises(DiskFull) as caught:
        async with scenario.disk.guarding():
            raise failure
    assert (caught.value.status, caught.value.verdict.value) == (None, "requeue")
    assert scenario.changes == [True]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), RenderFailed("no"), ValueError("bug")])
async def test_other_failures_stay_what_they_are(scenario: Scenario, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        async with scenario.disk.guarding():
            raise error
    assert caught.value is error
    assert scenario.changes == []


def test_a_disk_that_may_have_no_more_files_has_nothing_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass
    class Found:
        f_blocks: int = 1000
        f_bavail: int = 900
        f_frsize: int = 4096
        f_files: int = 5000
        f_favail: int = 3

    monkeypatch.setattr("os.statvfs", lambda _: Found())
    assert DiskSpace.of(tmp_path) == DiskSpace(1000 * 4096, 0)
    monkeypatch.setattr("os.statvfs", lambda _: Found(f_files=0, f_favail=0))
    assert DiskSpace.of(tmp_path) == DiskSpace(1000 * 4096, 900 * 4096)


async def test_a_jobs_folder_is_gone_with_what_it_holds_however_the_job_ends(scenario: Scenario) -> None:
    async with scenario.disk.job_folder("song") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    with pytest.raises(RenderFailed):
        async with scenario.disk.job_folder("song"):
            raise RenderFailed("no")

    async def run() -> None:
        async with scenario.disk.job_folder("song"):
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.wait({running})
    await eventually(lambda: not any(scenario.place.folder.iterdir()))


def hold_removals(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> threading.Event:
    """Return what lets folders be removed, each with ``then`` after it."""
    go, remove = threading.Event(), shutil.rmtree

    def slowly(folder: Path, *, ignore_errors: bool) -> None:
        go.wait(30)
        remove(folder, ignore_errors=ignore_errors)
        then()

    monkeypatch.setattr(shutil, "rmtree", slowly)
    return go


async def test_nobody_waits_until_a_jobs_folder_is_removed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest, the event and the ack come after it."""
    go = hold_removals(monkeypatch)
    async with scenario.disk.job_folder("song") as folder:
        pass
    assert folder.is_dir()
    go.set()
    await eventually(lambda: not folder.exists())


async def test_what_ended_jobs_still_hold_does_not_count_as_used(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free() -> None:
        scenario.space[0] = DiskSpace(100 * GIB, 50 * GIB)

    async def job() -> None:
        async with scenario.disk.job_folder("song"):
            pass

    go = hold_removals(monkeypatch, free)
    async with scenario.disk.job_folder("large"):
        scenario.space[0] = DiskSpace(100 * GIB, 0)
    running = asyncio.create_task(job())
    await eventually(lambda: len(list(scenario.place.folder.iterdir())) == 2)
    assert not running.done(), "it waits for the room that the large one leaves"
    go.set()
    await running
    assert scenario.changes == []


async def test_a_job_stops_the_next_ones_when_less_than_the_minimum_is_free(scenario: Scenario) -> None:
    scenario.space[0] = DiskSpace(100 * GIB, 0)
    async with scenario.disk.job_folder("song") as folder:
        assert folder.is_dir()
        assert (scenario.disk.full, scenario.changes) == (True, [True])


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), DiskFull()])
async def test_a_folder_that_cannot_be_made_stops_until_it_can_and_raises_nothing(
    scenario: Scenario, error: Exception
) -> None:
    scenario.place.error = error
    assert await scenario.check(50) == [True]
    assert await scenario.check(50) == [True]
    assert scenario.disk.full
    scenario.place.error = None
    assert await scenario.check(50) == [True, False]


async def test_a_job_without_a_folder_goes_back_and_no_more_are_taken(scenario: Scenario) -> None:
    scenario.place.error = PermissionError(errno.EACCES, "no")
    with pytest.raises(ScratchLost) as caught:
        async with scenario.disk.job_folder("song"):
            pass
    assert (caught.value.status, caught.value.verdict.value) == (None, "requeue")
    assert scenario.changes == [True]


async def test_no_room_for_a_jobs_folder_stops_at_once(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_task_id: str) -> Path:
        raise DiskFull

    monkeypatch.setattr(scenario.place, "new_folder", full)
    with pytest.raises(DiskFull):
        async with scenario.disk.job_folder("song"):
            pass
    assert scenario.changes == [True]


async def fail_without_folder(scenario: Scenario, error: Exception) -> None:
    """Run a job that ends so after somebody has removed its folder."""
    async with scenario.disk.job_folder("song") as folder:
        shutil.rmtree(folder)
        raise error


@pytest.mark.parametrize("error", [RenderFailed("no such file"), FileNotFoundError("0.wav"), ValueError("any")])
async def test_a_job_that_fails_without_its_folder_goes_back(scenario: Scenario, error: Exception) -> None:
    with pytest.raises(ScratchLost) as caught:
        await fail_without_folder(scenario, error)
    assert caught.value.__cause__ is error
    assert scenario.changes == []


@pytest.mark.parametrize("error", [Cancelled(), InputNotAllowed("no"), DiskFull()])
async def test_an_end_that_has_nothing_to_do_with_the_folder_stays(scenario: Scenario, error: ConsumerError) -> None:
    with pytest.raises(type(error)) as caught:
        await fail_without_folder(scenario, error)
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
async def test_a_folder_that_cannot_be_made_pauses_and_the_job_goes_back(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without a pause the message would come back at once, for ever."""

    def refuse(_: str) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(scenario.place, "new_folder", refuse)
    with pytest.raises(ScratchLost):
        async with scenario.disk.job_folder("song"):
            pass
    assert (scenario.disk.full, scenario.changes) == (True, [True])


async def test_a_jobs_folder_is_made_beside_the_event_loop_and_a_cancellation_leaves_none(scenario: Scenario) -> None:
    """On a network file system it may take seconds, in which a heartbeat must not be missed."""
    made, threads, go = scenario.place.new_folder, set[int](), threading.Event()

    def slowly(task_id: str) -> Path:
        threads.add(threading.get_ident())
        go.wait(30)
        return made(task_id)

    scenario.place.new_folder = slowly  # type: ignore[method-assign]

    async def job() -> None:
        async with scenario.disk.job_folder("song"):
            pass

    running = asyncio.create_task(job())
    await eventually(lambda: threads)
    running.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert threading.get_ident() not in threads
    await eventually(lambda: not any(scenario.place.folder.iterdir()))
