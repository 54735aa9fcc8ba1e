# SPDX-License-Identifier: Apache-2.0
"""Silence for libraries that log what a command tells anyway: a lost connection, a refused one."""

import logging


def hush() -> None:
    """Let the broker's client libraries say nothing on stderr."""
    hush_libraries()
    logging.getLogger("acestep_consumer.client").setLevel(logging.CRITICAL)


def hush_libraries() -> None:
    """Silence the AMQP libraries alone: that a subscription was lost and is made again is said by our own client."""
    for library in ("aiormq", "aio_pika"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
