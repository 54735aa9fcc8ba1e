# SPDX-License-Identifier: Apache-2.0
"""Estimates what a GPU can do, without starting a worker."""

import os
import sys
from dataclasses import replace

from rich.console import Console

from acestep_consumer.commands.base import print_error
from acestep_consumer.commands.plan import gpu as gpus
from acestep_consumer.commands.plan.gpu import DetectedGpu, DeviceMissing
from acestep_consumer.commands.plan.survey import PlanQuestion, PlanSurvey
from acestep_consumer.commands.plan.table import show
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.policy import benchmarks
from acestep_consumer.policy.tiers import TierTableError, load_table


class MemoryUnknown(Exception):
    """``--card`` names a GPU whose memory is not in the table; the message says what to add."""


def plan(settings: Settings, question: PlanQuestion, note: Console, *, as_json: bool) -> Exit:
    """Print the estimate, as tables or as one JSON object."""
    try:
        table = load_table(settings.worker.tier_table)
        found = find_gpu(settings.engine, question)
    except (TierTableError, MemoryUnknown) as error:
        print_error(str(error), note)
        return Exit.USAGE
    except DeviceMissing as error:
        print_error(str(error), note)
        return Exit.ENGINE
    report = PlanSurvey(settings, table, found, question).plan()
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        show(report, Console(highlight=False))
    return Exit.DONE


def find_gpu(engine: EngineSettings, question: PlanQuestion) -> DetectedGpu:
    """Return the GPU that is asked about: the one of ``--card`` and ``--vram``, or this machine's.

    Its memory is ``--vram``, else ``MAX_CUDA_VRAM``, else that of the model that ``--card`` names, else this machine's.

    Raises:
        MemoryUnknown: the memory of ``--card`` is neither given nor known.
        DeviceMissing: ``ACESTEP_DEVICE`` names a device that does not exist.
    """
    if question.vram_gb is None and question.card is None:
        found = gpus.find(engine.device, os.environ)
        return found if engine.max_vram_gb is None else replace(found, vram_gb=engine.max_vram_gb)
    model = None if question.card is None else benchmarks.find_gpu(question.card)
    name = model.name if model else question.card or gpus.UNNAMED
    if question.vram_gb is not None:
        return DetectedGpu(name, question.vram_gb, "--vram")
    if engine.max_vram_gb is not None:
        return DetectedGpu(name, engine.max_vram_gb, "MAX_CUDA_VRAM")
    if model is None:
        raise MemoryUnknown(
            f"the memory of {question.card} is unknown: add --vram GB. Known GPUs: {', '.join(benchmarks.gpu_names())}"
        )
    return DetectedGpu(name, model.memory_gib, "--card")
