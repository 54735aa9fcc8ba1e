# SPDX-License-Identifier: Apache-2.0
"""KEDA's two kinds as JSON Schemas: the fields that its documentation and custom resource definitions publish (2.17).

Not copies of those definitions: the fields that matter here, closed, so that a misspelt one is noticed. What KEDA hands
on to Kubernetes unread (``behavior``) is checked by Kubernetes' own schema; see ``autoscaler_of``.
"""

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_POSITIVE = {"type": "integer", "minimum": 1}


def _object(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = _object(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)

_TRIGGER = _object(
    ("type", "metadata"),
    type={"const": "rabbitmq"},
    name=_TEXT,
    metricType={"enum": ["AverageValue", "Value"]},
    useCachedMetrics={"type": "boolean"},
    authenticationRef=_object(
        ("name",), name=_TEXT, kind={"enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"]}
    ),
    # All of a scaler's metadata are strings, numbers too: that is the easiest mistake to make.
    metadata=_object(
        ("queueName", "mode", "value"),
        protocol={"enum": ["auto", "amqp", "http"]},
        queueName=_TEXT,
        vhostName=_TEXT,
        mode={
            "enum": [
                "QueueLength",
                "MessageRate",
                "DeliverGetRate",
                "PublishedToDeliveredRatio",
                "ExpectedQueueConsumptionTime",
            ]
        },
        value={"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
        activationValue={"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
        excludeUnacknowledged={"enum": ["true", "false"]},
        host=_TEXT,
        hostFromEnv=_TEXT,
        usernameFromEnv=_TEXT,
        passwordFromEnv=_TEXT,
        useRegex={"enum": ["true", "false"]},
        pageSize=_TEXT,
        operation={"enum": ["sum", "avg", "max"]},
        timeout=_TEXT,
        unsafeSsl={"enum": ["true", "false"]},
    ),
)

SCALED_OBJECT = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ScaledObject"},
    metadata=_METADATA,
    spec=_object(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=_object(("name",), apiVersion=_TEXT, kind=_TEXT, name=_TEXT, envSourceContainerName=_TEXT),
        pollingInterval=_POSITIVE,
        cooldownPeriod=_COUNT,
        initialCooldownPeriod=_COUNT,
        idleReplicaCount={"const": 0},
        minReplicaCount=_COUNT,
        maxReplicaCount=_POSITIVE,
        fallback=_object(
            ("failureThreshold", "replicas"),
            failureThreshold=_POSITIVE,
            replicas=_COUNT,
            behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
        ),
        advanced=_object(
            restoreToOriginalReplicaCount={"type": "boolean"},
            horizontalPodAutoscalerConfig=_object(name=_TEXT, behavior={"type": "object"}),
            scalingModifiers={"type": "object"},
        ),
        triggers={"type": "array", "minItems": 1, "items": _TRIGGER},
    ),
)

TRIGGER_AUTHENTICATION = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "TriggerAuthentication"},
    metadata=_METADATA,
    spec=_object(
        ("secretTargetRef",),
        secretTargetRef={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ("parameter", "name", "key"),
                # What the rabbitmq scaler reads from an authentication.
                parameter={
                    "enum": ["host", "protocol", "vhostName", "username", "password", "tls", "ca", "cert", "key"]
                },
                name=_TEXT,
                key=_TEXT,
            ),
        },
    ),
)

SCHEMAS = {"ScaledObject": SCALED_OBJECT, "TriggerAuthentication": TRIGGER_AUTHENTICATION}


def autoscaler_of(scaled: dict[str, Any]) -> dict[str, Any]:
    """Return the Kubernetes autoscaler that KEDA makes of a ScaledObject with one trigger."""
    spec = scaled["spec"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec["scaleTargetRef"]["name"]}
    trigger = spec["triggers"][0]
    metric = {
        "type": "External",
        "external": {
            "metric": {"name": "s0-rabbitmq"},
            "target": {"type": trigger["metricType"], "averageValue": trigger["metadata"]["value"]},
        },
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"keda-hpa-{scaled['metadata']['name']}"},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": max(1, spec["minReplicaCount"]),
            "maxReplicas": spec["maxReplicaCount"],
            "metrics": [metric],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }
