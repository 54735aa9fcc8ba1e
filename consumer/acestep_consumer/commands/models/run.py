# SPDX-License-Identifier: Apache-2.0
"""``models list``, ``pull`` and ``verify``."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.base import print_error, print_warning
from acestep_consumer.commands.terminal import UNKNOWN, plural, size
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.engine.hub_cache import is_offline, snapshot
from acestep_consumer.engine.published_models import DEFAULT_LM, PUBLISHED, ModelKind, PublishedModel, needed_for
from acestep_consumer.engine.renderer.checkpoints.component_files import faults_of_checkpoint, faults_of_lm
from acestep_consumer.engine.renderer.checkpoints.registry import HUB as DIFFUSERS_HUB
from acestep_consumer.engine.renderer.checkpoints.registry import INDEX

if TYPE_CHECKING:
    from acestep_consumer.engine.hub_download import HubFile

State = Literal["complete", "incomplete", "absent"]
COMPLETE: Final = "complete"
_OFFLINE: Final = "HF_HUB_OFFLINE forbids downloads: unset it, or copy the models into {folder} from elsewhere"
_NO_CLIENT: Final = "downloads need the Hugging Face client: pip install 'acestep-consumer[engine]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnDisk:
    """A known model and what is on this disk of it. ``bytes`` is its size here, ``faults`` what is missing of it."""

    name: str
    kind: str
    state: State
    bytes: int
    folder: str | None
    repository: str
    faults: tuple[str, ...] = ()


def show_list(checkpoints: Path, *, as_json: bool) -> Exit:
    """Print every known model and what is on this disk of it."""
    found = [look(model, checkpoints) for model in PUBLISHED.values()]
    console = Console(highlight=False)
    if as_json:
        _print_json(found)
    elif console.is_terminal:
        _show(found, checkpoints, console)
    else:
        for each in found:
            columns = (each.name, each.state, each.bytes, each.folder or each.repository, "; ".join(each.faults))
            typer.echo("\t".join(map(str, columns)))
    return Exit.DONE


def _print_json(found: Iterable[ModelOnDisk]) -> None:
    for each in found:
        typer.echo(json.dumps(asdict(each)))


def look(model: PublishedModel, checkpoints: Path) -> ModelOnDisk:
    """Return what is on this disk of a model: in the folder, else in the cache of the Hugging Face client."""
    folder = _folder_of(model, checkpoints)
    if folder is None:
        return _on_disk(model, "absent", None, ())
    faults = tuple(_faults(model, folder))
    return _on_disk(model, "incomplete" if faults else COMPLETE, folder, faults)


def _on_disk(model: PublishedModel, state: State, folder: Path | None, faults: tuple[str, ...]) -> ModelOnDisk:
    return ModelOnDisk(
        name=model.name,
        kind=model.kind.value,
        state=state,
        bytes=_bytes_in(folder) if folder else 0,
        folder=str(folder) if folder else None,
        repository=model.repository,
        faults=faults,
    )


def _folder_of(model: PublishedModel, checkpoints: Path) -> Path | None:
    places = [checkpoints / model.name]
    for repository, prefix in ((model.repository, model.prefix), (DIFFUSERS_HUB.get(model.name, ""), "")):
        if repository and (cached := snapshot(repository, os.environ)):
            places.append(cached / prefix)
    return next((place for place in places if place.is_dir()), None)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _faults(model: PublishedModel, folder: Path) -> Iterator[str]:
    """Yield each missing or damaged file of a model's folder. No weights are read."""
    for path in sorted(folder.glob("*.incomplete")):
        yield f"{path.name.rsplit('.', 2)[0]} is cut off after {size(path.stat().st_size)}"
    match model.kind:
        case ModelKind.DIT:
            yield from faults_of_checkpoint(folder)
        case ModelKind.LM | ModelKind.TEXT_ENCODER:
            yield from faults_of_lm(folder)
        case ModelKind.VAE:
            yield from faults_of_checkpoint(folder, is_dit=False)


def _show(found: Sequence[ModelOnDisk], checkpoints: Path, console: Console) -> None:
    """Print the table, and below it the faults in full width: on a narrow terminal a column of paths would be all."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Models in {checkpoints}", title_justify="left", title_style="bold")
    for column in ("model", "kind", "state", "size"):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    styles = {"complete": "green", "incomplete": "yellow", "absent": "dim"}
    for each in found:
        elsewhere = each.folder is not None and not Path(each.folder).is_relative_to(checkpoints)
        state = f"{each.state}, in the hub's cache" if elsewhere else each.state
        stored = size(each.bytes) if each.bytes else UNKNOWN
        table.add_row(each.name, each.kind, Text(state, styles[each.state]), stored)
    console.print(table)
    for each in found:
        for fault in each.faults:
            console.print(f"{each.name}: {fault}", style="yellow", markup=False, soft_wrap=True)
    console.print("acestep-consumer models pull NAME downloads one, or the rest of it", style="dim", soft_wrap=True)


def pull(checkpoints: Path, names: Sequence[str], note: Console, *, with_lm: bool, as_json: bool) -> Exit:
    """Download models and what they need into ``checkpoints``. Ctrl-C keeps what has arrived."""
    if is_offline(os.environ):
        print_error(_OFFLINE.format(folder=checkpoints), note)
        return Exit.UNREACHABLE
    if find_spec("huggingface_hub") is None:
        print_error(_NO_CLIENT, note)
        return Exit.ENGINE
    from acestep_consumer.engine.hub_download import (  # noqa: PLC0415 - only the engine's installation has the client
        HubUnreachable,
        ModelNotStored,
        only_pull,
    )

    ready = {name for name in names if (checkpoints / name / INDEX).is_file()}
    for name in sorted(ready):
        note.print(f"{checkpoints / name} is there in diffusers' layout, and stays as it is", soft_wrap=True)
    lm = DEFAULT_LM if with_lm and not _has_lm(names, checkpoints) else None
    models = needed_for([name for name in names if name not in ready], lm=lm)
    try:
        with only_pull(checkpoints):
            _pull(models, checkpoints, note)
    except HubUnreachable as error:
        print_error(str(error), note)
        return Exit.UNREACHABLE
    except ModelNotStored as error:
        print_error(str(error), note)
        return Exit.ENGINE
    except KeyboardInterrupt:
        note.print(f"stopped; what has arrived is kept in {checkpoints}, and the same command goes on from there")
        raise
    if as_json:
        _print_json(look(model, checkpoints) for model in models)
    note.print(_next_step(checkpoints, names), soft_wrap=True)
    return Exit.DONE


def _has_lm(names: Sequence[str], checkpoints: Path) -> bool:
    """Whether a language model is named, or on the disk in full."""
    lms = [model for model in PUBLISHED.values() if model.kind is ModelKind.LM]
    return any(model.name in names or look(model, checkpoints).state == COMPLETE for model in lms)


def _pull(models: Sequence[PublishedModel], checkpoints: Path, note: Console) -> None:
    from acestep_consumer.engine.hub_download import check_room, fetch, hub_files  # noqa: PLC0415 - as above

    files = hub_files(models)
    with _progress(note) as progress:
        missing = _missing(files, checkpoints, progress)
        check_room(missing, checkpoints)
        total = sum(file.bytes for file in missing)
        kept = sum(_partial_bytes(file, checkpoints) for file in missing)
        note.print(f"{size(total - kept)} to download into {checkpoints}", soft_wrap=True)
        task = progress.add_task("", total=total, completed=kept)
        for file in missing:
            label = f"{file.model.name}/{file.name}"
            progress.update(task, description=label)
            fetch(file, checkpoints, partial(progress.advance, task))
            if not note.is_terminal:
                note.print(f"{label} {size(file.bytes)}", soft_wrap=True)
    note.print(f"{plural(len(files), 'file')} complete, {len(missing)} of them downloaded now")


def _progress(note: Console) -> Progress:
    shown = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    speed = (TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*shown, *speed, console=note, disable=not note.is_terminal)


def _partial_bytes(file: "HubFile", checkpoints: Path) -> int:
    path = file.partial(checkpoints)
    return path.stat().st_size if path.is_file() else 0


def _missing(files: Sequence["HubFile"], checkpoints: Path, progress: Progress) -> "list[HubFile]":
    """Return the files that are not there in full. A cut off one becomes the beginning of its download.

    Raises:
        ModelNotStored: another file has the name of one; it is not overwritten.
    """
    from acestep_consumer.engine.hub_download import ModelNotStored  # noqa: PLC0415 - as above

    missing = []
    for file in files:
        path = file.path(checkpoints)
        if not path.is_file():
            missing.append(file)
            continue
        if path.suffix == ".safetensors" and path.stat().st_size < file.bytes:
            path.replace(file.partial(checkpoints))
            missing.append(file)
            continue
        task = progress.add_task(f"checking {file.model.name}/{file.name}", total=file.bytes)
        if not file.matches(path, partial(progress.advance, task)):
            raise ModelNotStored(
                f"{path} is not the file of {file.model.repository}: move it away, then the command downloads it"
            )
        progress.remove_task(task)
    return missing


def _next_step(checkpoints: Path, names: Sequence[str]) -> str:
    dits = [name for name in names if PUBLISHED[name].kind is ModelKind.DIT]
    model = f" --model {dits[0]}" if dits else ""
    return f"start a worker with them: acestep-consumer run --checkpoints {checkpoints}{model}"


def verify(checkpoints: Path, names: Sequence[str], note: Console, *, as_json: bool) -> Exit:
    """Compare the files of models with the hub's sizes and hashes; without the hub, with their own headers."""
    wanted = [PUBLISHED[name] for name in names] or [
        model for model in PUBLISHED.values() if (checkpoints / model.name).is_dir()
    ]
    if not wanted:
        print_error(f"{checkpoints} holds no known model: acestep-consumer models pull NAME downloads one", note)
        return Exit.UNFIT
    published = _published(wanted, checkpoints, note)
    sound = True
    for model in wanted:
        faults = tuple(_verified(model, checkpoints, published))
        sound = sound and not faults
        folder = checkpoints / model.name
        found = _on_disk(model, "incomplete" if faults else COMPLETE, folder if folder.is_dir() else None, faults)
        if as_json:
            _print_json([found])
        elif not faults:
            typer.echo(f"{model.name}\t{COMPLETE}")
        for fault in faults:
            print_error(f"{model.name}: {fault}", note)
    if not sound:
        note.print("acestep-consumer models pull downloads what is missing", soft_wrap=True)
    return Exit.DONE if sound else Exit.UNFIT


def _verified(model: PublishedModel, checkpoints: Path, published: "Sequence[HubFile] | None") -> Iterator[str]:
    folder = checkpoints / model.name
    if not folder.is_dir():
        yield f"{folder} does not exist"
        return
    faults = list(_faults(model, folder))
    yield from faults
    if faults or (folder / INDEX).is_file():  # the hub's hashes are those of ACE-Step's layout
        return
    for file in (file for file in published or () if file.model == model):
        path = file.path(checkpoints)
        if not path.is_file():
            yield f"{file.name} is missing"
        elif not file.matches(path):
            yield f"{file.name} is not the published file"


def _published(models: Sequence[PublishedModel], checkpoints: Path, note: Console) -> "Sequence[HubFile] | None":
    """Return the hub's files, or None where it cannot be asked."""
    if is_offline(os.environ) or find_spec("huggingface_hub") is None:
        reason = "HF_HUB_OFFLINE is set" if is_offline(os.environ) else _NO_CLIENT
        print_warning(f"hashes in {checkpoints} were not compared: {reason}", note)
        return None
    from acestep_consumer.engine.hub_download import HubUnreachable, hub_files  # noqa: PLC0415 - as above

    try:
        return hub_files(models)
    except HubUnreachable as error:
        print_warning(f"hashes in {checkpoints} were not compared: {error}", note)
        return None
