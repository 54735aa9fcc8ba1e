# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer tiny-checkpoint`: writes small models with random weights."""

import os
import tempfile
from pathlib import Path

from rich.console import Console

from acestep_consumer.commands.base import print_error
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.engine.library_imports import library_imports


def write(folder: Path, note: Console) -> Exit:
    """Write the models below ``folder``, which is tried first: importing torch and making them takes ten seconds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print_error(f"cannot write to {folder}: {os.strerror(error.errno or 0)}", note)
        return Exit.USAGE

    def say(text: str) -> None:
        note.print(f"{text} …", style="dim", markup=False, soft_wrap=True)

    say("loading torch and diffusers")
    try:
        with library_imports(quantized=False):
            from acestep_consumer.engine.testing import tiny_checkpoint, tiny_lm  # noqa: PLC0415 - they need torch
    except ImportError as error:
        print_error(f"{error.name} is missing: pip install 'acestep-consumer[engine]'", note)
        return Exit.USAGE
    tiny_checkpoint.write(folder, say)
    tiny_lm.write(folder, say)
    note.print(f"wrote {folder}: random weights, so the output is noise", markup=False, soft_wrap=True)
    return Exit.DONE
