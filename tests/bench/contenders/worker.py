# SPDX-License-Identifier: Apache-2.0
"""The worker itself, whole, with a renderer that is done at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from acestep_consumer.app import run_worker
from acestep_consumer.config.settings import Settings
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources
from acestep_consumer.domain.ports import Report
from tests.bench.arena import settings_for
from tests.bench.chore import song
from tests.bench.throughput import ThroughputMeter
from tests.support.fake_engine import FakeEngines, FakeRenderer


class InstantRenderer(FakeRenderer):
    """Writes its songs as files, as the renderer process does, and takes no time to make them."""

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Write one song per seed."""
        report(1.0, "render")
        tracks = tuple(song(folder / f"{index}.wav", seed) for index, seed in enumerate(job.seeds))
        return Rendering(tracks=tracks, render_s=0.0, encode_s=0.0)


async def main(settings: Settings, messages: int) -> int:
    """Run until ``messages`` are acked."""
    meter = ThroughputMeter(messages)
    worker = asyncio.create_task(run_worker(settings, grace_s=10, engines=FakeEngines(InstantRenderer())))
    throughput = asyncio.create_task(meter.result())
    await asyncio.wait((worker, throughput), return_when=asyncio.FIRST_COMPLETED)
    if throughput.done():
        throughput.result().print_json()
        os.kill(os.getpid(), signal.SIGTERM)
    return await worker


if __name__ == "__main__":
    sys.exit(asyncio.run(main(settings_for(int(sys.argv[1])), int(sys.argv[2]))))
