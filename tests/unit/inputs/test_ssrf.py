# SPDX-License-Identifier: Apache-2.0
"""Which addresses a host on the public internet may have. What is refused, over a connection: ``tests/faults``."""

from ipaddress import ip_address

import pytest

from acestep_consumer.inputs.fetch import shown
from acestep_consumer.inputs.ssrf import is_public

EDGES_OF_PUBLIC = [
    "1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "192.169.0.0",
    "198.17.255.255", "198.20.0.0", "223.255.255.255", "168.63.129.15", "168.63.129.17", "8.8.8.8",
    "2001:200::", "2001:db7:ffff::", "2001:db9::", "2003::", "2606:4700:4700::1111", "3ffe:ffff::", "3fff:1000::",
]  # fmt: skip
EDGES_OF_SPECIAL = [
    "0.255.255.255", "10.255.255.255", "100.64.0.0", "100.127.255.255", "127.255.255.255", "169.254.0.0",
    "172.16.0.0", "192.0.0.255", "192.88.99.1", "192.168.255.255", "198.19.255.255", "198.51.100.7", "224.0.0.0",
    "255.255.255.255", "1fff:ffff::", "2001:1ff:ffff::", "2001:db8:ffff::", "2002:ffff::", "3fff:fff:ffff::", "4000::",
    "fe80::1%eth0", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1",
]  # fmt: skip


@pytest.mark.parametrize("address", EDGES_OF_PUBLIC)
def test_a_public_address_may_be_read(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", EDGES_OF_SPECIAL)
def test_an_address_that_no_public_host_has_may_not(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("https://me:secret@a.example/x?token=secret#secret", "https://a.example/x"),
        ("https://a.example/\udcff\n\u202e\x00", r"https://a.example/\udcff\u000a\u202e\u0000"),
        ("s3://b/ä song", "s3://b/ä song"),
        ("x" * 300, "x" * 200 + "…"),
    ],
)
def test_what_is_said_of_a_place_holds_no_secret_and_can_be_written(uri: str, public: str) -> None:
    assert shown(uri) == public
    assert shown(uri).encode()
