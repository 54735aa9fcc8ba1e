# SPDX-License-Identifier: Apache-2.0
"""Which addresses a host on the public internet may have, and which only the operator can open.

An address is judged at the socket, after every look-up of a name: what a name leads to may change between two of them.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address

# What has no public host, of all IPv4: IANA's special-purpose blocks, and multicast. The last one is public by number
# only: Azure's machines find the agent of their host there.
_IPV4_SPECIAL: Final = tuple(
    map(
        ip_network,
        ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
         "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
         "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)  # fmt: skip
# Of all IPv6, public hosts have these. Outside are loopback, link-local, unique local, multicast, NAT64, and IPv4
# addresses in another notation.
_IPV6_PUBLIC: Final = ip_network("2000::/3")
# Inside, these have none: protocols' own and Teredo, 6to4, and examples in documents.
_IPV6_SPECIAL: Final = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


class AddressRefused(OSError):
    """A host's address is not one that may be read. It is for the log: the producer is not told what lies inside."""

    def __init__(self, address: str) -> None:
        super().__init__("its address is not allowed")
        self.address = address


def require_allowed(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> None:
    """Raise ``AddressRefused`` unless the address is public, or in one of the operator's ``networks``."""
    found = ip_address(address)
    if not is_public(found) and not any(found in network for network in networks):
        raise AddressRefused(str(found))


def is_public(address: Address) -> bool:
    """Whether a host on the public internet may have this address. IPv4 in IPv6's notation is not looked into."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _IPV4_SPECIAL)
    return address in _IPV6_PUBLIC and not any(address in block for block in _IPV6_SPECIAL)
