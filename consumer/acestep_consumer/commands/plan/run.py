# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a card can do, before a worker is started on it."""

import os
import sys

from rich.console import Console

from acestep_consumer.commands.plan import gpu as cards
from acestep_consumer.commands.plan.gpu import DetectedGpu, DeviceMissing
from acestep_consumer.commands.plan.survey import PlanQuestion, PlanSurvey
from acestep_consumer.commands.plan.table import show
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.policy.tiers import TierTableError, load_table


def plan(settings: Settings, question: PlanQuestion, note: Console, *, as_json: bool) -> Exit:
    """Print what the card can do, as a table or as one JSON object."""
    try:
        table = load_table(settings.worker.tier_table)
        found = find_card(settings.engine, question)
    except TierTableError as error:
        note.print(str(error), style="red", markup=False)
        return Exit.USAGE
    except DeviceMissing as error:
        note.print(str(error), style="red", markup=False)
        return Exit.ENGINE
    answer = PlanSurvey(settings, table, found, question).plan()
    if as_json:
        sys.stdout.write(answer.model_dump_json(indent=2) + "\n")
    else:
        show(answer, Console(highlight=False))
    return Exit.DONE


def find_card(engine: EngineSettings, question: PlanQuestion) -> DetectedGpu:
    """Return the card that is meant: ``--vram`` before ``MAX_CUDA_VRAM`` before what this machine has."""
    if question.vram_gb is not None:
        name = question.card or "some card"
        return DetectedGpu(name, question.vram_gb, "--vram")
    found = cards.find(engine.device, os.environ)
    size = found.vram_gb if engine.max_vram_gb is None else engine.max_vram_gb
    return DetectedGpu(question.card or found.name, size, found.by, found.why, found.kind)
