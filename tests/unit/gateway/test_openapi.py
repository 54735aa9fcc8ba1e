# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: valid, and about the routes that there are."""

from openapi_spec_validator import OpenAPIV31SpecValidator

from acestep_consumer.gateway.openapi import VERSION, document
from tests.support.gateway import gateway


def test_it_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(document()).validate()
    assert document()["openapi"] == VERSION


async def test_it_names_every_route_and_no_other() -> None:
    async with gateway() as served:
        routes = {(route.method.lower(), route.name.replace(":.*", "")) for route in served.gateway.routes()}
        assert (await served.get("/openapi.json"))[1] == document()
    methods = {"get", "post", "delete"}
    documented = {(method, path) for path, item in document()["paths"].items() for method in methods & item.keys()}
    assert routes == documented


def test_a_request_is_described_by_the_schema_of_messages() -> None:
    schemas = document()["components"]["schemas"]
    assert "audio_duration" in schemas["GenerationRequest"]["properties"]
    assert "x-aliases" in schemas["GenerationRequest"]["properties"]["prompt"]
    assert "#/$defs/" not in str(schemas)
