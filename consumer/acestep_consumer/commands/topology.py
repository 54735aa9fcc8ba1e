# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer topology`: prints the exchanges, queues and bindings, or declares them."""

import json
import sys

from rich.console import Console

from acestep_consumer.broker.errors import CHECK_BROKER, BrokerError, BrokerRefused, describe
from acestep_consumer.broker.inspection import BrokerInspection
from acestep_consumer.broker.topology import topology as wanted
from acestep_consumer.commands.base import print_error, print_warning
from acestep_consumer.commands.terminal import BROKER, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.policy.tier_choice import queue_names
from acestep_consumer.policy.tiers import TierTableError, load_table

_NAME = "acestep-consumer topology"


def tier_names(settings: Settings) -> tuple[str, ...] | None:
    """Return the names of the tiers that have queues, smallest first; None without ``ACESTEP_ROUTE_BY_TIER``.

    Raises:
        TierTableError: the file of ``ACESTEP_TIER_TABLE`` is invalid, or a name in it cannot be that of a queue.
    """
    if not settings.broker.route_by_tier:
        return None
    return queue_names(load_table(settings.worker.tier_table))


async def topology(settings: Settings, note: Console, *, declare: bool, as_json: bool) -> Exit:
    """Print RabbitMQ definitions, or declare the objects; declaring again changes nothing."""
    try:
        tiers = tier_names(settings) or ()
        if declare:
            for warning in settings.broker.url_warnings:
                print_warning(warning, note)
            with waiting_for(BROKER, note):
                where = await _declare(settings, tiers)
            note.print(f"exchanges, queues and bindings declared on {where}", style="green", soft_wrap=True)
    except (TierTableError, BrokerRefused) as error:
        print_error(str(error), note)
        return Exit.USAGE
    except BrokerError as error:
        print_error(f"no connection to the broker: {describe(error)}; {CHECK_BROKER}", note)
        return Exit.UNREACHABLE
    if as_json or not declare:
        definitions = wanted(settings.broker).with_tiers(tiers).as_definitions()
        sys.stdout.write(json.dumps(definitions, indent=2) + "\n")
    return Exit.DONE


async def _declare(settings: Settings, tiers: tuple[str, ...]) -> str:
    """Declare everything and return the broker's address. Raises ``BrokerError``."""
    # Here and not above: with them come the worker's logs, and `status` imports this file for the names of tiers.
    from acestep_consumer.broker.connection import BrokerConnection  # noqa: PLC0415 - as said
    from acestep_consumer.config.logs import set_up_logs  # noqa: PLC0415 - as said

    set_up_logs("warning", settings.worker.log_format)
    # The worker's connection waits for a broker that is away; a command should fail at once.
    async with BrokerInspection(settings.broker, _NAME) as inspection:
        where = inspection.address
    async with BrokerConnection(settings.broker, _NAME) as connection:
        for tier in tiers:
            await connection.declare_tier_queue(tier)
    return where
