# SPDX-License-Identifier: Apache-2.0
"""HTTP client habits, the same for every caller: timeouts, retryable answers, certificates, headers.

Bodies are passed on as they came: no session asks for compression, and none undoes it.
"""

import ssl
from collections.abc import Mapping
from typing import Final

import aiohttp

CONNECT_S: Final = 10.0
READ_S: Final = 30.0
"""Longest silence of a server, seconds."""

TRANSFER: Final = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
"""For bodies of any size: no bound on the whole."""

RETRYABLE: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may pass."""

NETWORK_ERRORS: Final = (aiohttp.ClientError, TimeoutError)
"""Raised when there is no answer, or only a part of one."""


def authorities(bundle: str | None = None) -> ssl.SSLContext:
    """Return the certificate authorities to trust: those of the file ``bundle``; None: the system's.

    The system's are those of SSL_CERT_FILE where it is set. aiohttp's own default reads that when it is imported.
    """
    return ssl.create_default_context(cafile=bundle)


def open_session(
    connector: aiohttp.TCPConnector | None = None,
    *,
    timeout: aiohttp.ClientTimeout = TRANSFER,
    headers: Mapping[str, str] | None = None,
    proxy: str | None = None,
    trust_env: bool = False,
) -> aiohttp.ClientSession:
    """Return a session without cookies; who calls this closes it.

    Args:
        connector: how to connect; None: by the system's resolver, trusting the system's authorities.
        timeout: how long to wait.
        headers: sent with each request.
        proxy: through which every request goes.
        trust_env: use the proxies and logins of the environment and of ``.netrc``.
    """
    return aiohttp.ClientSession(
        connector=connector or aiohttp.TCPConnector(ssl=authorities()),
        timeout=timeout,
        headers={"User-Agent": "acestep-consumer", "Accept-Encoding": "identity", **(headers or {})},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        proxy=proxy,
        trust_env=trust_env,
    )
