# SPDX-License-Identifier: Apache-2.0
"""Which requests the page's server accepts."""

import socket

import pytest

from acestep_consumer.webui.origin_check import HEADERS, OriginCheck, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1:8090", "localhost:8090", "LOCALHOST", "[::1]:8090", "127.0.0.2"])
def test_a_page_for_this_machine_answers_to_loopback_under_any_port(host: str) -> None:
    assert OriginCheck("127.0.0.1").refusal("GET", host, None) is None


@pytest.mark.parametrize(
    "host", ["", "evil.example:8090", "127.0.0.1.evil.example", "10.0.0.7:8090", "localhost.evil.example", "[", "a:b:c"]
)
def test_a_name_that_somebody_else_owns_is_refused_even_if_it_leads_here(host: str) -> None:
    assert OriginCheck("127.0.0.1").refusal("GET", host, None) is not None


def test_a_page_for_others_answers_to_addresses_to_the_machines_name_and_to_names_that_were_allowed() -> None:
    check = OriginCheck("0.0.0.0", ("songs.example",))  # noqa: S104 - that is what is tested
    for host in ("10.0.0.7:8090", "[fd00::1]:8090", socket.gethostname(), "Songs.Example"):
        assert check.refusal("GET", host, None) is None, host
    assert check.refusal("GET", "evil.example", None) is not None


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:8091", "http://localhost:8090", "127.0.0.1:8090"]
)
def test_a_request_from_anywhere_but_the_page_itself_is_refused(origin: str | None) -> None:
    assert OriginCheck("127.0.0.1").refusal("POST", "127.0.0.1:8090", origin) is not None


def test_a_request_from_the_page_is_taken_also_behind_a_proxy_that_speaks_https() -> None:
    assert OriginCheck("127.0.0.1").refusal("POST", "127.0.0.1:8090", "http://127.0.0.1:8090") is None
    assert OriginCheck("127.0.0.1", ["songs.example"]).refusal("POST", "songs.example", "https://songs.example") is None


def test_loopback_is_what_others_cannot_reach() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))  # noqa: S104 - as above


def test_the_policy_of_contents_allows_nothing_inline_and_nothing_foreign() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "*" not in policy
