# SPDX-License-Identifier: Apache-2.0
"""``topology``: what stands on the broker, printed or declared."""

import json
import sys

from rich.console import Console

from consumer.broker.connection import Link
from consumer.broker.faults import BrokerFault
from consumer.broker.topology import topology as wanted
from consumer.commands.exits import Exit
from consumer.settings import Settings


async def topology(settings: Settings, note: Console, *, declare: bool) -> Exit:
    """Print RabbitMQ definitions, or create the objects; repeating is harmless."""
    if not declare:
        sys.stdout.write(json.dumps(wanted(settings.broker).as_definitions(), indent=2) + "\n")
        return Exit.DONE
    try:
        async with Link(settings.broker, "acestep-consumer topology"):
            note.print("declared", style="green")
    except BrokerFault as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE
    return Exit.DONE
