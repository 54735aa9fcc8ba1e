# SPDX-License-Identifier: Apache-2.0
"""The API as OpenAPI 3.1, at ``/openapi.json``."""

from functools import cache
from typing import Any, Final

from acestep_schemas.request import request_json_schema

VERSION: Final = "3.1.0"

_JSON: Final = "application/json"
_REQUEST: Final = "GenerationRequest"
_REF: Final = "#/components/schemas/"
_ERRORS: Final = {
    "400": "The request cannot be made; `detail` says why.",
    "401": "The key is missing or wrong.",
    "413": "The body or a file is too large.",
    "429": "The queue is full; `Retry-After` says when to try again.",
    "503": "The queue, the storage or the workers are out of reach for now.",
}


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    return {
        "openapi": VERSION,
        "info": {
            "title": "ACE-Step API over a queue",
            "version": "1.0",
            "description": "ACE-Step 1.5's REST API, by acestep-consumer gateway. Every path may begin with /api.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "ACESTEP_API_KEY"}},
            "schemas": _schemas(),
            "parameters": {
                "task_id": {"name": "task_id", "in": "path", "required": True, "schema": {"type": "string"}},
                "rest": {"name": "rest", "in": "path", "required": True, "schema": {"type": "string"}},
            },
        },
    }


def _paths() -> dict[str, Any]:
    return _task_paths() | _text_paths() | _state_paths() | _absent_paths()


def _task_paths() -> dict[str, Any]:
    release = _operation("Make songs", _enveloped("Accepted"), "400", "401", "413", "429", "503")
    release["requestBody"] = _release_body()
    release["parameters"] = [_header("Idempotency-Key", "The same key is the same task, at every try.")]
    query = _operation("Ask for the state of tasks", _enveloped_list("TaskEntry"), "400", "401")
    query["requestBody"] = _body(
        {
            "task_id_list": {"type": ["array", "string"], "description": "Ids, or JSON text of a list of them."},
            "wait": {"type": "number", "maximum": 60, "description": "Seconds to wait until one of them has ended."},
        }
    )
    audio = _operation("Fetch a song", {"type": "string", "format": "binary"}, "401", content="audio/*")
    texts: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/vtt")}
    audio["responses"]["200"]["content"] |= texts
    audio["parameters"] = [_query("path", "As `file`, `lrc` or `vtt` in a result has it.", required=True)]
    cancel = _operation("Cancel a task", _enveloped("Accepted"), "401", "503")
    cancel["requestBody"] = _body({"task_id": {"type": "string"}})
    lineage = _operation("Read what songs come from, and what comes from them", _enveloped("Family"), "401")
    events = _operation("Follow a task", {"type": "string"}, "401", content="text/event-stream")
    return {
        "/release_task": {"post": release},
        "/query_result": {"post": query},
        "/v1/audio": {"get": audio},
        "/cancel_task": {"post": cancel},
        "/release_task/{task_id}": _with_task({"delete": _operation("Cancel a task", _enveloped("Accepted"), "401")}),
        "/v1/jobs/{task_id}": _with_task({"get": _operation("Read a task and its manifest", _enveloped(), "401")}),
        "/v1/jobs/{task_id}/events": _with_task({"get": events}),
        "/v1/jobs/{task_id}/lineage": _with_task({"get": lineage}),
    }


def _text_paths() -> dict[str, Any]:
    rewrite = _operation("Rewrite caption and lyrics with the language model", _enveloped(), "401", "429", "503")
    text = {"type": "string"}
    rewrite["requestBody"] = _body({"prompt": text, "lyrics": text, "temperature": {"type": "number"}, "param_obj": {}})
    create = _operation("Write a song's texts from a description", _enveloped(), "401", "429", "503")
    flag = {"type": "boolean"}
    create["requestBody"] = _body({"query": text, "instrumental": flag, "vocal_language": text})
    example = _operation("Get an example", _enveloped(), "401")
    example["requestBody"] = _body({"sample_type": {"type": "string"}})
    chat = _operation("Make a song in a chat", {"type": "object"}, "400", "401", "429", "503")
    chat["requestBody"] = _body({"model": text, "messages": {"type": "array"}, "stream": flag}, "messages")
    return {
        "/create_random_sample": {"post": example},
        "/format_input": {"post": rewrite},
        "/v1/create_sample": {"post": create},
        "/v1/chat/completions": {"post": chat},
    }


def _state_paths() -> dict[str, Any]:
    init = _operation("Ask whether a worker serves a model", _enveloped(), "401")
    init["requestBody"] = _body({"model": {"type": "string"}, "slot": {"type": "integer"}})
    anything: dict[str, Any] = {"type": "object"}
    return {
        "/health": {"get": _open(_operation("Whether the server is there", _enveloped()))},
        "/healthz": {"get": _open(_operation("Liveness", anything))},
        "/readyz": {"get": _open(_operation("Readiness", anything, "503"))},
        "/v1/models": {"get": _operation("List models as OpenRouter does", anything, "401")},
        "/v1/model_inventory": {"get": _operation("List models and their task types", _enveloped(), "401")},
        "/v1/stats": {"get": _operation("Count tasks", _enveloped(), "401")},
        "/v1/init": {"post": init},
        "/v1/lora/status": {"get": _operation("No LoRA is ever loaded", _enveloped(), "401")},
        "/metrics": {"get": _operation("Metrics for Prometheus", {"type": "string"}, "401", content="text/plain")},
        "/openapi.json": {"get": _operation("This document", anything, "401")},
    }


def _absent_paths() -> dict[str, Any]:
    """Routes of ACE-Step's server that make no sense over a queue."""
    absent = {
        "summary": "Not here; `detail` says what to do instead",
        "responses": {
            "501": _response("Not implemented", "ApiProblem"),
            "401": _response(_ERRORS["401"], "ApiProblem"),
        },
    }
    posts = ("lora/load", "lora/unload", "lora/toggle", "lora/scale", "reinitialize", "transcribe")
    rest = [{"$ref": "#/components/parameters/rest"}]
    return {f"/v1/{name}": {"post": absent} for name in posts} | {
        f"/v1/{name}/{{rest}}": {"get": absent, "post": absent, "parameters": rest} for name in ("training", "dataset")
    }


def _operation(summary: str, schema: dict[str, Any], *errors: str, content: str = _JSON) -> dict[str, Any]:
    done = {"description": "Done", "content": {content: {"schema": schema}}}
    return {
        "summary": summary,
        "responses": {"200": done} | {code: _response(_ERRORS[code], "ApiProblem") for code in errors},
    }


def _open(operation: dict[str, Any]) -> dict[str, Any]:
    return operation | {"security": [{}]}


def _with_task(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"parameters": [{"$ref": "#/components/parameters/task_id"}]}


def _response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": {"$ref": _REF + schema}}}}


def _enveloped(schema: str | None = None) -> dict[str, Any]:
    return _around({"$ref": _REF + schema} if schema else {})


def _enveloped_list(schema: str) -> dict[str, Any]:
    return _around({"type": "array", "items": {"$ref": _REF + schema}})


def _around(data: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": [{"$ref": _REF + "ApiEnvelope"}, {"type": "object", "properties": {"data": data}}]}


def _body(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"content": {_JSON: {"schema": schema}}}


def _release_body() -> dict[str, Any]:
    ref = {"$ref": _REF + _REQUEST}
    audio = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {"allOf": [ref, {"type": "object", "properties": {"src_audio": audio, "reference_audio": audio}}]}
    return {
        "required": True,
        "description": "All other names and forms that ACE-Step's server reads are read, too.",
        "content": {
            _JSON: {"schema": ref},
            "application/x-www-form-urlencoded": {"schema": ref},
            "multipart/form-data": {"schema": form},
        },
    }


def _header(name: str, about: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": about, "schema": {"type": "string", "maxLength": 255}}


def _query(name: str, about: str, *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": about, "required": required, "schema": {"type": "string"}}


def _schemas() -> dict[str, Any]:
    request = {name: value for name, value in request_json_schema().items() if name not in ("$schema", "$defs")}
    # In a request of this API, further fields are no error.
    request.pop("additionalProperties", None)
    text, number = {"type": "string"}, {"type": "integer"}
    return {
        **_moved(request_json_schema().get("$defs", {})),
        _REQUEST: _moved(request),
        "ApiEnvelope": {
            "type": "object",
            "required": ["data", "code", "error", "timestamp", "extra"],
            "properties": {
                "data": {},
                "code": number,
                "error": {"type": ["string", "null"]},
                "timestamp": number,
                "extra": {"type": "null"},
            },
        },
        "ApiProblem": {
            "type": "object",
            "required": ["detail", "error"],
            "properties": {"detail": text, "error": text},
        },
        "Accepted": {
            "type": "object",
            "required": ["task_id", "status"],
            "properties": {"task_id": text, "status": text, "queue_position": {"type": "integer", "minimum": 1}},
        },
        "Family": {
            "type": "object",
            "required": ["task_id", "complete", "tasks"],
            "properties": {
                "task_id": text,
                "complete": {"type": "boolean", "description": "Whether these are all."},
                "tasks": {
                    "type": "array",
                    "description": "Oldest first. `songs` as in `file`; `parents` name task, index and field of each.",
                    "items": {"type": "object", "required": ["task_id", "found", "songs", "parents"]},
                },
            },
        },
        "TaskEntry": {
            "type": "object",
            "required": ["task_id", "result", "status"],
            "properties": {
                "task_id": {},
                "result": {"type": "string", "contentMediaType": _JSON, "description": "JSON text of a list of songs."},
                "status": {"enum": [0, 1, 2], "description": "0 waits or runs, 1 succeeded, 2 failed."},
                "progress_text": text,
            },
        },
    }


def _moved(schema: Any) -> Any:
    """Return a schema whose references point to where the schemas are in this document."""
    if isinstance(schema, dict):
        return {
            name: value.replace("#/$defs/", _REF) if name == "$ref" and isinstance(value, str) else _moved(value)
            for name, value in schema.items()
        }
    return [_moved(part) for part in schema] if isinstance(schema, list) else schema
