# SPDX-License-Identifier: Apache-2.0
"""SSRF protection: hosts of inputs must have public addresses, unless the operator allows their network.

An address is checked when a socket to it is opened, since a name may lead to another one at each look-up.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address

# IPv4 networks without public hosts: IANA's special-purpose blocks, and multicast. The last one is a public address by
# its number alone: Azure's virtual machines reach the agent of their host there.
_IPV4_SPECIAL: Final = tuple(
    map(
        ip_network,
        ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
         "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
         "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)  # fmt: skip
# The IPv6 network of public hosts. Outside are loopback, link-local, unique local, multicast, NAT64, and IPv4 addresses
# in another notation.
_IPV6_PUBLIC: Final = ip_network("2000::/3")
# Networks without public hosts inside it: those of protocols and Teredo, 6to4, and examples in documents.
_IPV6_SPECIAL: Final = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


class AddressRefused(OSError):
    """The address of a host may not be read. It is for the log: producers must not learn about private networks."""

    def __init__(self, address: str) -> None:
        super().__init__("its address is not allowed")
        self.address = address


def require_allowed(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> None:
    """Raise ``AddressRefused`` unless the address is public, or in one of the operator's ``networks``."""
    found = ip_address(address)
    if not is_public(found) and not any(found in network for network in networks):
        raise AddressRefused(str(found))


def is_public(address: Address) -> bool:
    """Whether a host on the public internet may have this address. IPv4 in IPv6 notation counts as not public."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _IPV4_SPECIAL)
    return address in _IPV6_PUBLIC and not any(address in block for block in _IPV6_SPECIAL)
