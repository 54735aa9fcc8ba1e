# SPDX-License-Identifier: Apache-2.0
"""What `acestep-consumer watch` prints of workers: a line for each change, not for each answer to a status request."""

from collections.abc import AsyncIterator
from io import StringIO

import pytest
from rich.console import Console

from acestep_consumer.commands.watch import _print
from acestep_schemas.events import WorkerEvent
from acestep_schemas.examples import worker


async def told(*states: tuple[str, str]) -> AsyncIterator[WorkerEvent]:
    for number, (worker_id, state) in enumerate(states):
        data = worker().data.model_copy(update={"worker_id": worker_id, "state": state, "in_hand": number})
        yield WorkerEvent.of(data)


ANNOUNCED = (("a", "ready"), ("b", "ready"), ("a", "ready"), ("b", "draining"), ("a", "ready"), ("b", "ready"))


@pytest.mark.parametrize(("as_json", "lines"), [(False, 4), (True, 6)], ids=["lines", "json"])
async def test_a_worker_that_announces_itself_again_is_no_news_except_to_a_program(
    capsys: pytest.CaptureFixture[str], *, as_json: bool, lines: int
) -> None:
    await _print(told(*ANNOUNCED), Console(file=StringIO()), as_json=as_json)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    if not as_json:
        assert [line.partition("  ")[2] for line in printed] == [
            "worker a is ready",
            "worker b is ready",
            "worker b is draining",
            "worker b is ready",
        ]
