# SPDX-License-Identifier: Apache-2.0

import pytest

from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.multi_gpu.parent import MAX_CRASHED_STARTS, MAX_REFUSED_STARTS, RestartPolicy

SIGKILL = 137


def test_a_worker_that_dies_at_every_start_is_restarted_at_growing_delays() -> None:
    policy = RestartPolicy(steady_s=60)
    assert [policy.delay_after(SIGKILL, 1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_steady_run_starts_the_delays_over() -> None:
    policy = RestartPolicy(steady_s=60)
    assert [policy.delay_after(SIGKILL, ran_s) for ran_s in (1, 1, 60, 1)] == [0.5, 1, 0.5, 1]


@pytest.mark.parametrize("code", [Exit.DONE, Exit.USAGE, Exit.ENGINE])
def test_an_exit_for_good_at_the_first_start_is_final(code: Exit) -> None:
    assert RestartPolicy(steady_s=60).delay_after(code, 1) is None


def test_settings_that_never_had_a_steady_worker_are_refused_at_once_even_after_a_crash() -> None:
    policy = RestartPolicy(steady_s=60)
    assert policy.delay_after(SIGKILL, 59) is not None
    assert policy.delay_after(Exit.USAGE, 1) is None


def test_settings_that_had_a_steady_worker_are_refused_after_a_bounded_number_of_starts() -> None:
    policy = RestartPolicy(steady_s=60)
    policy.delay_after(SIGKILL, 60)
    delays = [policy.delay_after(Exit.USAGE, 1) for _ in range(MAX_REFUSED_STARTS + 1)]
    assert None not in delays[:-1]
    assert delays[-1] is None


def test_a_crash_or_a_steady_run_between_refused_starts_starts_their_count_over() -> None:
    policy = RestartPolicy(steady_s=60)
    policy.delay_after(SIGKILL, 60)
    for ended in [(SIGKILL, 1), (Exit.USAGE, 60)]:
        assert [policy.delay_after(Exit.USAGE, 1) for _ in range(MAX_REFUSED_STARTS - 1)].count(None) == 0
        assert policy.delay_after(*ended) is not None


def test_starts_that_break_on_a_bug_each_time_are_bounded_in_number() -> None:
    policy = RestartPolicy(steady_s=60)
    delays = [policy.delay_after(Exit.UNEXPECTED, 1) for _ in range(MAX_CRASHED_STARTS + 1)]
    assert None not in delays[:-1]
    assert delays[-1] is None


def test_a_worker_that_breaks_after_a_steady_run_is_restarted_each_time() -> None:
    policy = RestartPolicy(steady_s=60)
    assert None not in [policy.delay_after(Exit.UNEXPECTED, 60) for _ in range(2 * MAX_CRASHED_STARTS)]
