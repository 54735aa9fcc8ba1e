# SPDX-License-Identifier: Apache-2.0
"""Silence for libraries that log what a command tells anyway: a lost connection, a refused one."""

import logging


def hush() -> None:
    """Let the broker's client libraries say nothing on stderr."""
    for library in ("aiormq", "aio_pika", "consumer.client"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
