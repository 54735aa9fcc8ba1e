# SPDX-License-Identifier: Apache-2.0
"""Task types as data: a row each, read by everything that differs between tasks.

A new task type is a name in ``acestep_schemas.request.TaskType`` and a row here. Its instruction is the pipeline's.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from acestep_schemas.request import WINDOWED_TASKS, GenerationRequest, TaskType


class Variant(StrEnum):
    """The families of ACE-Step 1.5 DiT weights; they differ in guidance and in the tasks they were trained for."""

    TURBO = "turbo"
    SFT = "sft"
    BASE = "base"


class SourceAudio(StrEnum):
    """Use of source audio by a task."""

    UNUSED = "unused"
    OPTIONAL = "optional"
    """Audio codes can take its place."""
    REQUIRED = "required"


class ShownSource(StrEnum):
    """Part of a task's source audio that the model is shown."""

    NOTHING = "nothing"
    """Only a flow edit uses it, and starts from it in place of noise."""
    CODES = "codes"
    """What its audio codes keep of it."""
    OUTSIDE_WINDOW = "outside window"
    WHOLE = "whole"


TRACK_CLASSES: Final = (
    *("vocals", "backing_vocals", "drums", "bass", "guitar", "keyboard"),
    *("percussion", "strings", "synth", "fx", "brass", "woodwinds"),
)
"""The tracks that base models were trained to extract and to add."""
ANALYSES: Final = ("full_analysis_only", "extract_codes_only")
"""Fields that ask for what is heard in source audio, whatever the task."""
ALL_VARIANTS: Final = frozenset(Variant)
BASE_ONLY: Final = frozenset((Variant.BASE,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task type.

    Attributes:
        source: whether it works on source audio.
        uses_lm: whether the 5Hz LM may write metadata and codes for it. Where it may not, the source audio determines
            them.
        variants: the model families that were trained for it.
        shown: what the model is shown of the source audio.
        known_as: the task that the model takes it for; None: itself.
        tracks: the field with the tracks that its prompt names; None: it names none.
        names_length: whether its prompt names the planned length where the source or codes determine the real one.
    """

    name: TaskType
    source: SourceAudio
    uses_lm: bool = True
    variants: frozenset[Variant] = ALL_VARIANTS
    shown: ShownSource = ShownSource.WHOLE
    known_as: TaskType | None = None
    tracks: Literal["track_name", "track_classes"] | None = None
    names_length: bool = False

    def model_task(self, *, from_codes: bool) -> TaskType:
        """The task that the model takes it for: a song from audio codes alone is a cover."""
        return "cover" if from_codes and not self.reads_source else self.known_as or self.name

    @property
    def has_window(self) -> bool:
        """Whether ``repainting_start`` and ``repainting_end`` select a part of the source."""
        return self.name in WINDOWED_TASKS

    @property
    def reads_source(self) -> bool:
        """Whether source audio is used where it is given."""
        return self.source is not SourceAudio.UNUSED

    def uses_source(self, request: GenerationRequest) -> bool:
        """Whether source audio is used for this request: by the task itself, or by a flow edit."""
        return self.reads_source or request.flow_edit_morph

    def lacks_source(self, request: GenerationRequest) -> bool:
        """Whether the request has neither the source audio that it works on nor codes in its place."""
        replaced = self.source is not SourceAudio.REQUIRED and request.audio_code_string
        return self.uses_source(request) and not request.has_source and not replaced

    def source_rule(self, request: GenerationRequest) -> str | None:
        """The rule that a request breaks which lacks its source; None: it does not."""
        if not self.lacks_source(request):
            return None
        codes = "" if self.source is SourceAudio.REQUIRED else ", or audio codes in audio_code_string"
        what = f"task_type {self.name}" if self.reads_source else "flow_edit_morph"
        return f"{what} needs source audio: s3://bucket/key or https://host/path{codes}"


_ROWS: Final = (
    Task(name="text2music", source=SourceAudio.UNUSED, shown=ShownSource.NOTHING, names_length=True),
    Task(name="cover", source=SourceAudio.OPTIONAL, uses_lm=False, shown=ShownSource.CODES),
    Task(name="cover-nofsq", source=SourceAudio.OPTIONAL, uses_lm=False, known_as="cover"),
    Task(name="repaint", source=SourceAudio.REQUIRED, uses_lm=False, shown=ShownSource.OUTSIDE_WINDOW),
    Task(name="extract", source=SourceAudio.REQUIRED, uses_lm=False, variants=BASE_ONLY, tracks="track_name"),
    Task(name="lego", source=SourceAudio.REQUIRED, variants=BASE_ONLY, tracks="track_name"),
    Task(
        name="complete",
        source=SourceAudio.REQUIRED,
        variants=BASE_ONLY,
        tracks="track_classes",
        names_length=True,
    ),
)

TASKS: Final[dict[str, Task]] = {task.name: task for task in _ROWS}
"""By ``GenerationRequest.task_type``."""


SOURCE_TASKS: Final = frozenset(task.name for task in _ROWS if task.reads_source)
"""Tasks that use source audio where it is given."""


def tasks_of(variant: Variant) -> tuple[str, ...]:
    """Return the names of the tasks that models of this family can do, sorted."""
    return tuple(sorted(task.name for task in _ROWS if variant in task.variants))
