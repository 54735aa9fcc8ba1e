# SPDX-License-Identifier: Apache-2.0
"""Language model registry: finds a model by its name, in folders or on the hub. Loads nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

HUB: Final = MappingProxyType(
    {
        "acestep-5Hz-lm-0.6B": "ACE-Step/acestep-5Hz-lm-0.6B",
        "acestep-5Hz-lm-4B": "ACE-Step/acestep-5Hz-lm-4B",
    }
)
"""The 1.7B model is published only inside ``ACE-Step/Ace-Step1.5``."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class LmNotFound(Exception):
    """There is no language model of that name; the message says where it was looked for and what to do."""


@dataclass(frozen=True, slots=True)
class LmLocation:
    """The location of a language model: in ``folder``, or else on the hub as ``hub_id``. One of them is None."""

    folder: Path | None = None
    hub_id: str | None = None


def resolve(model: str, checkpoint_dir: Path | None) -> LmLocation:
    """Find the model: a folder of that path, then one of that name in ``checkpoint_dir``, then the hub.

    Raises:
        LmNotFound: it is in none of them.
    """
    given = Path(model).expanduser()
    for folder in (given, *([checkpoint_dir / model] if checkpoint_dir else [])):
        if (folder / "config.json").is_file():
            return LmLocation(folder=folder.resolve())
    hub_id = HUB.get(model, model)
    if _HUB_ID.fullmatch(hub_id):
        return LmLocation(hub_id=hub_id)
    where = f"{checkpoint_dir / model}" if checkpoint_dir else "a folder of that name (ACESTEP_CHECKPOINT_DIR is unset)"
    raise LmNotFound(f"language model {model} is not found: looked for {where}; set ACESTEP_LM_MODEL_PATH")
