# SPDX-License-Identifier: Apache-2.0
"""Loading of a language model: finds it, chooses the backend, sizes the key-value cache, offloads the idle model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from acestep_consumer.engine.messages import ConfigurePlanner, PlannerReport
from acestep_consumer.engine.planner.backend import Backend, Generation, SequenceOutput
from acestep_consumer.engine.planner.registry import LmNotFound, resolve
from acestep_consumer.engine.planner.tokens import LmTokens, TokenizerUnfit
from acestep_consumer.engine.published_models import PUBLISHED, pull_command
from acestep_consumer.engine.renderer.quantization import (
    QuantizationUnavailable,
    config_json,
    weight_bytes,
)
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.torchao_checkpoints import INSTALL, quantized_by_torchao

_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
_CPU_CACHE_GB = 2.0
_Name = Literal["vllm", "pt"]

log = structlog.get_logger()


class LmUnusable(Exception):
    """The language model cannot be loaded with these settings; the message says why and what to do."""


class DeviceCrowded(Exception):
    """vLLM could not start while the renderer may have been loading: it can after it, in another process."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backend with its tokenizer, and the report for the worker."""

    backend: Backend
    tokens: LmTokens
    report: PlannerReport


class OffloadedBackend:
    """Keeps the idle model in RAM, so that the renderer has the device to itself. Implements ``Backend``.

    Loads the model on ``device`` for the first sequence, and offloads it after the last.

    ``open_backend`` makes the actual backend once the model is loaded; it is dropped with all that it holds on the
    device. A move takes a few tenths of a second, the transfer of the weights.
    """

    def __init__(self, model: Any, device: torch.device, open_backend: Callable[[], Backend]) -> None:
        self._model = model
        self._device = device
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self._model.to("cpu")

    @property
    def idle(self) -> bool:
        """Whether there is nothing to generate."""
        return self._backend is None

    @property
    def songs(self) -> int | None:
        """Only memory bounds the batch, as in every backend that can be offloaded."""
        return None

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for memory."""
        return 0 if self._backend is None else self._backend.waiting

    def add(self, sequence_id: int, generation: Generation) -> None:
        """Add a sequence, and load the model if it is offloaded."""
        if self._backend is None:
            self._model.to(self._device)
            self._backend = self._open_backend()
        self._backend.add(sequence_id, generation)

    def drop(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored."""
        if self._backend is not None:
            self._backend.drop(sequence_id)
            self._offload_if_idle()

    def step(self) -> Sequence[SequenceOutput]:
        """Generate the next token of every sequence. Returns the progress of those that moved."""
        if self._backend is None:
            return ()
        outputs = self._backend.step()
        self._offload_if_idle()
        return outputs

    def _offload_if_idle(self) -> None:
        if self._backend is not None and self._backend.idle:
            self._backend = None
            self._model.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def import_backend(configure: ConfigurePlanner) -> None:
    """Import vLLM if it may be used, before anything is loaded."""
    if configure.backend != "pt" and not configure.offload:
        from acestep_consumer.engine.planner import vllm_engine  # noqa: PLC0415 - only where it is wanted

        with suppress(vllm_engine.VllmUnavailable):  # loading says why
            vllm_engine.prepare()


def load(configure: ConfigurePlanner) -> Loaded:
    """Load the model on the requested backend, or on the first that works.

    Raises:
        LmUnusable: no model, no tokenizer, or no backend.
        DeviceCrowded: vLLM cannot start beside another engine that is starting.
    """
    folder = find(configure.model, configure.checkpoint_dir)
    device = _device(configure.device)
    if quantized_by_torchao(folder) and find_spec("torchao") is None:
        raise LmUnusable(f"{folder.name} is quantized by torchao, which is missing: {INSTALL}")
    try:
        tokens = LmTokens.load(folder)
    except TokenizerUnfit as error:
        raise LmUnusable(str(error)) from error
    candidates: tuple[_Name, ...] = (configure.backend,) if configure.backend else ("vllm", "pt")
    reasons: list[str] = []
    for name in candidates:
        try:
            backend = _OPEN[name](configure, folder, tokens, device)
        except LmUnusable as error:
            reasons.append(f"{name}: {error}")
            continue
        warnings = tuple(map(_fell_back, reasons))
        report = PlannerReport(model=folder.name, backend=name, songs=backend.songs, warnings=warnings)
        return Loaded(backend, tokens, report)
    raise LmUnusable(f"{folder.name} cannot be loaded. {'; '.join(reasons)}")


def find(model: str, checkpoint_dir: Path | None) -> Path:
    """Find the model's folder: that path, then that name in ``checkpoint_dir``, then the hub.

    Raises:
        LmUnusable: it is in none of them.
    """
    try:
        place = resolve(model, checkpoint_dir)
    except LmNotFound as error:
        raise LmUnusable(str(error)) from error
    return place.folder or _fetched(place.hub_id or model, checkpoint_dir)


def _fetched(hub_id: str, checkpoint_dir: Path | None) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES)))
    except Exception as error:
        name = hub_id.rpartition("/")[2]
        pull = f" ({pull_command(name, checkpoints=checkpoint_dir)})" if name in PUBLISHED else ""
        raise LmUnusable(
            f"language model {hub_id} is not on the disk and cannot be downloaded ({type(error).__name__}): put it "
            f"into ACESTEP_CHECKPOINT_DIR{pull}, or set ACESTEP_LM_MODEL_PATH; ACESTEP_INIT_LLM=false runs without it"
        ) from error


def _open_vllm(configure: ConfigurePlanner, folder: Path, tokens: LmTokens, device: torch.device) -> Backend:
    from acestep_consumer.engine.planner.vllm_backend import open_vllm  # noqa: PLC0415 - only where it is wanted
    from acestep_consumer.engine.planner.vllm_engine import EngineSize, VllmUnavailable  # noqa: PLC0415

    if configure.offload:
        raise LmUnusable("ACESTEP_LM_OFFLOAD_TO_CPU works with ACESTEP_LM_BACKEND=pt only")
    try:
        on_gpu = device.type == "cuda"
        size = (
            EngineSize.on_gpu(configure.memory_gb, AutoConfig.from_pretrained(folder))
            if on_gpu
            else EngineSize(memory_gb=_CPU_CACHE_GB)
        )
        options: dict[str, Any] = {"dtype": _dtype_name(device), "beside": on_gpu and configure.beside}
        if configure.quantization is not None and not quantized_by_torchao(folder):
            options["torchao"] = config_json()
        return open_vllm(str(folder), tokens.tokenizer, _codes(tokens), size, compiled=on_gpu, **options)
    except (VllmUnavailable, QuantizationUnavailable) as error:
        raise LmUnusable(_first_line(error)) from error
    except Exception as error:  # a version with another interface, a device that it cannot use, too little memory
        if configure.beside:
            raise DeviceCrowded(_first_line(error)) from error
        log.warning("vLLM does not start", exc_info=error)
        raise LmUnusable(f"vLLM does not start: {_first_line(error)}") from error


def _open_transformers(configure: ConfigurePlanner, folder: Path, tokens: LmTokens, device: torch.device) -> Backend:
    from acestep_consumer.engine.planner.transformers_backend import TransformersBackend, masks_for  # noqa: PLC0415
    from acestep_consumer.engine.planner.transformers_backend import load as load_model  # noqa: PLC0415

    try:
        with quietly():
            model = load_model(str(folder), str(device), getattr(torch, _dtype_name(device)), configure.quantization)
    except (OSError, ValueError, RuntimeError, QuantizationUnavailable) as error:
        raise LmUnusable(_first_line(error)) from error
    cache = _cache_tokens(model, configure.memory_gb if device.type == "cuda" else None)
    masks = masks_for(model, tokens.tokenizer)

    def open_backend() -> Backend:
        return TransformersBackend(model, tokens.tokenizer, _codes(tokens), cache_tokens=cache, masks=masks)

    return OffloadedBackend(model, device, open_backend) if configure.offload else open_backend()


_OPEN: Mapping[str, Callable[[ConfigurePlanner, Path, LmTokens, torch.device], Backend]] = {
    "vllm": _open_vllm,
    "pt": _open_transformers,
}


def _cache_tokens(model: Any, memory_gb: float | None) -> int:
    """Return the number of tokens whose keys and values fit beside the weights."""
    config = model.config
    weights = weight_bytes(model)
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    free_bytes = _CPU_CACHE_GB * 1e9 if memory_gb is None else memory_gb * 1e9 - weights
    if free_bytes < each * 2048:
        raise LmUnusable(f"{memory_gb:g} GB are too little for a song beside the weights, {weights / 1e9:.1f} GB")
    return int(free_bytes // each)


def _codes(tokens: LmTokens) -> range:
    return range(tokens.first_code, tokens.first_code + tokens.code_count)


def _device(requested: str) -> torch.device:
    if requested.strip().lower() != "auto":
        return torch.device(requested)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _dtype_name(device: torch.device) -> str:
    return "bfloat16" if device.type in ("cuda", "xpu") else "float32"


def _fell_back(reason: str) -> str:
    return f"the language model does not run on the preferred backend; {reason}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
