# SPDX-License-Identifier: Apache-2.0
"""LoRAs on this machine: which names lead to a file, which lead nowhere, and what the cache keeps."""

import asyncio
import errno
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from acestep_consumer.domain.errors import ConsumerError, DiskFull, InputNotAllowed, InputUnreadable
from acestep_consumer.domain.job import Plan, Sources
from acestep_consumer.engine.messages import TO_ENGINE, Render
from acestep_consumer.inputs.loras import LoraCache, LoraFolder
from acestep_schemas.events import Metas
from tests.support.jobs import make_job


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A checkpoint folder with LoRAs, and beside it a secret."""
    folder = tmp_path / "checkpoints"
    (folder / "loras").mkdir(parents=True)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (folder / "model.safetensors").write_bytes(b"a model, no LoRA")
    return folder


def put(checkpoints: Path, name: str) -> Path:
    path = checkpoints / "loras" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"weights")
    return path


class TestFolder:
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("jazz.safetensors", "jazz"),
            ("jazz.safetensors", "jazz.safetensors"),
            ("Big Band v1.2.safetensors", "Big Band v1.2"),
            ("jazz/adapter_model.safetensors", "jazz"),
            ("jazz/pytorch_lora_weights.safetensors", "jazz"),
        ],
    )
    def test_a_name_is_a_file_or_a_folder_with_one(self, checkpoints: Path, file: str, name: str) -> None:
        path = put(checkpoints, file)
        assert LoraFolder(checkpoints, 100).find(name) == path

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "../model", "../../secret", "/etc/passwd", "a/b", "jazz\0", "~", "x" * 200, "s3:", "\udcff"],
    )
    def test_a_name_that_is_none_is_refused(self, checkpoints: Path, name: str) -> None:
        with pytest.raises(InputNotAllowed, match="neither the name of a LoRA"):
            LoraFolder(checkpoints, 100).find(name)

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_a_link_must_not_lead_out_of_the_folder(self, checkpoints: Path, tmp_path: Path, kind: str) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "adapter_model.safetensors").write_bytes(b"secret")
        if kind == "file":
            (checkpoints / "loras/jazz.safetensors").symlink_to(tmp_path / "secret.safetensors")
        else:
            (checkpoints / "loras/jazz").symlink_to(outside)
        with pytest.raises(InputNotAllowed, match="leads out of the folder loras") as caught:
            LoraFolder(checkpoints, 100).find("jazz")
        assert str(tmp_path) not in str(caught.value)

    def test_a_link_within_the_folder_and_a_linked_folder_are_the_operators_choice(
        self, checkpoints: Path, tmp_path: Path
    ) -> None:
        path = put(checkpoints, "jazz.safetensors")
        (checkpoints / "loras/blues.safetensors").symlink_to(path)
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked/loras").symlink_to(checkpoints / "loras")
        assert LoraFolder(tmp_path / "linked", 100).find("blues").samefile(path)

    @pytest.mark.parametrize("name", ["blues", "model", "jazz.bin"])
    def test_what_is_not_there_is_said_with_what_was_looked_for(self, checkpoints: Path, name: str) -> None:
        (checkpoints / "loras/jazz.bin").write_bytes(b"a pickle")
        with pytest.raises(InputUnreadable, match=rf"neither {name}\.safetensors nor {name}/adapter_model") as caught:
            LoraFolder(checkpoints, 100).find(name)
        assert str(checkpoints) not in str(caught.value)

    def test_a_file_that_is_too_large_is_not_read(self, checkpoints: Path) -> None:
        put(checkpoints, "jazz.safetensors")
        with pytest.raises(InputUnreadable, match=r"more than 6 bytes \(ACESTEP_LORA_MAX_BYTES\)"):
            LoraFolder(checkpoints, 6).find("jazz")

    def test_without_a_checkpoint_folder_there_are_no_names(self) -> None:
        with pytest.raises(InputNotAllowed, match="ACESTEP_CHECKPOINT_DIR"):
            LoraFolder(None, 100).find("jazz")


class LoraSource:
    """Where LoRAs are fetched; it counts."""

    def __init__(self, *, wait: asyncio.Event | None = None, error: ConsumerError | None = None) -> None:
        self.fetched: list[str] = []
        self.wait = wait
        self.error = error

    def fetch_of(self, name: str) -> Callable[[Path], Awaitable[None]]:
        async def fetch(folder: Path) -> None:
            self.fetched.append(name)
            (folder / "lora.safetensors").write_text(name)
            if self.wait:
                await self.wait.wait()
            if self.error:
                raise self.error

        return fetch


def job_folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name / "lora"


def kept(root: Path) -> list[str]:
    return sorted(path.read_text() for path in root.glob(".loras/*/*"))


def remove(root: Path, pattern: str) -> None:
    for path in root.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class TestCache:
    async def test_the_least_recently_used_one_leaves(self, tmp_path: Path) -> None:
        cache, source = LoraCache(size=2), LoraSource()
        for number, name in enumerate("abacab"):
            await cache.provide(name, job_folder(tmp_path, str(number)), source.fetch_of(name))
        assert source.fetched == ["a", "b", "c", "b"]
        assert kept(tmp_path) == ["a", "b"]

    async def test_a_job_keeps_its_own_when_the_cache_lets_go(self, tmp_path: Path) -> None:
        cache, source = LoraCache(size=1), LoraSource()
        mine = job_folder(tmp_path, "1")
        await cache.provide("a", mine, source.fetch_of("a"))
        await cache.provide("b", job_folder(tmp_path, "2"), source.fetch_of("b"))
        assert kept(tmp_path) == ["b"]
        assert (mine / "lora.safetensors").read_text() == "a"

    async def test_jobs_that_come_together_wait_for_one_fetch(self, tmp_path: Path) -> None:
        arrived = asyncio.Event()
        cache, source = LoraCache(), LoraSource(wait=arrived)
        jobs = [
            asyncio.create_task(cache.provide("a", job_folder(tmp_path, str(job)), source.fetch_of("a")))
            for job in range(3)
        ]
        asyncio.get_running_loop().call_later(0.01, arrived.set)
        await asyncio.gather(*jobs)
        assert source.fetched == ["a"]

    async def test_a_fetch_that_fails_leaves_nothing_and_is_tried_again_by_the_next_job(self, tmp_path: Path) -> None:
        cache = LoraCache()
        with pytest.raises(InputUnreadable):
            await cache.provide("a", job_folder(tmp_path, "1"), LoraSource(error=InputUnreadable("gone")).fetch_of("a"))
        assert kept(tmp_path) == []
        await cache.provide("a", job_folder(tmp_path, "2"), LoraSource().fetch_of("a"))
        assert kept(tmp_path) == ["a"]

    async def test_a_job_that_is_cancelled_does_not_take_the_others_lora_away(self, tmp_path: Path) -> None:
        arrived = asyncio.Event()
        cache, source = LoraCache(), LoraSource(wait=arrived)
        first, second = (
            asyncio.create_task(cache.provide("a", job_folder(tmp_path, name), source.fetch_of("a")))
            for name in ("1", "2")
        )
        await asyncio.sleep(0)
        first.cancel()
        arrived.set()
        await second
        assert first.cancelled()
        assert (tmp_path / "2/lora/lora.safetensors").read_text() == "a"
        assert kept(tmp_path) == ["a"]

    async def test_a_cached_one_that_was_removed_is_fetched_again(self, tmp_path: Path) -> None:
        cache, source = LoraCache(), LoraSource()
        await cache.provide("a", job_folder(tmp_path, "1"), source.fetch_of("a"))
        for number, gone in enumerate((".loras/*/lora.safetensors", ".loras/*", ".loras"), start=2):
            remove(tmp_path, gone)
            target = job_folder(tmp_path, str(number))
            await cache.provide("a", target, source.fetch_of("a"))
            assert (target / "lora.safetensors").read_text() == "a"
        assert source.fetched == ["a"] * 4

    async def test_files_are_copied_and_removed_beside_the_event_loop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A gigabyte takes seconds, in which a heartbeat must not be missed."""
        threads: set[int] = set()

        def noting(call: Callable[..., object]) -> Callable[..., object]:
            def noted(*arguments: Any, **options: Any) -> object:
                threads.add(threading.get_ident())
                return call(*arguments, **options)

            return noted

        monkeypatch.setattr("os.link", Mock(side_effect=PermissionError("no links here")))
        monkeypatch.setattr("shutil.copyfile", noting(shutil.copyfile))
        monkeypatch.setattr("shutil.rmtree", noting(shutil.rmtree))
        cache, source = LoraCache(size=1), LoraSource()
        for name in "ab":
            await cache.provide(name, job_folder(tmp_path, name), source.fetch_of(name))
        assert threads
        assert threading.get_ident() not in threads

    async def test_a_disk_that_is_too_full_for_the_copy_is_recognised_as_that(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker pauses then; any other error would be the job's."""
        monkeypatch.setattr("os.link", Mock(side_effect=PermissionError("no links here")))
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("shutil.copyfile", Mock(side_effect=full))
        with pytest.raises(OSError, match="No space left") as caught:
            await LoraCache().provide("a", job_folder(tmp_path, "1"), LoraSource().fetch_of("a"))
        assert DiskFull.caused(caught.value)

    async def test_folders_are_made_beside_the_event_loop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, threads = Path.mkdir, set[int]()

        def noting(path: Path, *arguments: Any, **options: Any) -> None:
            threads.add(threading.get_ident())
            made(path, *arguments, **options)

        target = job_folder(tmp_path, "1")
        monkeypatch.setattr(Path, "mkdir", noting)
        await LoraCache().provide("a", target, LoraSource().fetch_of("a"))
        assert threads
        assert threading.get_ident() not in threads

    async def test_a_job_that_is_cancelled_while_files_are_copied_leaves_when_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copying, go = threading.Event(), threading.Event()

        def slow(_source: str, target: str) -> None:
            copying.set()
            assert go.wait(20)
            Path(target).touch()

        monkeypatch.setattr("os.link", slow)
        target = job_folder(tmp_path, "1")
        job = asyncio.create_task(LoraCache().provide("a", target, LoraSource().fetch_of("a")))
        assert await asyncio.to_thread(copying.wait, 20)
        job.cancel()
        await asyncio.sleep(0.05)
        assert not job.done()
        go.set()
        await asyncio.wait({job})
        assert job.cancelled()
        assert (target / "lora.safetensors").exists()

    async def test_without_hard_links_it_is_copied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr("os.link", refuse)
        target = job_folder(tmp_path, "1")
        await LoraCache().provide("a", target, LoraSource().fetch_of("a"))
        assert (target / "lora.safetensors").read_text() == "a"


def test_the_file_and_the_scale_reach_the_renderer() -> None:
    sources = Sources(loras=(Path("/scratch/job/lora-0/lora.safetensors"),))
    job = make_job(lora={"path": "s3://styles/jazz.safetensors", "scale": 0.8})
    message = Render(request_id=1, job=job, plan=Plan(metas=Metas()), sources=sources, folder=Path("/scratch/job"))
    assert TO_ENGINE.validate_json(TO_ENGINE.dump_json(message)) == message
