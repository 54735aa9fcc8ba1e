# SPDX-License-Identifier: Apache-2.0
"""Published models as data: what each is, which repository of the hub holds it, and what else it needs.

Names are those of the folders in ACE-Step's own layout: ``checkpoints/acestep-v15-turbo/``, ``checkpoints/vae/``, ….
A new model is a row here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

MAIN_REPOSITORY: Final = "ACE-Step/Ace-Step1.5"
"""Holds a folder for each of its models; all other repositories hold the files of one."""


class ModelKind(StrEnum):
    """Kind of a model, by its part in a song."""

    DIT = "DiT"
    LM = "language model"
    VAE = "VAE"
    TEXT_ENCODER = "text encoder"


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model on the hub. ``name`` is that of its folder, and the one that settings and requests use."""

    name: str
    kind: ModelKind
    repository: str

    @property
    def prefix(self) -> str:
        """Prefix of its files' names in the repository."""
        return f"{self.name}/" if self.repository == MAIN_REPOSITORY else ""


_ROWS: Final = (
    PublishedModel("acestep-v15-turbo", ModelKind.DIT, MAIN_REPOSITORY),
    PublishedModel("acestep-v15-turbo-shift1", ModelKind.DIT, "ACE-Step/acestep-v15-turbo-shift1"),
    PublishedModel("acestep-v15-turbo-shift3", ModelKind.DIT, "ACE-Step/acestep-v15-turbo-shift3"),
    PublishedModel("acestep-v15-turbo-continuous", ModelKind.DIT, "ACE-Step/acestep-v15-turbo-continuous"),
    PublishedModel("acestep-v15-sft", ModelKind.DIT, "ACE-Step/acestep-v15-sft"),
    PublishedModel("acestep-v15-base", ModelKind.DIT, "ACE-Step/acestep-v15-base"),
    PublishedModel("acestep-v15-xl-turbo", ModelKind.DIT, "ACE-Step/acestep-v15-xl-turbo"),
    PublishedModel("acestep-v15-xl-sft", ModelKind.DIT, "ACE-Step/acestep-v15-xl-sft"),
    PublishedModel("acestep-v15-xl-base", ModelKind.DIT, "ACE-Step/acestep-v15-xl-base"),
    PublishedModel("acestep-5Hz-lm-0.6B", ModelKind.LM, "ACE-Step/acestep-5Hz-lm-0.6B"),
    PublishedModel("acestep-5Hz-lm-1.7B", ModelKind.LM, MAIN_REPOSITORY),
    PublishedModel("acestep-5Hz-lm-4B", ModelKind.LM, "ACE-Step/acestep-5Hz-lm-4B"),
    PublishedModel("vae", ModelKind.VAE, MAIN_REPOSITORY),
    PublishedModel("Qwen3-Embedding-0.6B", ModelKind.TEXT_ENCODER, MAIN_REPOSITORY),
)

PUBLISHED: Final[dict[str, PublishedModel]] = {model.name: model for model in _ROWS}
"""By name."""

DEFAULT_LM: Final = PUBLISHED["acestep-5Hz-lm-1.7B"]
_SHARED: Final = (PUBLISHED["vae"], PUBLISHED["Qwen3-Embedding-0.6B"])


def is_dit(name: str) -> bool:
    """Whether a published DiT has this name."""
    return name in PUBLISHED and PUBLISHED[name].kind is ModelKind.DIT


def pull_command(*names: str, checkpoints: Path | None) -> str:
    """Return the command that downloads models, or the rest of them, into a folder of checkpoints."""
    folder = f" --checkpoints {checkpoints}" if checkpoints else ""
    return f"acestep-consumer models pull {' '.join(names)}{folder}"


def needed_for(names: Iterable[str], *, lm: PublishedModel | None) -> tuple[PublishedModel, ...]:
    """Return the models of these names, with VAE and text encoder where a DiT needs them, and then ``lm``."""
    named = [PUBLISHED[name] for name in names]
    if any(model.kind is ModelKind.DIT for model in named):
        named += [*_SHARED, *([lm] if lm else [])]
    return tuple(dict.fromkeys(named))
