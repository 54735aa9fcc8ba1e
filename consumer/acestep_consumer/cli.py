# SPDX-License-Identifier: Apache-2.0
"""The commands. What a command prints goes to stdout, everything else to stderr."""

import asyncio
import json
import math
import re
import sys
from collections.abc import Coroutine
from contextlib import redirect_stdout
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.exit_codes import Exit, listed
from acestep_consumer.config.settings import Settings, SettingsError

if TYPE_CHECKING:
    from acestep_consumer.commands.dead.run import DeadLetterFilter

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ACE-Step 1.5 music generation behind RabbitMQ: requests in, songs in S3, events out.",
    epilog=listed(),
)
note = Console(stderr=True, highlight=False)
dead = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Requests that could not be run: look at them, give them another chance, or remove them.",
)
app.add_typer(dead, name="dead")

Code = Annotated[str | None, typer.Option("--code", help="only those with this error code, such as render_failed")]
Since = Annotated[str | None, typer.Option("--since", help="only newer ones: 90s, 30m, 12h, 7d, or an ISO 8601 time")]


def main() -> None:
    """Run the command line; Ctrl-C ends with 130 and no traceback."""
    try:
        app(prog_name="acestep-consumer")  # for `python -m acestep_consumer` too: completion cannot call itself by that
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
        note.print(f"[red]settings:[/red] {escape(str(error))}", markup=True, soft_wrap=True)
        raise typer.Exit(Exit.USAGE) from error


def _await(work: Coroutine[Any, Any, int]) -> None:
    """Run a command's coroutine and leave with its exit code."""
    raise typer.Exit(asyncio.run(work))


@app.command(epilog=_variables())
def run(
    workers: Annotated[
        str | None, typer.Option("--workers", "-w", help="ACESTEP_QUEUE_WORKERS: a number, or auto")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="ACESTEP_CONFIG_PATH")] = None,
    checkpoints: Annotated[Path | None, typer.Option("--checkpoints", help="ACESTEP_CHECKPOINT_DIR")] = None,
    device: Annotated[str | None, typer.Option("--device", help="ACESTEP_DEVICE")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", help="ACESTEP_HTTP_PORT")] = None,
    grace: Annotated[float, typer.Option("--grace", help="seconds that work in hand may take after SIGTERM")] = 600.0,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="all|0,2,…",
            help="a worker for each GPU, on the same queue: `all`, or numbers as nvidia-smi counts (`2` is GPU 2)",
        ),
    ] = None,
    lifeline: Annotated[int | None, typer.Option("--lifeline", hidden=True)] = None,
) -> None:
    """Consume requests: the worker. SIGTERM or Ctrl-C finishes the work in hand; a second one leaves at once.

    Nothing is lost either way: what was not finished goes back to the queue, and the exit code is 0.

    SIGHUP reads `.env` again, and what may change under work in hand does: log level, workers, execution timeout,
    inputs, presigned URLs, ACESTEP_SCRATCH_MIN_GB. The log names what needs a restart.

    With `--gpus` one process watches over a worker for each GPU. The settings hold for each of them; names get
    `-gpu0`, `-gpu1`, … appended, health ports count up from ACESTEP_HTTP_PORT. A worker that dies is replaced.
    """
    from acestep_consumer.commands.fleet import join_fleet, run_fleet  # noqa: PLC0415 - the other commands start faster so

    given = {
        "ACESTEP_QUEUE_WORKERS": workers,
        "ACESTEP_CONFIG_PATH": model,
        "ACESTEP_CHECKPOINT_DIR": checkpoints,
        "ACESTEP_DEVICE": device,
        "ACESTEP_HTTP_PORT": http_port,
    }
    settings = _settings(**given)
    shared = {name: str(value) for name, value in given.items() if value is not None}
    if gpus is not None:
        raise typer.Exit(run_fleet(gpus, settings, shared, grace_s=grace))
    if lifeline is not None:
        join_fleet(lifeline, settings)
    from acestep_consumer.app import run_worker  # noqa: PLC0415 - a fleet does not need it

    _await(run_worker(settings, grace_s=grace, read_again=partial(settings_module.load, overrides=shared)))


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
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print one line of JSON: id, place and expected time; with --wait the final event"),
    ] = False,
) -> None:
    """Publish one request, from flags or a JSON file (flags win), and optionally wait for its songs.

    Prints the task id; on a terminal also the place in the queue and when the songs will be there. That is reckoned
    from what waits, and from what workers have in hand and took lately; priorities and longer requests can change it.
    With `--json`: `task_id`, `position` (1 is next, 0 in a worker's hands), `in_hand`, `workers`, `expected_s` and
    `note`; what is not known is null, and `note` says why.
    """
    from acestep_consumer.commands import submit as command  # noqa: PLC0415 - see run

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
    order = command.SubmitOptions(body, priority, wait=wait or download is not None, download=download, as_json=as_json)
    _await(command.submit(_settings(), order, note))


@app.command()
def watch(
    task_id: Annotated[str | None, typer.Argument(help="only this job")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one event a line, as JSON")] = False,
) -> None:
    """Print events as they come, until Ctrl-C; with a task id, until that job ends."""
    from acestep_consumer.commands import watch as command  # noqa: PLC0415 - see run

    _await(command.watch(_settings(), task_id, note, as_json=as_json))


@app.command()
def listen(
    host: Annotated[str, typer.Option("--host", help="address to listen on; others than loopback let strangers in")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0: a free one")] = 8090,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", help="one more host name that the page is called by, such as a proxy's"),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="open it in this machine's browser")] = False,
) -> None:
    """Serve a page to hear the songs: jobs as they happen, players with waveforms, and a form to ask for more.

    It shows jobs from its start on: all that wait or run, and the last 100 that ended. Earlier ones come by their id.
    Songs come out of S3 through this command, so the browser needs no access to it. Ctrl-C ends it; jobs go on.

    There is no login: whoever reaches the page can hear everything, submit and cancel. For use from elsewhere, forward
    the port (`ssh -L 8090:127.0.0.1:8090 HOST`) or put a proxy with a login in front and allow its name with `--name`.
    """
    from acestep_consumer.commands import listen as command  # noqa: PLC0415 - see run

    stand = command.ListenOptions(host=host, port=port, names=tuple(names or ()), show=open_)
    _await(command.listen(_settings(), stand, note))


@app.command()
def cancel(
    task_ids: Annotated[list[str], typer.Argument(metavar="TASK_ID", help="what `submit` printed")],
    wait: Annotated[bool, typer.Option("--wait", help="stay until they have ended, and print how")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0, help="wait no longer, seconds")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print terminal events, a line of JSON each")] = False,
) -> None:
    """Ask for jobs to stop: one that runs ends within a step, one that waits is dropped when it comes up.

    It holds for seven days, for workers that start later too. An id can be submitted again afterwards. Without `--wait`
    the ids are printed once the broker has the cancellation. With it, 0 means that all were cancelled; 1 that one ended
    otherwise before, or did not end in time. A job that ended long ago does not end again: give a `--timeout`.
    """
    from acestep_consumer.commands import cancel as command  # noqa: PLC0415 - see run
    from acestep_schemas.request import TASK_ID_PATTERN  # noqa: PLC0415 - as above

    for task_id in task_ids:
        if not re.fullmatch(TASK_ID_PATTERN, task_id):
            raise typer.BadParameter(f"{task_id!r} is no task id: 1 to 128 letters, digits, - and _")
    waits = wait or timeout is not None or as_json
    order = command.CancelOptions(tuple(dict.fromkeys(task_ids)), wait=waits, timeout_s=timeout, as_json=as_json)
    _await(command.cancel(_settings(), order, note))


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="`request`, `events`, `manifest`, or `export`")] = "request",
    folder: Annotated[Path | None, typer.Argument(help="with `export`: the folder to write to")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="`export` prints its files as one JSON list; the rest is JSON anyway")
    ] = False,
) -> None:
    """Print the JSON Schema of requests, events or manifests, or write all documents to a folder.

    - `schema request` – what a producer may send
    - `schema export docs` – JSON Schemas of the request, of each event and of the manifest, and `asyncapi.json`: an
      AsyncAPI 3.0 document of exchanges, queues, operations and messages with examples
    """
    from acestep_schemas.export import SCHEMAS, write  # noqa: PLC0415 - see run

    if (what == "export") is (folder is None):
        raise typer.BadParameter("`export` takes a folder, and nothing else does")
    if folder is not None:
        paths = [str(path) for path in write(folder)]
        sys.stdout.write((json.dumps(paths) if as_json else "\n".join(paths)) + "\n")
    elif what in SCHEMAS:
        sys.stdout.write(json.dumps(SCHEMAS[what](), indent=2) + "\n")
    else:
        raise typer.BadParameter(f"{what}: choose one of {', '.join(SCHEMAS)}, export")


@app.command()
def topology(
    declare: Annotated[bool, typer.Option("--declare", help="create it on the broker; repeating is harmless")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="with `--declare`: print what was declared; without, it is JSON anyway")
    ] = False,
) -> None:
    """Print exchanges, queues and bindings as RabbitMQ definitions, or declare them."""
    from acestep_consumer.commands import topology as command  # noqa: PLC0415 - see run

    _await(command.topology(_settings(), note, declare=declare, as_json=as_json))


@app.command()
def plan(
    vram: Annotated[float | None, typer.Option("--vram", min=0, max=10_000, help="GB of a card; 0: no GPU")] = None,
    card: Annotated[str | None, typer.Option("--card", help="its name as nvidia-smi prints it, for its speed")] = None,
    duration: Annotated[float, typer.Option("--duration", min=1, max=3600, help="seconds of a song")] = 300,
    batch: Annotated[int, typer.Option("--batch", min=1, help="songs a request")] = 1,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="the 5Hz LM plans each song")] = True,
    steps: Annotated[int, typer.Option("--steps", min=1, max=200, help="denoising steps")] = 8,
    guided: Annotated[
        bool | None,
        typer.Option("--guided/--no-guided", help="classifier-free guidance; unset: unless the model is a turbo"),
    ] = None,
    audio_format: Annotated[str, typer.Option("--format", help="mp3, wav, wav32, flac, ogg, opus, aac")] = "mp3",
    model: Annotated[str | None, typer.Option("--model", help="ACESTEP_CONFIG_PATH")] = None,
    cores: Annotated[
        int | None,
        typer.Option("--cores", min=1, help="processor cores that encode; unset: this machine's, with --vram: enough"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what this machine's card can do, or one of `--vram` GB: limits, what fits, workers, songs a minute.

    No model is loaded and nothing is started. The settings count as for `run`: models, LM, offloading, MAX_CUDA_VRAM,
    ACESTEP_TIER_TABLE. The songs a minute are reckoned from measurements on one kind of card; the answer says which,
    and how they were carried over to yours.

    - `plan` – this card, thinking, 1 song of 300 s a request
    - `plan --vram 48 --card "NVIDIA L40S"` – a card to buy
    - `plan --duration 120 --batch 2 --no-thinking --model acestep-v15-base --steps 50` – another workload

    `ACESTEP_QUEUE_WORKERS=auto` finds the number of workers while it works; this command says where that will end.
    """
    from acestep_consumer.audio.formats import FORMATS  # noqa: PLC0415 - as above
    from acestep_consumer.commands.plan import run as command  # noqa: PLC0415 - see run
    from acestep_consumer.commands.plan.survey import PlanQuestion  # noqa: PLC0415 - as above

    if audio_format not in FORMATS:
        raise typer.BadParameter(f"--format {audio_format}: choose one of {', '.join(FORMATS)}")
    if not (math.isfinite(vram or 0) and math.isfinite(duration)):
        raise typer.BadParameter("--vram and --duration are numbers")
    question = PlanQuestion(
        vram_gb=vram,
        card=card,
        duration_s=duration,
        batch=batch,
        thinking=thinking,
        steps=steps,
        guided=guided,
        audio_format=audio_format,
        cores=cores,
    )
    raise typer.Exit(command.plan(_settings(ACESTEP_CONFIG_PATH=model), question, note, as_json=as_json))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Look at everything that a worker needs, in under five seconds: a line each, ok, warn or fail, with the fix.

    Settings; the broker, its version, topology, limit and this user's permissions; storage, with a throw-away object;
    clocks; the card and its tier; models on disk; encoders; the scratch folder; the port. Nothing is changed and no
    model is loaded. Exit code 0: a worker can start here. 6: something failed.
    """
    from acestep_consumer.commands.doctor import run as command  # noqa: PLC0415 - see run

    _await(command.doctor(as_json=as_json))


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again, until Ctrl-C")] = False,
    sample: Annotated[float, typer.Option("--sample", min=0, max=3600, help="seconds to listen to events first")] = 3.0,
    every: Annotated[float, typer.Option("--every", min=0.2, max=3600, help="with --watch: seconds in between")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object; with --watch one a line")] = False,
) -> None:
    """Say how the queue is doing: what waits, in whose hands the rest is, how fast it goes, when it is empty.

    `waiting` counts against the limit; accepted but unfinished are at most the limit and the prefetch of all workers.
    With ACESTEP_MANAGEMENT_URL the broker tells who consumes, with which prefetch, and the throughput of the last
    minutes. Without it, that is known only as far as events tell while this command listens: `--sample 60` hears more.
    With ACESTEP_ROUTE_BY_TIER, what waits for larger cards is told by tier.
    """
    from acestep_consumer.commands.status import run as command  # noqa: PLC0415 - see run

    options = command.StatusOptions(watch=watch, sample_s=sample, every_s=every, as_json=as_json)
    _await(command.status(_settings(), options, note))


@app.command()
def top(
    url: Annotated[
        str | None,
        typer.Option("--url", help="the worker's address; unset: ACESTEP_HTTP_HOST and ACESTEP_HTTP_PORT"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one answer, after a second")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON each second; with --once one object")] = False,
) -> None:
    """Watch one worker at work: jobs in hand, songs a minute, how busy the device is, memory, packs, S3.

    It reads the worker's own `/metrics` and `/readyz`, every second, until Ctrl-C. Rates are those of the last minute,
    or since this command began. Workers of a fleet (`run --gpus`) have ports that count up: `--url http://host:8081`.
    """
    from acestep_consumer.commands.top import run as command  # noqa: PLC0415 - see run

    try:
        address = command.address_of(_settings().worker) if url is None else command.completed(url)
    except command.NoWorker as error:
        raise typer.BadParameter(str(error)) from error
    _await(command.top(command.TopOptions(address, once=once, as_json=as_json), note))


@app.command("tiny-checkpoint")
def tiny_checkpoint(
    folder: Annotated[
        Path, typer.Argument(help="gets `acestep-v15-turbo`, `acestep-v15-base` and `acestep-5Hz-lm-0.6B`")
    ],
) -> None:
    """Write small models with random weights: real code, no music. Use as ACESTEP_CHECKPOINT_DIR."""
    try:
        from acestep_consumer.engine.testing import tiny_checkpoint as dit  # noqa: PLC0415 - needs torch
        from acestep_consumer.engine.testing import tiny_lm as lm  # noqa: PLC0415 - as above
    except ImportError as error:
        note.print(f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
        raise typer.Exit(Exit.USAGE) from error
    dit.write(folder)
    lm.write(folder)
    note.print(f"wrote {folder}; the weights are random: what they sing is noise")


@dead.command("list")
def dead_list(
    code: Code = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="show so many at most, the oldest")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON each")] = False,
) -> None:
    """List dead letters, oldest first: task id, error code, when, tries, size, reason.

    Nothing is removed and the order stays. They are taken for the time of the look and put back; the broker marks them
    as redelivered, which changes nothing.
    """
    from acestep_consumer.commands.dead import run as command  # noqa: PLC0415 - see run

    choice = _choice(None, code, since)
    raise typer.Exit(command.show_list(_settings(), choice, note, limit=limit, as_json=as_json))


@dead.command("show")
def dead_show(
    task_id: Annotated[str, typer.Argument(help="task id or message id")],
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON each, in place of an indented one")] = False,
) -> None:
    """Print a dead letter in full as JSON: why, properties, headers, body. Secrets are masked."""
    from acestep_consumer.commands.dead import run as command  # noqa: PLC0415 - see run

    raise typer.Exit(command.show_one(_settings(), _choice(task_id, None, None), note, as_json=as_json))


@dead.command("requeue")
def dead_requeue(
    task_id: Annotated[str | None, typer.Argument(help="task id or message id")] = None,
    everything: Annotated[bool, typer.Option("--all", help="all of them, or all that the filters leave")] = False,
    code: Code = None,
    since: Since = None,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON each, as `dead list` prints it")] = False,
) -> None:
    """Give dead letters another chance: same body, same id, at the end of the queue. Prints their task ids.

    Each is removed only after the broker has confirmed the new message, so none is lost. When the queue is full it
    stops with 3, and the others stay. A deadline in the queue (`expiration`) is not set again. The job ends a second
    time then: after the terminal event that it had comes another one.
    """
    from acestep_consumer.commands.dead import run as command  # noqa: PLC0415 - see run

    chosen = _chosen(task_id, code, since, everything=everything)
    raise typer.Exit(command.requeue(_settings(), chosen, note, as_json=as_json))


@dead.command("purge")
def dead_purge(
    task_id: Annotated[str | None, typer.Argument(help="task id or message id")] = None,
    everything: Annotated[bool, typer.Option("--all", help="all of them, or all that the filters leave")] = False,
    code: Code = None,
    since: Since = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON each, as `dead list` prints it")] = False,
) -> None:
    """Remove dead letters for good, after a question that says how many."""
    from acestep_consumer.commands.dead import run as command  # noqa: PLC0415 - see run

    chosen = _chosen(task_id, code, since, everything=everything)
    raise typer.Exit(command.purge(_settings(), chosen, note, None if yes else _agree, as_json=as_json))


def _agree(question: str) -> bool:
    try:
        with redirect_stdout(sys.stderr):  # with `err=True` a blank of the question still goes to stdout
            return typer.confirm(question)
    except typer.Abort:  # nobody is there to answer
        note.print("no answer; --yes does not ask")
        return False


def _chosen(task_id: str | None, code: str | None, since: str | None, *, everything: bool) -> "DeadLetterFilter":
    """Which ones an order that changes things is about: it must say so."""
    if (task_id is None) is not everything:
        raise typer.BadParameter("name a task id, or give --all")
    return _choice(task_id, code, since)


def _choice(task_id: str | None, code: str | None, since: str | None) -> "DeadLetterFilter":
    from acestep_consumer.commands.dead.run import CODES, DeadLetterFilter, read_since  # noqa: PLC0415 - see run

    if code is not None and code not in CODES:
        raise typer.BadParameter(f"--code {code}: choose one of {', '.join(CODES)}")
    try:
        return DeadLetterFilter(task_id, code, None if since is None else read_since(since, datetime.now(UTC)))
    except ValueError as error:
        raise typer.BadParameter(f"--since {error}") from error


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
