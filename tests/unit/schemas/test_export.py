# SPDX-License-Identifier: Apache-2.0
"""The documents follow the code, describe what is sent, and agree with what is declared on the broker."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from acestep_consumer.broker.topology import CONTROL, EVENTS, GENERATE, REQUESTS, TIER, Topology, tier_queue, topology
from acestep_consumer.config.settings import BrokerSettings
from acestep_schemas import examples
from acestep_schemas.asyncapi import EXCHANGES, asyncapi
from acestep_schemas.events import CloudEvent, parse_event
from acestep_schemas.export import documents, event_schema, manifest_schema, write
from acestep_schemas.request import GenerationRequest, request_json_schema

COMMITTED = Path(__file__).parents[3] / "schemas"
DOCUMENT = asyncapi()
CHANNELS: dict[str, Any] = DOCUMENT["channels"]
EXAMPLES = [*examples.events().values(), *(each for more in examples.more_events().values() for each in more.values())]
# Made once: they take a second.
DOCUMENTS = documents()


def declared() -> Topology:
    settings = BrokerSettings.model_validate({"urls": "amqp://localhost/"})
    return topology(settings)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_committed_copy_is_what_the_code_says(name: str) -> None:
    """When this fails: ``acestep-consumer schema export schemas``."""
    assert (COMMITTED / name).read_text(encoding="utf-8") == DOCUMENTS[name]


def test_no_document_is_left_over() -> None:
    kept = {path.name for path in COMMITTED.glob("*.json")}
    assert kept == set(DOCUMENTS)


def test_export_makes_the_folder_and_returns_what_it_wrote(tmp_path: Path) -> None:
    paths = write(tmp_path / "new" / "folder")
    assert {path.name: path.read_text(encoding="utf-8") for path in paths} == DOCUMENTS


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith(".schema.json")])
def test_every_schema_is_a_valid_one(name: str) -> None:
    Draft202012Validator.check_schema(json.loads(DOCUMENTS[name]))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: f"{type(event).__name__} {event.subject}")
def test_every_example_event_is_valid_in_the_union_and_in_its_own_schema(event: CloudEvent) -> None:
    body = json.loads(event.to_json())
    Draft202012Validator(event_schema()).validate(body)
    (own,) = (
        schema
        for name, text in DOCUMENTS.items()
        if name.startswith(("job.", "worker.")) and (schema := json.loads(text))["title"] == type(event).__name__
    )
    Draft202012Validator(own).validate(body)
    assert parse_event(event.to_json()) == event


def test_example_requests_and_manifests_of_both_kinds_are_valid() -> None:
    for request in (examples.REQUEST, examples.REPAINT):
        Draft202012Validator(request_json_schema()).validate(request)
    manifests = Draft202012Validator(manifest_schema())
    manifests.validate(examples.completed().data.model_dump(mode="json"))
    manifests.validate(examples.unfinished("failed").data.model_dump(mode="json"))


def test_a_body_that_breaks_a_rule_is_not_valid() -> None:
    assert list(Draft202012Validator(request_json_schema()).iter_errors({"batch_size": 0}))
    assert list(Draft202012Validator(event_schema()).iter_errors({"type": "acestep.job.completed.v1"}))


def test_an_example_shows_a_song_from_a_song_with_its_files_lyrics_scores_and_what_was_taken_over() -> None:
    names = [each["name"] for each in DOCUMENT["components"]["messages"]["completed"]["examples"]]
    assert names == ["completed", "repaint"]
    data = examples.repainted().data
    assert data.parents
    assert data.edits
    assert [each.index for each in data.candidates] == [None, 0]
    (audio,) = data.audios
    assert audio.files is not None
    assert all((audio.files.lrc, audio.files.vtt, audio.files.latents, audio.lyrics, audio.lyric_score, audio.loudness))
    # What the request did not give was taken over from its source, and nothing else.
    given = {edit.field: edit.value for edit in data.edits}
    assert data.request == GenerationRequest.model_validate({**examples.REPAINT, **given})


@pytest.mark.parametrize("message", DOCUMENT["components"]["messages"].values(), ids=lambda message: message["name"])
def test_every_message_example_is_valid_by_the_documents_own_schemas(message: dict[str, Any]) -> None:
    for example in message.get("examples", ()):
        schema = {**message["payload"], "components": DOCUMENT["components"]}
        Draft202012Validator(schema).validate(example["payload"])


def test_exchanges_are_those_that_the_worker_declares() -> None:
    assert {exchange.name: exchange.type for exchange in declared().exchanges} == EXCHANGES
    described = [binding["exchange"] for binding in amqp_bindings() if "exchange" in binding]
    assert {exchange["name"]: exchange["type"] for exchange in described} == {
        name: EXCHANGES[name] for name in (REQUESTS, EVENTS, CONTROL)
    }


def test_queues_and_their_arguments_are_those_that_the_worker_declares() -> None:
    queues = {queue.name: queue.arguments for queue in declared().with_tiers(["{tier}"]).queues}
    described = {
        channel["address"]: channel["x-arguments"] for channel in CHANNELS.values() if "x-arguments" in channel
    }
    assert described.keys() <= queues.keys()
    assert {GENERATE, tier_queue("{tier}")} <= described.keys()
    for name, arguments in described.items():
        assert arguments.items() <= queues[name].items()


def test_workers_are_called_by_tier_as_the_document_says() -> None:
    assert CHANNELS["tierCalls"]["address"] == f"{TIER}.{{tier}}"
    assert CHANNELS["tierCalls"]["bindings"]["amqp"]["exchange"]["name"] == CONTROL


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: f"{type(event).__name__} {event.subject}")
def test_events_go_where_the_document_says(event: Any) -> None:
    channel = CHANNELS["workerEvents" if event.routing_key.startswith("worker.") else "jobEvents"]
    values = event.routing_key.split(".", 2)
    assert values[1] in channel["parameters"]["state"]["enum"]
    names = list(channel["parameters"])
    address = channel["address"].format(**{names[0]: values[1], names[1]: values[2]})
    assert address == event.routing_key


def amqp_bindings() -> list[dict[str, Any]]:
    return [channel["bindings"]["amqp"] for channel in CHANNELS.values() if "bindings" in channel]
