# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer download`: fetches the songs of jobs that have ended, by id."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeGuard

from rich.console import Console

from acestep_consumer.client.download import download as fetch
from acestep_consumer.client.errors import DownloadFailed, no_songs
from acestep_consumer.client.results import Results
from acestep_consumer.commands.base import print_error, print_unwritable
from acestep_consumer.commands.terminal import STORAGE, plural, size, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_schemas.events import Completed, JobCompleted, TerminalEvent

_RETRY_S: Final = 10.0


async def download(settings: Settings, task_ids: Sequence[str], folder: Path, note: Console, *, as_json: bool) -> Exit:
    """Write the songs to the folder and print their paths.

    A job without songs, or with one that cannot be fetched, does not keep the others back; a storage that is out of
    reach does.
    """
    results = Results(settings.storage, retry_s=_RETRY_S)
    done = Exit.DONE
    try:
        for task_id in task_ids:
            try:
                with waiting_for(STORAGE, note):
                    event = await results.find(task_id)
                paths = await _fetch(event.data, folder, results, note) if _has_songs(event) else []
            except DownloadFailed as error:
                print_error(f"download failed: {error}", note)
                done = Exit.UNREACHABLE
                if _is_out_of_reach(error):
                    break
                continue
            except OSError as error:
                return print_unwritable(folder, error, note)
            if paths:
                lines = [json.dumps({"task_id": task_id, "songs": paths})] if as_json else paths
                sys.stdout.write("".join(f"{line}\n" for line in lines))
                sys.stdout.flush()
                continue
            done = max(done, Exit.JOB_FAILED)
            missing = "no result: it has not ended yet, its objects were deleted, or the id is wrong"
            print_error(f"{task_id}: {missing}" if event is None else str(no_songs(event)), note)
    finally:
        await results.close()
    return done


async def _fetch(job: Completed, folder: Path, results: Results, note: Console) -> list[str]:
    songs = f"{plural(len(job.audios), 'song')} of {job.task_id}, {size(sum(audio.bytes for audio in job.audios))}"
    with waiting_for(songs, note):
        return [str(path) for path in await fetch(job, folder, results)]


def _has_songs(event: TerminalEvent | None) -> TypeGuard[JobCompleted]:
    return isinstance(event, JobCompleted) and bool(event.data.audios)


def _is_out_of_reach(error: DownloadFailed) -> bool:
    """Whether the storage gave no answer: then it would be asked for each job, and tried again each time."""
    return isinstance(error.__cause__, StorageUnavailable) and not isinstance(error.__cause__, StorageRefused)
