# SPDX-License-Identifier: Apache-2.0
"""Ids that say of themselves that a gateway gave them out."""

import re
import time
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.gateway.task_ids import accepted_at, is_given_out, new_task_id, task_id_of
from acestep_schemas.request import TASK_ID_PATTERN


def test_an_id_is_a_uuid_that_holds_its_time_and_no_two_are_equal() -> None:
    before = int(time.time())
    ids = {new_task_id() for _ in range(1000)}
    assert len(ids) == 1000
    for task_id in ids:
        assert re.fullmatch(TASK_ID_PATTERN, task_id)
        assert (UUID(task_id).version, UUID(task_id).variant) == (8, "specified in RFC 4122")
        assert is_given_out(task_id)
        assert before <= (accepted_at(task_id) or 0) <= time.time()


@given(st.text(), st.text())
def test_an_idempotency_key_is_always_the_same_id_of_its_owner(owner: str, key: str) -> None:
    task_id = task_id_of(owner, key)
    assert task_id == task_id_of(owner, key)
    assert task_id not in (task_id_of(f"{owner}x", key), task_id_of(owner, f"{key}x"))
    assert is_given_out(task_id)
    assert accepted_at(task_id) is None


@given(st.integers(min_value=0, max_value=2**128 - 1))
def test_other_ids_were_not_given_out(number: int) -> None:
    assert not is_given_out(str(UUID(int=number)))


def test_a_changed_id_was_not_given_out() -> None:
    task_id = new_task_id()
    for position, digit in enumerate(task_id):
        if digit != "-":
            other = "1" if digit == "0" else "0"
            assert not is_given_out(task_id[:position] + other + task_id[position + 1 :]), position
    for text in (task_id.upper(), f"{{{task_id}}}", task_id.replace("-", ""), str(uuid4()), "order-7", ""):
        assert not is_given_out(text), text
