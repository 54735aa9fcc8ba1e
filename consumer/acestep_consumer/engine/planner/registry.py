# SPDX-License-Identifier: Apache-2.0
"""Language model registry: finds a model by its name, in folders or on the hub. Loads nothing."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.hub_cache import HUB_ID, is_offline, model_folders, snapshot
from acestep_consumer.engine.published_models import MAIN_REPOSITORY, PUBLISHED, ModelKind, pull_command
from acestep_consumer.policy.benchmarks import LM_SIZES, LmSize, is_same_size
from acestep_consumer.policy.lm_choice import LmRequest
from acestep_consumer.policy.tiers import LMS

HUB: Final = MappingProxyType(
    {
        model.name: model.repository
        for model in PUBLISHED.values()
        if model.kind is ModelKind.LM and model.repository != MAIN_REPOSITORY
    }
)
"""Language models with a repository of their own, which the first start downloads."""


class LmNotFound(Exception):
    """No language model of that name was found; the message says where it was looked for and what to do."""


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
    for folder in model_folders(model, checkpoint_dir):
        if (folder / "config.json").is_file():
            return LmLocation(folder=folder.resolve())
    hub_id = HUB.get(model, model)
    if HUB_ID.fullmatch(hub_id):
        return LmLocation(hub_id=hub_id)
    where = f"{checkpoint_dir / model}" if checkpoint_dir else "a folder of that name (ACESTEP_CHECKPOINT_DIR is unset)"
    pull = f", or download it: {pull_command(model, checkpoints=checkpoint_dir)}" if model in PUBLISHED else ""
    meant = _meant(model)
    hint = f" to one of {', '.join(LMS)}, or to a folder" if meant is None else f"; did you mean {meant}?"
    raise LmNotFound(
        f"language model {model} is not found: looked for {where}; set ACESTEP_LM_MODEL_PATH{pull or hint}"
    )


def _meant(model: str) -> str | None:
    """Return the published model that a name may stand for: in another case, without its beginning, or misspelled."""
    name = model.casefold()
    known = {each.casefold(): each for each in LMS}
    shortened = [each for each in LMS if name and each.casefold().endswith(f"-{name}")]
    near = shortened or [known[each] for each in difflib.get_close_matches(name, known, n=1, cutoff=0.8)]
    return near[0] if near else None


def lm_request(settings: EngineSettings, environ: Mapping[str, str]) -> LmRequest:
    """Return the request for a language model on this machine: the settings, and the models that can be had.

    Args:
        settings: the engine's.
        environ: names the cache folder of the Hugging Face client.
    """
    places = {
        name: place_on_disk(name, settings.checkpoint_dir, environ) for name in (*LMS, settings.lm_model_path) if name
    }
    found = {name: place for name, place in places.items() if place is not None}
    return LmRequest(
        init=settings.init_llm,
        model=settings.lm_model_path,
        backend=settings.lm_backend,
        on_disk=frozenset(name for name in LMS if name in found and any(found[name].glob("*.safetensors"))),
        on_hub=frozenset() if is_offline(environ) else frozenset(HUB),
        sizes={name: size for name, place in found.items() if (size := _size(place)) is not None},
        int8=settings.quantization == "int8",
    )


def place_on_disk(model: str, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return the folder of a model that is on the disk: of ``resolve``, or in the hub's cache."""
    try:
        place = resolve(model, checkpoint_dir)
    except LmNotFound:
        return None
    return place.folder or snapshot(place.hub_id or model, environ)


def _size(folder: Path) -> LmSize | None:
    """Return the size that a model's ``config.json`` (Qwen3) says; None: it does not say it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, layers, heads = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        head = config.get("head_dim") or hidden // heads
        queries, keys = heads * head, config.get("num_key_value_heads", heads) * head
        layer = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"] + 2) + 2 * head
        embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
        size = LmSize(int(embeddings + layers * layer + hidden), int(layers), int(keys), embedded=int(embeddings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    published = (known for known in LM_SIZES.values() if is_same_size(size.parameters, known.parameters))
    return next(published, size) if size.parameters > 0 else None
