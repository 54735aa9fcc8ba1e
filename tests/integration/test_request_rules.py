# SPDX-License-Identifier: Apache-2.0
"""The operator's rules for requests, from the environment to the event, on a worker's own process."""

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.support.scenario import Scenario, scenario


async def end_of(seen: Scenario, task_id: str, body: bytes, **properties: Any) -> dict[str, Any]:
    """Send a message and return the data of its terminal event."""
    await seen.peer.request(body, message_id=task_id, **properties)
    await seen.all_ended(task_id)
    (end,) = seen.recorder.terminal(task_id)
    data: dict[str, Any] = end.data
    return data


async def test_a_form_gets_the_operators_defaults_and_the_settings_of_ace_steps_server_are_named(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = {"ACESTEP_DEFAULT_BATCH_SIZE": "2", "ACESTEP_DEFAULT_FORMAT": "wav", "ACESTEP_NO_INIT": "true"}
    form = urlencode({"prompt": "jazz", "audio_duration": "10", "bpm": "fast"}).encode()
    async with scenario(service_environment, tmp_path, **variables) as seen:
        data = await end_of(seen, "form", form, content_type="application/x-www-form-urlencoded")
        assert [Path(audio["uri"]).suffix for audio in data["audios"]] == [".wav", ".wav"]
        assert "'bpm' = fast: must be a number; the default is used" in data["warnings"]
        wrapped = b"""{"task_id": "order-1", "metadata": {"source": "shop"},
            "data": {"prompt": ["soft", "jazz"], "duration": 10, "bpm": NaN, "vocal_language": "Japanese"}}"""
        data = await end_of(seen, "order-1", wrapped)
        assert (data["task_id"], data["request"]["prompt"], data["metas"]["language"]) == (
            "order-1",
            "['soft', 'jazz']",
            "Japanese",
        )
        assert len(data["warnings"]) == 4
        (line,) = seen.worker.log_lines(event="setting has no effect here")
        assert line["setting"] == "ACESTEP_NO_INIT"


@pytest.mark.parametrize(("asked", "operator"), [("true", "false"), ("false", "true")])
async def test_strict_rejects_whether_the_request_or_the_operator_asks_for_it(
    service_environment: dict[str, str], tmp_path: Path, asked: str, operator: str
) -> None:
    body = f'{{"prompt": "jazz", "bpm": "fast", "strict": {asked}}}'.encode()
    async with scenario(service_environment, tmp_path, ACESTEP_STRICT_REQUESTS=operator) as seen:
        data = await end_of(seen, "strict", body)
    assert data["status"] == "rejected"
    assert data["error"]["details"] == [{"field": "bpm", "value": "fast", "rule": "must be a number"}]
