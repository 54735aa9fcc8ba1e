# SPDX-License-Identifier: Apache-2.0
"""How many tasks a minute a key may ask for."""

import pytest

from acestep_consumer.gateway.answers import ApiError
from acestep_consumer.gateway.rate_limit import RateLimit
from tests.support.gateway import gateway


def test_a_key_gets_its_tasks_back_as_time_goes_on_and_takes_none_from_others() -> None:
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    limit.admit("one")
    limit.admit("one")
    with pytest.raises(ApiError) as refused:
        limit.admit("one")
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "30")
    limit.admit("other")
    now[0] = 30.0
    limit.admit("one")
    with pytest.raises(ApiError):
        limit.admit("one")
    for _ in range(100):
        RateLimit(0).admit("one")


async def test_it_counts_tasks_not_polls_and_a_repeat_is_no_other_task() -> None:
    body = {"prompt": "a", "task_id": "mine"}
    async with gateway(ACESTEP_API_TASKS_PER_MINUTE="1") as served:
        task_id = await served.release(body)
        assert await served.release(body) == task_id
        assert (await served.query(task_id))[0]["status"] == 0
        status, answer = await served.post("/release_task", {"prompt": "b"})
        assert (status, "ACESTEP_API_TASKS_PER_MINUTE" in answer["detail"]) == (429, True)
