# SPDX-License-Identifier: Apache-2.0
"""Checks that a model's files are complete: every component of its index, every file of weights in full length.

Nothing is loaded. The header of a safetensors file says where each tensor ends, so an interrupted download shows in the
file's size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from acestep_consumer.engine.renderer.checkpoints.registry import INDEX, SILENCE
from acestep_consumer.engine.renderer.checkpoints.tensor_files import AGAIN, FileDamaged, read_header

_WEIGHTS: Final = "*.safetensors"
_SHARDS: Final = "*.safetensors.index.json"
# A tokenizer needs one of these.
_OF_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def faults_of_checkpoint(folder: Path, *, is_dit: bool = True) -> Iterator[str]:
    """Yield each missing or damaged file of a folder in diffusers' layout, or of one model in ACE-Step's own."""
    if (folder / INDEX).is_file():
        yield from faults_of_pipeline(folder)
        return
    yield from faults_of_model(folder)
    if is_dit and not (folder / SILENCE).is_file():
        yield f"{SILENCE} is missing"


def faults_of_pipeline(folder: Path) -> Iterator[str]:
    """Yield each missing or damaged component of a folder in diffusers' format."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: part for name, part in index.items() if isinstance(part, list) and len(part) > 1 and part[1]}
    except (OSError, ValueError, AttributeError) as error:
        yield f"{INDEX} cannot be read ({error})"
        return
    for name, (library, kind, *_) in parts.items():
        # Not every "Tokenizer" is one of text: ACE-Step's audio tokenizer is a model.
        kind_of_part = "Tokenizer" if library == "transformers" and "Tokenizer" in kind else kind
        yield from (f"{name}: {fault}" for fault in _faults_of_part(folder / name, kind_of_part))


def faults_of_lm(folder: Path) -> Iterator[str]:
    """Yield each missing or damaged file of a language model's folder."""
    yield from faults_of_model(folder)
    yield from _faults_of_tokenizer(folder)


def _faults_of_part(folder: Path, kind: str) -> Iterator[str]:
    if not folder.is_dir():
        yield "the folder is missing"
    elif "Scheduler" in kind:
        yield from () if (folder / "scheduler_config.json").is_file() else ("scheduler_config.json is missing",)
    elif kind == "Tokenizer":
        yield from _faults_of_tokenizer(folder)
    else:
        yield from faults_of_model(folder)


def _faults_of_tokenizer(folder: Path) -> Iterator[str]:
    if not any((folder / name).is_file() for name in _OF_TOKENIZERS):
        yield "no tokenizer"


def faults_of_model(folder: Path) -> Iterator[str]:
    """Yield each missing or damaged file of a model: config and weights."""
    if not (folder / "config.json").is_file():
        yield "config.json is missing"
    files = {path.name: path for path in sorted(folder.glob(_WEIGHTS))}
    missing = sorted(_shards(folder) - set(files))
    if missing:
        yield f"{', '.join(missing)} missing"
    elif not files:
        yield f"no weights ({_WEIGHTS})"
    for path in files.values():
        if (fault := _fault_of_weights(path)) is not None:
            yield f"{path.name} {fault}"


def _shards(folder: Path) -> set[str]:
    """Return the files that an index of shards lists."""
    named: set[str] = set()
    for path in folder.glob(_SHARDS):
        try:
            named |= set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            named.add(f"{path.name} (unreadable)")
    return named


def _fault_of_weights(path: Path) -> str | None:
    """Compare the file's size with its header."""
    try:
        read_header(path)
    except FileDamaged as error:
        return str(error).removesuffix(f": {AGAIN}")
    return None
