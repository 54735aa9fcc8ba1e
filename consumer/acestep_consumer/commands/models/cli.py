# SPDX-License-Identifier: Apache-2.0
"""The commands and flags of ``models``."""

from pathlib import Path
from typing import Annotated

import typer

from acestep_consumer.commands.base import Command, Group, UsageError, load_settings, note
from acestep_consumer.config.settings import EngineSettings

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, download and check models.",
)

Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints", metavar="FOLDER", help="Folder of the models: ACESTEP_CHECKPOINT_DIR; unset: ./checkpoints."
    ),
]


@app.command("list", cls=Command)
def models_list(
    checkpoints: Checkpoints = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each model.")] = False,
) -> None:
    """List the known models, and those on this disk.

    For each: whether it is `complete`, `incomplete` (with what is missing or cut off below it) or `absent`, its size
    and its place. A model can be in the checkpoint folder or in the Hugging Face cache. Nothing is asked from the hub,
    and no weights are read: a file's size is compared with its own header. Piped: one tab-separated line each.
    """
    from acestep_consumer.commands.models import run  # noqa: PLC0415 - the other commands start faster so

    raise typer.Exit(run.show_list(_folder(checkpoints), as_json=as_json))


@app.command("pull", cls=Command)
def models_pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME…", help="Models, as `models list` names them; none: that of ACESTEP_CONFIG_PATH."),
    ] = None,
    checkpoints: Checkpoints = None,
    lm: Annotated[
        bool, typer.Option("--lm/--no-lm", help="Download a language model too, if there is none and none is named.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each model, as `list` does.")
    ] = False,
) -> None:
    """Download models and all that they need.

    A DiT brings the VAE, the text encoder and, unless one is there or named, the language model
    acestep-5Hz-lm-1.7B. The files lie as in ACE-Step's own checkpoint folder, and a worker loads them from there.

    Ctrl-C, or a lost connection, keeps what has arrived: the same command goes on from there. Every file is checked by
    size and hash, also those that were there before; a file of that name that is another one is never overwritten.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` count, as for the Hugging Face client.

    - `models pull acestep-v15-turbo` – the default model, complete
    - `models pull acestep-v15-xl-turbo acestep-5Hz-lm-4B` – a larger one, with another language model

    Exit code 4: the hub cannot be reached or refuses. 5: not enough room, or a file is not the published one.
    """
    from acestep_consumer.commands.models import run  # noqa: PLC0415 - as above

    folder, wanted = _folder(checkpoints), tuple(names or _engine().models)
    _check_names(wanted)
    raise typer.Exit(run.pull(folder, wanted, note, with_lm=lm, as_json=as_json))


@app.command("verify", cls=Command)
def models_verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="Models; none: all known ones in the folder.")
    ] = None,
    checkpoints: Checkpoints = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each model, as `list` does.")
    ] = False,
) -> None:
    """Check the files of models against the hub's sizes and hashes.

    Reads every byte, some seconds for each model. Without the hub (`HF_HUB_OFFLINE`, no network) only missing and cut
    off files are found, and a warning says so.

    Exit code 0: all are complete and as published. 6: one is not; the lines above say which file, and what to do.
    """
    from acestep_consumer.commands.models import run  # noqa: PLC0415 - as above

    wanted = tuple(names or ())
    _check_names(wanted)
    raise typer.Exit(run.verify(_folder(checkpoints), wanted, note, as_json=as_json))


def _engine() -> EngineSettings:
    return load_settings().engine


def _folder(given: Path | None) -> Path:
    return (given or _engine().checkpoint_dir or Path("checkpoints")).expanduser()


def _check_names(names: tuple[str, ...]) -> None:
    """Raise a usage error for a name that no published model has."""
    from acestep_consumer.engine.published_models import PUBLISHED  # noqa: PLC0415 - as above

    for name in names:
        if name not in PUBLISHED:
            raise UsageError(f"{name} is not a published model; known are {', '.join(PUBLISHED)}")
