# SPDX-License-Identifier: Apache-2.0
"""The table of task types."""

from typing import get_args

from acestep_consumer.domain.tasks import TASKS, Variant, tasks_of
from acestep_schemas.request import TaskType


def test_every_task_type_of_the_schema_has_a_row_and_no_row_is_unknown_to_it() -> None:
    assert set(TASKS) == set(get_args(TaskType))


def test_only_base_models_can_work_on_single_tracks() -> None:
    everywhere = ("cover", "cover-nofsq", "repaint", "text2music")
    assert (tasks_of(Variant.TURBO), tasks_of(Variant.SFT)) == (everywhere, everywhere)
    assert tasks_of(Variant.BASE) == ("complete", "cover", "cover-nofsq", "extract", "lego", "repaint", "text2music")


def test_the_language_model_is_skipped_where_the_source_has_the_content() -> None:
    assert {task.name for task in TASKS.values() if not task.uses_lm} == {"cover", "cover-nofsq", "repaint", "extract"}


def test_a_window_is_a_part_of_source_audio() -> None:
    assert all(task.reads_source for task in TASKS.values() if task.has_window)
