# SPDX-License-Identifier: Apache-2.0
"""The commands. What a command prints goes to stdout, everything else to stderr."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from consumer import settings as settings_module
from consumer.commands.exits import Exit
from consumer.settings import Settings, SettingsError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ACE-Step 1.5 music generation behind RabbitMQ: requests in, songs in S3, events out.",
    epilog="Exit codes: 0 done · 1 the job ended without songs · 2 usage or settings · 3 queue full · "
    "4 broker or storage out of reach · 5 an engine cannot work · 130 interrupted.",
)
note = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line; Ctrl-C ends with 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(Exit.INTERRUPTED) from None


def _variables() -> str:
    rows = "\n".join(f"- `{name}` ({default}): {about}" for name, default, about in settings_module.describe())
    return f"**Settings** (environment or `.env`; the default in brackets):\n\n{rows}"


def _settings(**overrides: object) -> Settings:
    given = {name: str(value) for name, value in overrides.items() if value is not None}
    try:
        return settings_module.load(overrides=given)
    except SettingsError as error:
        note.print(f"[red]settings:[/red] {error}", markup=True)
        raise typer.Exit(Exit.USAGE) from error


def _await(work: Coroutine[Any, Any, int]) -> None:
    """Run a command's coroutine and leave with its exit code."""
    raise typer.Exit(asyncio.run(work))


@app.command(epilog=_variables())
def run(
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="ACESTEP_QUEUE_WORKERS")] = None,
    model: Annotated[str | None, typer.Option("--model", help="ACESTEP_CONFIG_PATH")] = None,
    checkpoints: Annotated[Path | None, typer.Option("--checkpoints", help="ACESTEP_CHECKPOINT_DIR")] = None,
    device: Annotated[str | None, typer.Option("--device", help="ACESTEP_DEVICE")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", help="ACESTEP_HTTP_PORT")] = None,
    grace: Annotated[float, typer.Option("--grace", help="seconds that work in hand may take after SIGTERM")] = 600.0,
) -> None:
    """Consume requests: the worker. SIGTERM or Ctrl-C finishes the work in hand; a second one leaves at once.

    Nothing is lost either way: what was not finished goes back to the queue.
    """
    from consumer.app import run_worker  # noqa: PLC0415 - the other commands start faster without it

    settings = _settings(
        ACESTEP_QUEUE_WORKERS=workers,
        ACESTEP_CONFIG_PATH=model,
        ACESTEP_CHECKPOINT_DIR=checkpoints,
        ACESTEP_DEVICE=device,
        ACESTEP_HTTP_PORT=http_port,
    )
    _await(run_worker(settings, grace_s=grace))


@app.command()
def submit(
    file: Annotated[Path | None, typer.Argument(help="request as a JSON file; `-` reads standard input")] = None,
    prompt: Annotated[str | None, typer.Option(help="what it should sound like")] = None,
    lyrics: Annotated[str | None, typer.Option(help="words to sing; leave out for instrumental")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds")] = None,
    task_type: Annotated[str | None, typer.Option(help="text2music, cover, repaint, extract, lego, complete")] = None,
    source: Annotated[str | None, typer.Option(help="source audio: s3://bucket/key or https://host/path")] = None,
    model: Annotated[str | None, typer.Option(help="DiT model; unset: the worker's primary")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same song")] = None,
    batch_size: Annotated[int | None, typer.Option(help="songs, 1 to 8")] = None,
    audio_format: Annotated[str | None, typer.Option("--format", help="mp3, wav, wav32, flac, ogg, opus, aac")] = None,
    thinking: Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="plan with the 5Hz LM")] = None,
    task_id: Annotated[str | None, typer.Option(help="idempotency key; unset: a new one")] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="9 goes first")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="stay until the job ends, with a progress bar")] = False,
    download: Annotated[Path | None, typer.Option(help="folder for the songs; implies --wait")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the terminal event as one line of JSON")] = False,
) -> None:
    """Publish one request, from flags or a JSON file (flags win), and optionally wait for its songs."""
    from consumer.commands import submit as command  # noqa: PLC0415 - see run

    flags = {
        "task_id": task_id,
        "prompt": prompt,
        "lyrics": lyrics,
        "audio_duration": duration,
        "task_type": task_type,
        "src_audio_path": source,
        "model": model,
        "seed": seed,
        "batch_size": batch_size,
        "audio_format": audio_format,
        "thinking": thinking,
    }
    body = _request_of(file) | {name: value for name, value in flags.items() if value is not None}
    if not body:
        raise typer.BadParameter("give a JSON file or at least --prompt")
    order = command.Submission(body, priority, wait=wait or download is not None, download=download, as_json=as_json)
    _await(command.submit(_settings(), order, note))


@app.command()
def watch(
    task_id: Annotated[str | None, typer.Argument(help="only this job")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one event a line, as JSON")] = False,
) -> None:
    """Print events as they come, until Ctrl-C; with a task id, until that job ends."""
    from consumer.commands import watch as command  # noqa: PLC0415 - see run

    _await(command.watch(_settings(), task_id, note, as_json=as_json))


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="`request` or `events`")] = "request",
) -> None:
    """Print the JSON Schema of requests or events."""
    from schemas.export import SCHEMAS  # noqa: PLC0415 - see run

    if what not in SCHEMAS:
        raise typer.BadParameter(f"{what}: choose one of {', '.join(SCHEMAS)}")
    sys.stdout.write(json.dumps(SCHEMAS[what](), indent=2) + "\n")


@app.command()
def topology(
    declare: Annotated[bool, typer.Option("--declare", help="create it on the broker; repeating is harmless")] = False,
) -> None:
    """Print exchanges, queues and bindings as RabbitMQ definitions, or declare them."""
    from consumer.commands import topology as command  # noqa: PLC0415 - see run

    _await(command.topology(_settings(), note, declare=declare))


@app.command("tiny-checkpoint")
def tiny_checkpoint(
    folder: Annotated[
        Path, typer.Argument(help="gets `acestep-v15-turbo`, `acestep-v15-base` and `acestep-5Hz-lm-0.6B`")
    ],
) -> None:
    """Write small models with random weights: real code, no music. Use as ACESTEP_CHECKPOINT_DIR."""
    try:
        from consumer.engine import tiny_checkpoint as dit  # noqa: PLC0415 - needs torch
        from consumer.engine import tiny_lm as lm  # noqa: PLC0415 - as above
    except ImportError as error:
        note.print(f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
        raise typer.Exit(Exit.USAGE) from error
    dit.write(folder)
    lm.write(folder)
    note.print(f"wrote {folder}; the weights are random: what they sing is noise")


def _request_of(file: Path | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        body = json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise typer.BadParameter(f"{file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{file} holds a {type(body).__name__}; a request is a JSON object")
    return body
