# SPDX-License-Identifier: Apache-2.0
"""The AsyncAPI 3.0 document: exchanges, queues, operations and messages. Made from the models.

It describes the worker, which *receives* requests and *sends* events; a producer or subscriber does the opposite.
Arguments of queues, for which AMQP bindings have no field, are in ``x-arguments``.
"""

from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from acestep_schemas import examples
from acestep_schemas.events import CONTENT_TYPE, CloudEvent, JobState, WorkerEvent
from acestep_schemas.request import TASK_ID_PATTERN, GenerationRequest, add_aliases

BINDING_VERSION: Final = "0.3.0"
Json = dict[str, Any]

EXCHANGES: Final[dict[str, str]] = {
    "acestep.requests": "topic",
    "acestep.events": "topic",
    "acestep.control": "topic",
    "acestep.dead-letter": "fanout",
    "acestep.events.unrouted": "fanout",
}
"""The durable exchanges and their types."""

_REQUEST: Final[tuple[type[BaseModel], JsonSchemaMode]] = (GenerationRequest, "validation")
_TRACE_HEADERS: Final[Json] = {
    "type": "object",
    "properties": {
        "traceparent": {"type": "string", "description": "W3C trace context; the worker's spans continue it."}
    },
}
_TASK: Final[Json] = {"description": f"The task id: {TASK_ID_PATTERN}"}
_TIER: Final[Json] = {"description": "The name of a tier in the tier table, such as tier6."}
_SUMMARIES: Final = {
    JobState.STARTED: "A worker has begun the job, and the limits of its GPU's tier have been applied.",
    JobState.PROGRESS: "Progress of the job: at most two a second, may be lost, never after the terminal event.",
    JobState.COMPLETED: "Terminal: the songs are in S3. The same data is in the manifest beside them.",
    JobState.FAILED: "Terminal: the job was started and could not be finished.",
    JobState.REJECTED: "Terminal: the job was not started, because the request is at fault.",
    JobState.CANCELLED: "Terminal: somebody asked for the job to stop.",
    JobState.EXPIRED: "Terminal: the request waited longer than its deadline allows.",
}
_WORKER_SUMMARY: Final = "A worker is ready, drains (takes no new jobs) or has stopped."


def asyncapi() -> Json:
    """Return the document as JSON data."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "acestep-consumer",
            "version": "1.0.0",
            "description": "ACE-Step 1.5 music generation behind RabbitMQ: requests in, songs in S3, events out.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"broker": {"host": "localhost:5672", "protocol": "amqp", "protocolVersion": "0.9.1"}},
        "channels": _channels(),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channels() -> Json:
    return {
        "requests": {
            "address": "generate",
            "description": "Publish here with confirms on and mandatory set. A nack means that the queue is full.",
            "messages": _refs("components", "request"),
            "bindings": _routed("acestep.requests"),
        },
        "jobEvents": {
            "address": "job.{state}.{taskId}",
            "description": "Events of jobs. Bind a queue with job.#, job.*.ID or job.completed.*.",
            "parameters": {"state": {"enum": [str(state) for state in JobState]}, "taskId": _TASK},
            "messages": _refs("components", *map(str, JobState)),
            "bindings": _routed("acestep.events"),
        },
        "workerEvents": {
            "address": "worker.{state}.{workerId}",
            "description": _WORKER_SUMMARY,
            "parameters": {
                "state": {"enum": ["ready", "draining", "stopped"]},
                "workerId": {"description": "The worker's name."},
            },
            "messages": _refs("components", "worker"),
            "bindings": _routed("acestep.events"),
        },
        "cancellations": {
            "address": "cancel.{taskId}",
            "description": "Asks for a job to stop, waiting or running.",
            "parameters": {"taskId": _TASK},
            "messages": _refs("components", "cancel"),
            "bindings": _routed("acestep.control"),
        },
        "tierCalls": {
            "address": "tier.{tier}",
            "description": "Between workers that forward requests to larger GPUs (ACESTEP_ROUTE_BY_TIER): a mandatory "
            "publish is returned when the tier has no worker, and else makes its workers look at the tier's queue.",
            "parameters": {"tier": _TIER},
            "messages": _refs("components", "tierCall"),
            "bindings": _routed("acestep.control"),
        },
        "replies": {
            "address": None,
            "description": "The queue that a request's reply_to names: it gets the terminal event as well.",
            "messages": _refs("components", *_terminal()),
        },
        **_queues(),
    }


def _queues() -> Json:
    return {
        "generateQueue": _queue(
            "acestep.generate",
            "Requests that wait for a worker. Its limit is ACESTEP_QUEUE_MAXSIZE.",
            ("request",),
            {"x-overflow": "reject-publish", "x-dead-letter-exchange": "acestep.dead-letter"},
        ),
        "tierQueue": _queue(
            "acestep.generate.{tier}",
            "Requests that a worker forwarded to larger GPUs (ACESTEP_ROUTE_BY_TIER): bytes, id, priority "
            "and deadline as they came. Its limit is ACESTEP_QUEUE_MAXSIZE too. Producers do not publish here.",
            ("request",),
            {"x-overflow": "reject-publish", "x-dead-letter-exchange": "acestep.dead-letter"},
            {"tier": _TIER},
        ),
        "deadLetterQueue": _queue(
            "acestep.dead-letter", "Requests that could not be run: bytes and headers as they came.", ("request",), {}
        ),
        "unroutedQueue": _queue(
            "acestep.events.unrouted",
            "Events for which no queue was bound; the last ones are kept.",
            (*map(str, JobState), "worker"),
            {"x-max-length": 10_000, "x-overflow": "drop-head"},
        ),
    }


def _operations() -> Json:
    return {
        "generate": {
            "action": "receive",
            "channel": _ref("channels", "requests"),
            "summary": "Generate the songs of a request.",
            "description": "Acked after the terminal event is confirmed, which is after the songs are stored.",
            "messages": [_ref("channels", "requests", "messages", "request")],
            "reply": {
                "address": {"location": "$message.header#/reply_to"},
                "channel": _ref("channels", "replies"),
                "messages": [_ref("channels", "replies", "messages", state) for state in _terminal()],
            },
            "bindings": _amqp(deliveryMode=2, mandatory=True, timestamp=True, ack=True),
        },
        "publishJobEvent": {
            "action": "send",
            "channel": _ref("channels", "jobEvents"),
            "summary": "Publish an event of a job; each accepted request gets exactly one terminal event.",
            "messages": [_ref("channels", "jobEvents", "messages", str(state)) for state in JobState],
            "bindings": _amqp(mandatory=True, timestamp=True),
        },
        "publishWorkerEvent": {
            "action": "send",
            "channel": _ref("channels", "workerEvents"),
            "summary": "Announce that this worker is ready, drains or has stopped.",
            "messages": [_ref("channels", "workerEvents", "messages", "worker")],
            "bindings": _amqp(deliveryMode=2, mandatory=True, timestamp=True),
        },
        "cancel": {
            "action": "receive",
            "channel": _ref("channels", "cancellations"),
            "summary": "Stop a job; it ends as cancelled unless it ends otherwise first.",
            "messages": [_ref("channels", "cancellations", "messages", "cancel")],
            "bindings": _amqp(deliveryMode=2, mandatory=True, timestamp=True),
        },
    }


def _messages() -> Json:
    kinds = {_name(kind): (kind, event) for kind, event in examples.events().items()}
    return {
        "request": {
            "name": "request",
            "title": "Generation request",
            "summary": "Any body that ACE-Step's POST /release_task accepts; the schema has the canonical names, and "
            "the other ones in x-aliases. The properties message_id, correlation_id, reply_to, priority, "
            "expiration, timestamp and content_encoding (gzip, deflate) are read.",
            "contentType": "application/json",
            "headers": _TRACE_HEADERS,
            "correlationId": {"location": "$message.header#/correlation_id"},
            "payload": _ref("components", "schemas", _request_name()),
            "examples": [
                {"name": "song", "payload": examples.REQUEST},
                {"name": "repaint", "payload": examples.REPAINT},
            ],
        },
        "cancel": {
            "name": "cancel",
            "title": "Cancellation",
            "summary": "No body. The property timestamp says when it was asked for.",
        },
        "tierCall": {
            "name": "tierCall",
            "title": "Notification of a tier",
            "summary": "No body.",
        },
        **{name: _event_message(name, kind, event) for name, (kind, event) in kinds.items()},
    }


def _event_message(name: str, kind: type[CloudEvent], event: CloudEvent) -> Json:
    data = event.model_dump(mode="json")
    of_worker = kind is WorkerEvent
    others = examples.more_events().get(kind, {})
    more = [{"name": other, "payload": each.model_dump(mode="json")} for other, each in others.items()]
    binding = (
        {} if of_worker else {"bindings": {"amqp": {"messageType": data["type"], "bindingVersion": BINDING_VERSION}}}
    )
    return {
        "name": "acestep.worker" if of_worker else data["type"],
        "title": kind.__name__,
        "summary": _WORKER_SUMMARY if of_worker else _SUMMARIES[JobState(name)],
        "contentType": CONTENT_TYPE,
        "correlationId": {"location": "$message.header#/correlation_id"},
        "payload": _ref("components", "schemas", kind.__name__),
        **binding,
        "examples": [{"name": name, "payload": data}, *more],
    }


def _schemas() -> Json:
    """Return the models and their parts: the request as it is validated, all others as they are sent."""
    sent: list[tuple[type[BaseModel], JsonSchemaMode]] = [(kind, "serialization") for kind in examples.events()]
    _, found = models_json_schema([_REQUEST, *sent], ref_template="#/components/schemas/{model}")
    schemas: Json = found["$defs"]
    add_aliases(schemas[_request_name()])
    return dict(sorted(schemas.items()))


def _request_name() -> str:
    """Return the request's name among the schemas, which differs where its two forms (valid, sent) differ."""
    as_sent: tuple[type[BaseModel], JsonSchemaMode] = (GenerationRequest, "serialization")
    names, _ = models_json_schema([_REQUEST, as_sent])
    return str(names[_REQUEST]["$ref"]).rpartition("/")[2]


def _queue(
    name: str, description: str, messages: tuple[str, ...], arguments: Json, parameters: Json | None = None
) -> Json:
    queue = {"name": name, "durable": True, "exclusive": False, "autoDelete": False, "vhost": "/"}
    return {
        "address": name,
        "description": description,
        **({"parameters": parameters} if parameters else {}),
        "messages": _refs("components", *messages),
        "bindings": {"amqp": {"is": "queue", "queue": queue, "bindingVersion": BINDING_VERSION}},
        "x-arguments": arguments,
    }


def _routed(exchange: str) -> Json:
    about = {"name": exchange, "type": EXCHANGES[exchange], "durable": True, "autoDelete": False, "vhost": "/"}
    return {"amqp": {"is": "routingKey", "exchange": about, "bindingVersion": BINDING_VERSION}}


def _amqp(**fields: object) -> Json:
    return {"amqp": {**fields, "bindingVersion": BINDING_VERSION}}


def _refs(root: str, *messages: str) -> Json:
    return {name: _ref(root, "messages", name) for name in messages}


def _ref(*path: str) -> Json:
    return {"$ref": "#/" + "/".join(path)}


def _name(kind: type[CloudEvent]) -> str:
    return "worker" if kind is WorkerEvent else kind.__name__.removeprefix("Job").lower()


def _terminal() -> list[str]:
    return [str(state) for state in JobState if state.terminal]
