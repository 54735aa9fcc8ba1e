# SPDX-License-Identifier: Apache-2.0
"""Routes about the server: ``/health``, models, statistics, and those that make no sense over a queue."""

import time
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from acestep_consumer.gateway.answers import envelope, problem, soft_error
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.bodies import read_fields
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.gateway.tasks import TaskStates
from acestep_consumer.gateway.worker_list import WorkerList, task_types_of

PREFIX: Final = "acestep/"

_BODY_BYTES: Final = 1 << 20
_SLOTS: Final = frozenset({1, 2, 3})
_CONTEXT_LENGTH: Final = 4096
_LONGEST_S: Final = 600
_CREATED: Final = int(time.time())

_INSTEAD: Final = {
    "lora": "workers keep no LoRA between tasks: use the field lora of /release_task",
    "models": "models belong to the workers, which load them when they start: see ACESTEP_CONFIG_PATH",
    "training": "workers make songs alone: train on a machine of its own, and use the field lora of /release_task",
    "transcribe": "use /release_task with full_analysis_only and the audio as src_audio",
}


class ModelRoutes:
    """Routes around models and the state of the server.

    Args:
        keys: checks keys.
        workers: the workers that were heard of.
        tasks: counts tasks.
        session: knows the queue's length.
        queue_maxsize: the queue's limit.
    """

    def __init__(
        self, keys: ApiKeyCheck, workers: WorkerList, tasks: TaskStates, session: BrokerSession, *, queue_maxsize: int
    ) -> None:
        self._keys = keys
        self._workers = workers
        self._tasks = tasks
        self._session = session
        self._queue_maxsize = queue_maxsize

    async def health(self, _: web.Request) -> web.Response:
        """Tell that the server is there, whatever else is not."""
        return envelope({"status": "ok", "service": "ACE-Step API", "version": "1.0", **self._loaded()})

    async def live(self, _: web.Request) -> web.Response:
        """Answer 200 as long as the event loop runs."""
        return web.json_response({"status": "alive"})

    async def ready(self, _: web.Request) -> web.Response:
        """Tell whether requests can be accepted."""
        up = self._session.is_up
        body = {"status": "ready" if up else "not ready", "checks": {"broker": up}}
        return web.json_response(body, status=HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE)

    async def models(self, request: web.Request) -> web.Response:
        """List the models as OpenRouter does."""
        self._keys.by_header(request)
        return web.json_response({"object": "list", "data": [_listed(name) for name in self._workers.models]})

    async def inventory(self, request: web.Request) -> web.Response:
        """List the models with their task types, and the language models."""
        self._keys.by_header(request)
        return envelope(self._inventory())

    async def stats(self, request: web.Request) -> web.Response:
        """Tell the state of the queue, and count tasks since this replica started."""
        self._keys.by_header(request)
        running = max(self._tasks.running, self._workers.running)
        queued, ended = self._session.queue_size, self._tasks.counts
        jobs = {"queued": queued, "running": running, "succeeded": ended["succeeded"], "failed": ended["failed"]}
        return envelope(
            {
                "jobs": {"total": sum(jobs.values()), **jobs},
                "queue_size": queued,
                "queue_maxsize": self._queue_maxsize,
                "avg_job_seconds": self._tasks.average_s,
            }
        )

    async def init(self, request: web.Request) -> web.Response:
        """Answer whether a worker serves a model. Nothing is loaded."""
        self._keys.by_header(request)
        body = await read_fields(request, _BODY_BYTES) if request.body_exists else {}
        if _slot(body.get("slot", 1)) not in _SLOTS:
            return soft_error(HTTPStatus.BAD_REQUEST, "slot must be 1, 2 or 3")
        model, lm = str(body.get("model") or ""), str(body.get("lm_model_path") or "")
        missing = self._missing(model.removeprefix(PREFIX), lm, wants_lm=body.get("init_llm") is True)
        if missing is not None:
            return soft_error(HTTPStatus.BAD_REQUEST, f"{missing}: {_INSTEAD['models']}")
        return envelope({"message": "Model initialization completed", **self._inventory(), **self._loaded()})

    async def lora_status(self, request: web.Request) -> web.Response:
        """Tell that no LoRA is loaded: each task brings its own."""
        self._keys.by_header(request)
        return envelope(
            {
                "lora_loaded": False,
                "use_lora": False,
                "lora_scale": 1.0,
                "adapter_type": None,
                "scales": {},
                "active_adapter": None,
                "adapters": [],
                "synthetic_default_mode": False,
            }
        )

    async def no_lora(self, request: web.Request) -> web.Response:
        """Answer 501."""
        return self._not_here(request, "lora")

    async def no_reload(self, request: web.Request) -> web.Response:
        """Answer 501."""
        return self._not_here(request, "models")

    async def no_training(self, request: web.Request) -> web.Response:
        """Answer 501."""
        return self._not_here(request, "training")

    async def no_transcription(self, request: web.Request) -> web.Response:
        """Answer 501."""
        return self._not_here(request, "transcribe")

    def _not_here(self, request: web.Request, subject: str) -> web.Response:
        self._keys.by_header(request)
        return problem(HTTPStatus.NOT_IMPLEMENTED, _INSTEAD[subject])

    def _loaded(self) -> dict[str, Any]:
        models, language_models = self._workers.models, self._workers.language_models
        return {
            "models_initialized": bool(models),
            "llm_initialized": bool(language_models),
            "loaded_model": models[0] if models else None,
            "loaded_lm_model": language_models[0] if language_models else None,
        }

    def _inventory(self) -> dict[str, Any]:
        models, language_models = self._workers.models, self._workers.language_models
        return {
            "models": [
                {
                    "name": name,
                    "is_default": index == 0,
                    "is_loaded": True,
                    "supported_task_types": list(task_types_of(name)),
                }
                for index, name in enumerate(models)
            ],
            "default_model": models[0] if models else None,
            "lm_models": [{"name": name, "is_loaded": True} for name in language_models],
            "loaded_lm_model": language_models[0] if language_models else None,
            "llm_initialized": bool(language_models),
        }

    def _missing(self, model: str, lm: str, *, wants_lm: bool) -> str | None:
        """Return what no worker has of what is asked for; None: all of it is there."""
        if model and model not in self._workers.models:
            return f"no worker serves {model!r}"
        names = {name.rpartition("/")[2] for name in self._workers.language_models}
        if lm and lm.rpartition("/")[2] not in names:
            return f"no worker has the language model {lm!r}"
        return "no worker has a language model" if wants_lm and self._workers.lacks_language_model else None


def _slot(value: object) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


def _listed(name: str) -> dict[str, Any]:
    return {
        "id": PREFIX + name,
        "name": f"ACE-Step {name}",
        "created": _CREATED,
        "input_modalities": ["text", "audio"],
        "output_modalities": ["audio", "text"],
        "context_length": _CONTEXT_LENGTH,
        "max_output_length": _LONGEST_S,
        "pricing": {"prompt": "0", "completion": "0", "request": "0"},
        "description": "Music from text and audio, by ACE-Step 1.5",
        "architecture": {"modality": "text+audio->audio", "input_modalities": ["text", "audio"]},
    }
