# SPDX-License-Identifier: Apache-2.0
"""Bodies over the gateway's REST API give the same requests as over AMQP, except for what the gateway sets."""

import io
import json

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_consumer.domain.ports import BodyFormat
from acestep_schemas.request import GenerationRequest
from tests.golden.golden_data import GoldenCase
from tests.golden.test_parse_cases import PARSE, body_of
from tests.support.gateway import Served, gateway

_SET = {"task_id", "queue_deadline_s"}
# A form of HTTP: a message has no files beside it.
_MULTIPART = "parse_multipart"
# What the gateway sets where a request does not say it, as ACE-Step's server does.
_RULES = RequestRules(max_bytes=1 << 20, defaults={"batch_size": 2})


def over_amqp(case: GoldenCase) -> GenerationRequest | None:
    """The request of a message with this body; None: it is rejected."""
    try:
        return parse(body_of(case), "golden", _RULES, BodyFormat(content_type=case.facts["content_type"])).body
    except ConsumerError:
        return None


async def over_http(case: GoldenCase, served: Served) -> GenerationRequest | None:
    """The request of the message that the gateway publishes; None: it is refused."""
    content = io.BytesIO(body_of(case))
    headers = {"Content-Type": str(case.facts["content_type"] or "application/octet-stream")}
    status, answer = await served.post("/release_task", data=content, headers=headers)
    if status != 200:
        assert status in (400, 415), answer
        return None
    return parse(json.dumps(served.client.published[-1]).encode(), None, RequestRules(max_bytes=1 << 20)).body


def fields_of(request: GenerationRequest | None) -> dict[str, object] | None:
    return None if request is None else request.model_dump(exclude=_SET)


async def test_a_body_is_the_same_request_over_http_and_over_amqp() -> None:
    async with gateway(ACESTEP_INPUT_BUCKETS="songs") as served:
        found = {case.name: fields_of(await over_http(case, served)) for case in PARSE}
    expected = {case.name: fields_of(over_amqp(case)) for case in PARSE}
    assert {name for name in expected if found[name] != expected[name]} == {_MULTIPART}


async def test_a_form_with_a_file_is_a_request_over_http_alone() -> None:
    (case,) = (case for case in PARSE if case.name == _MULTIPART)
    async with gateway() as served:
        request = await over_http(case, served)
        assert request is not None
        assert request.task_type == case.facts["request"]["task_type"]
        assert request.prompt == case.facts["request"]["prompt"]
        assert request.src_audio_path in served.results.stored
