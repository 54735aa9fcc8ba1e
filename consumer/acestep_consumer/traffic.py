# SPDX-License-Identifier: Apache-2.0
"""What went over the line to S3, as plain numbers: counted where it happens, read when Prometheus asks."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Bytes of bodies, without headers, and tries after the first. All on the event loop, so no locks."""

    sent_bytes: int = 0
    received_bytes: int = 0
    retries: int = 0

    def retried(self, _state: object) -> None:
        """Count one more try; tenacity calls it before it waits."""
        self.retries += 1

    async def receiving(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Pass chunks on, and count their bytes."""
        async for chunk in chunks:
            self.received_bytes += len(chunk)
            yield chunk
