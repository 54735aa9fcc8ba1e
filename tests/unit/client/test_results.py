# SPDX-License-Identifier: Apache-2.0
"""Manifests as clients read them from storage."""

import pytest

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import load
from acestep_consumer.domain.objects import ObjectAddress, SmallObject
from tests.support.fake_store import FakeObjects
from tests.support.jobs import make_job, make_manifest


async def test_the_manifest_of_another_job_is_not_taken_for_that_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    body = make_manifest(make_job(task_id="copied")).model_dump_json().encode()
    places = {ObjectAddress("acestep", f"jobs/{each}/manifest.json"): SmallObject(body, {}) for each in ("copied", "b")}
    stored = FakeObjects(objects=places)

    async def objects(_: Results) -> FakeObjects:
        return stored

    monkeypatch.setattr(Results, "objects", objects)
    results = Results(load({}, None).storage)
    found = await results.find("copied")
    assert found is not None
    assert found.subject == "copied"
    with pytest.raises(DownloadFailed, match="the manifest of another job, copied"):
        await results.find("b")
