# SPDX-License-Identifier: Apache-2.0
"""A worker as its container runs it, without a container: every file system read-only but one, and no capability.

The mount namespace and the capabilities are those that Docker makes of ``read_only``, ``tmpfs``, ``cap_drop`` and
``no-new-privileges``. Making them takes root, which a test machine may not give.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import boto3
import pytest

from acestep_consumer.client import Client
from acestep_schemas.events import JobCompleted, TerminalEvent
from tests.support.broker import Peer
from tests.support.engine_double import write_song
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from pathlib import Path

    from infra.local.s3 import SeaweedFS

# Arguments: the one folder that may be written, then the command.
_CONFINE = """
for mount in $(findmnt --raw --noheadings --output TARGET | grep -Ev '^/(proc|sys|dev)(/|$)'); do
    mount -o remount,bind,ro "$mount" || exit 99
done
mount -t tmpfs -o nosuid,nodev tmpfs "$1" || exit 99
shift
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def confined(folder: Path, *command: str) -> list[str]:
    """The command, with ``folder`` as an empty place in memory, and nothing else that can be written."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _CONFINE, "confine", str(folder), *command]


def _possible() -> bool:
    tools = ("unshare", "findmnt", "mount", "setpriv")
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        return False
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "-o", "remount,bind,ro", "/"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _possible(), reason="needs root, and mount namespaces")


def test_nothing_but_the_one_folder_can_be_written(tmp_path: Path) -> None:
    (inside := tmp_path / "work").mkdir()
    tried = f"touch {inside}/a && ! touch {tmp_path}/a && ! touch /a && ! chown 1 {inside}/a"
    done = subprocess.run(confined(inside, "sh", "-c", tried), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(inside.iterdir()) == []


async def test_a_worker_reads_audio_and_sings_with_a_read_only_root_and_no_capabilities(
    own_worker_environment: dict[str, str], s3: SeaweedFS, tmp_path: Path
) -> None:
    write_song(tmp_path / "source.wav", seed=1, seconds=11)
    prefix = own_worker_environment["ACESTEP_S3_PREFIX"]
    boto3.client(
        "s3", endpoint_url=s3.endpoint, aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    ).upload_file(str(tmp_path / "source.wav"), s3.bucket, f"{prefix}/source.wav")  # fmt: skip
    scratch = tmp_path / "work"
    scratch.mkdir()
    inside = {name: str(scratch) for name in ("HOME", "TMPDIR", "ACESTEP_SCRATCH_DIR")}
    worker = WorkerProcess(tmp_path, own_worker_environment | inside | {"PYTHONDONTWRITEBYTECODE": "1"})
    worker._command = confined(scratch, *worker._command)
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    async with running(worker), Client(url) as client, client.subscribe("job.*.sealed") as events:
        async with Peer(url) as peer:
            body = {
                "task_type": "cover",
                "src_audio_path": f"s3://{s3.bucket}/{prefix}/source.wav",
                "inference_steps": 1,
            }
            await peer.request(json.dumps(body).encode(), message_id="sealed")
        async with asyncio.timeout(120):
            ended = await anext(event async for event in events if isinstance(event, TerminalEvent))
    assert isinstance(ended, JobCompleted), ended
    assert list(scratch.iterdir()) == []
