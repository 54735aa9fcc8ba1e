# SPDX-License-Identifier: Apache-2.0
"""``topology``: what stands on the broker, printed or declared."""

import json
import sys

from rich.console import Console

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerError, BrokerRefused
from acestep_consumer.broker.topology import topology as wanted
from acestep_consumer.commands.tier_names import tier_names
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.config.settings import Settings
from acestep_consumer.policy.tiers import TierTableError


async def topology(settings: Settings, note: Console, *, declare: bool, as_json: bool) -> Exit:
    """Print RabbitMQ definitions, or create the objects, and print them when asked to; repeating is harmless."""
    try:
        tiers = tier_names(settings) or ()
        if declare:
            await _declare(settings, tiers)
            note.print("declared", style="green")
    except TierTableError as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.USAGE
    except BrokerRefused as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.USAGE
    except BrokerError as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE
    if as_json or not declare:
        definitions = wanted(settings.broker).with_tiers(tiers).as_definitions()
        sys.stdout.write(json.dumps(definitions, indent=2) + "\n")
    return Exit.DONE


async def _declare(settings: Settings, tiers: tuple[str, ...]) -> None:
    set_up_logs("warning", settings.worker.log_format)  # a broker that is away is waited for: let it be said
    async with BrokerConnection(settings.broker, "acestep-consumer topology") as link:
        for tier in tiers:
            await link.declare_tier_queue(tier)
