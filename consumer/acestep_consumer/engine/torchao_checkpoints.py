# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights torchao has quantized, as their configs say. Imports neither torch nor torchao."""

import json
from pathlib import Path
from typing import Any, Final

INSTALL: Final = "pip install 'acestep-consumer[int8]'"


def quantized_by_torchao(folder: Path) -> bool:
    """Whether the config of a model in this folder, or of one of its components, names torchao."""
    return any(map(_names_torchao, (folder / "config.json", *folder.glob("*/config.json"))))


def _names_torchao(path: Path) -> bool:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"]).lower() == "torchao"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not quantized; or loading says what is wrong with it
