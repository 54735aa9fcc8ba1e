# SPDX-License-Identifier: Apache-2.0
"""The request of a job with all that counts when it is sent again, for the same song or another one like it. Pure."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from acestep_consumer.domain import edits
from acestep_schemas.events import Edit, ParentSong
from acestep_schemas.request import GenerationRequest

# The id is that of the job, and the seeds say whether they are random.
_NEVER: Final = frozenset({"task_id", "use_random_seed"})
_OF_ONE_TRY: Final = frozenset({"seed", "retake_seed"})
_STEPS: Final = frozenset({"inference_steps", "timesteps"})
_HOW_MANY: Final = frozenset({"batch_size", "candidates", "keep"})
_WRITTEN_BEFORE: Final = frozenset({"use_cot_metas", "use_cot_caption", "use_cot_language", "audio_code_string"})
"""What a song that is made again has, so that the language model writes nothing for it."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The request of a job, as far as it is known, and what its events say of where its values come from."""

    request: GenerationRequest
    parents: tuple[ParentSong, ...] = ()
    edits: tuple[Edit, ...] = ()

    @property
    def draft(self) -> str | None:
        """The job that was made final; None: this is another kind of job."""
        return next((parent.task_id for parent in self.parents[:1] if parent.field == "quality"), None)

    def whole(self, source: GenerationRequest | None) -> dict[str, JsonValue]:
        """Return the fields that make the same song when they are sent; ``source``: that of the job that it names.

        Defaults are left out, unless a worker would take over another value from the song that is named.
        """
        fields = plain(self.request)
        for name in self._taken_over():
            value = getattr(self.request, name)
            if value not in (None, "", ()) and (source is None or getattr(source, name) != value):
                fields.setdefault(name, self.request.model_dump(mode="json", include={name})[name])
        return fields

    def another(self, source: GenerationRequest | None, draft: "JobRequest | None") -> dict[str, JsonValue]:
        """Return the fields that make another song of the same kind: with other seeds, and planned anew.

        ``draft``: the job that was made final, if it is known. What a variation or a final song took over from its
        parent is left to that.
        """
        again = _without(self.whole(source), _OF_ONE_TRY)
        resolved = {edit.field for edit in self.edits}
        first = next(iter(self.parents), None)
        if first is not None and first.field == "variation":
            named: dict[str, JsonValue] = {"source_task_id": first.task_id, "source_index": first.index}
            return _without(again, resolved | {"retake_variance"}) | named | {"variation": self.request.retake_variance}
        if first is None or first.field != "quality":
            return again
        own = _without(again, resolved)
        if draft is not None:
            return _without(draft.another(None, None), _STEPS | _HOW_MANY) | own
        planned: dict[str, JsonValue] = {"thinking": True} if self.request.audio_code_string else {}
        return _without(again, _WRITTEN_BEFORE) | planned

    def _taken_over(self) -> Iterator[str]:
        """Yield the given fields that a worker would set by the song that is named, or by the quality."""
        if self.request.quality is not None:
            yield from _STEPS & self.request.model_fields_set
        if self.request.source_task_id is None:
            return
        if edits.is_made_again(self.request):
            yield from sorted(self.request.model_fields_set - edits.NOT_TAKEN_OVER)
        else:
            taken = (*edits.TAKEN_OVER_BY_REPAINTS, "fade_in_duration", "fade_out_duration")
            yield from (name for name in taken if name in self.request.model_fields_set)


def plain(request: GenerationRequest) -> dict[str, JsonValue]:
    """Return the fields that differ from their defaults. Seeds are text, because JavaScript rounds large numbers."""
    fields: dict[str, JsonValue] = request.model_dump(mode="json", exclude_defaults=True, exclude=set(_NEVER))
    if request.seed:
        fields["seed"] = ", ".join(map(str, request.seed))
    if request.retake_seed is not None:
        fields["retake_seed"] = str(request.retake_seed)
    return fields


def _without(fields: Mapping[str, JsonValue], names: Collection[str]) -> dict[str, JsonValue]:
    return {name: value for name, value in fields.items() if name not in names}
