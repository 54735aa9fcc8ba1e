# SPDX-License-Identifier: Apache-2.0
"""The command line: all commands, their flags and help texts. Each imports what it needs when it runs."""

import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from acestep_consumer.commands.base import (
    PROGRAM,
    Command,
    Group,
    UsageError,
    check_task_id,
    escape_unencodable,
    exit_after,
    is_output_unwritable,
    load_settings,
    note,
    open_missing_streams,
    overrides,
    print_error,
    print_output_unwritable,
    print_usage_error,
    print_version,
)
from acestep_consumer.commands.dead.cli import app as dead
from acestep_consumer.commands.models.cli import app as models
from acestep_consumer.commands.submit.cli import submit
from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.exit_codes import Exit, listed, unexpected

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ACE-Step 1.5 music generation behind RabbitMQ: requests in, songs in S3, events out.",
    epilog=listed(),
)

JOBS = "Jobs"
OPERATION = "Operation"
REFERENCE = "Reference and testing"


def main() -> None:
    """Run the command line; errors are one line each, and Ctrl-C exits with 130.

    Raises unexpected errors with ``ACESTEP_LOG_LEVEL=debug``.
    """
    open_missing_streams()
    escape_unencodable()
    try:
        # The name is fixed, because completion cannot call `python -m acestep_consumer` by that.
        code = app(prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        code = print_usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        code = Exit.INTERRUPTED
    except SystemExit as end:
        # Typer and Rich end the program with 1 where nobody reads its output.
        code = Exit.READER_GONE if end.code == 1 else end.code
    except Exception as error:
        if is_output_unwritable(error):
            raise SystemExit(print_output_unwritable(error)) from error
        if os.environ.get("ACESTEP_LOG_LEVEL") == "debug":
            raise
        print_error(unexpected(error))
        code = Exit.UNEXPECTED
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the interpreter's end
    raise SystemExit(code)


_Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Primary DiT model, a name, folder or hub id: ACESTEP_CONFIG_PATH."),
]


def _settings_by_section(*titles: str) -> str:
    """Return the settings of some sections as Markdown, for the end of a command's help."""
    parts = ["**Settings** (environment or `.env`; defaults in brackets)"]
    for title, rows in settings_module.describe_sections():
        if title not in titles:
            continue
        lines = "\n".join(f"- `{name}` ({default}): {about}" for name, default, about in rows)
        parts.append(f"**{title}**\n\n{lines}")
    return "\n\n".join(parts)


@app.callback()
def _program(
    _version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("submit", cls=Command, rich_help_panel=JOBS)(submit)


@app.command(cls=Command, rich_help_panel=JOBS)
def check(
    body: Annotated[Path, typer.Argument(metavar="BODY", help="Body of a request; `-` reads standard input.")],
    tier: Annotated[
        str | None, typer.Option("--tier", metavar="NAME", help="Tier of the worker; unset: the largest.")
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option("--vram", min=0, max=10_000, metavar="GB", help="Memory of its GPU, in place of --tier; 0: none."),
    ] = None,
    lm: Annotated[
        bool | None, typer.Option("--lm/--no-lm", help="Whether it has a 5Hz LM; unset: as the tier has by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Its primary DiT model: ACESTEP_CONFIG_PATH.")
    ] = None,
    form: Annotated[bool, typer.Option("--form", help="BODY is a form (`a=1&b=2`), not JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Reject wrong values: ACESTEP_STRICT_REQUESTS.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a worker makes of a request, without a broker.

    Prints the effective request, what the tier's limits change, and the warnings that the event would have; what the
    renderer alone knows is left out. The settings of `run` apply: models, ACESTEP_TIER_TABLE, ACESTEP_STRICT_REQUESTS
    and the defaults of requests. A model's family is told from its name.

    Exit code 0: it would be accepted. 1: it would be rejected, or fail; the error's code and text are those of the
    event. 2: the body cannot be read, or there is no such tier.
    """
    from acestep_consumer.commands import check as command  # noqa: PLC0415 - the other commands start faster so

    if tier is not None and vram is not None:
        raise UsageError("--tier and --vram exclude each other")
    options = command.CheckOptions(file=body, form=form, strict=strict, tier=tier, vram_gb=vram, lm=lm, as_json=as_json)
    raise typer.Exit(command.check(load_settings(ACESTEP_CONFIG_PATH=model), options, note))


@app.command(cls=Command, rich_help_panel=JOBS)
def watch(
    task_id: Annotated[str | None, typer.Argument(metavar="TASK_ID", help="Only this job.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each event.")] = False,
) -> None:
    """Follow the events of all jobs, or of one.

    With a task id it stops when that job ends (exit code 0); otherwise when you press Ctrl-C (exit code 130).
    """
    from acestep_consumer.commands import watch as command  # noqa: PLC0415 - the other commands start faster so

    if task_id is not None:
        check_task_id(task_id)
    exit_after(command.watch(load_settings(), task_id, note, as_json=as_json))


@app.command(cls=Command, rich_help_panel=JOBS)
def cancel(
    task_ids: Annotated[list[str], typer.Argument(metavar="TASK_ID…", help="Task ids, as `submit` prints them.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the jobs to end, and print how they ended.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="SECONDS", help="Longest wait; implies --wait.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print terminal events, one line of JSON each; implies --wait.")
    ] = False,
) -> None:
    """Cancel waiting or running jobs.

    A running job stops within a denoising step; a waiting one is dropped when a worker takes it. A cancellation is
    valid for 7 days, also for workers that start later. The id can be submitted again afterwards.

    Without `--wait` the ids are printed once the broker has the cancellation; whether such jobs exist is not checked.
    With it, exit code 0 means that all were cancelled, and 1 that a job ended otherwise or not in time. A job that
    ended earlier has no second terminal event: use `--timeout`.
    """
    from acestep_consumer.commands import cancel as command  # noqa: PLC0415 - as above

    for task_id in task_ids:
        check_task_id(task_id)
    waits = wait or timeout is not None or as_json
    options = command.CancelOptions(tuple(dict.fromkeys(task_ids)), wait=waits, timeout_s=timeout, as_json=as_json)
    exit_after(command.cancel(load_settings(), options, note))


@app.command(cls=Command, rich_help_panel=JOBS)
def download(
    task_ids: Annotated[list[str], typer.Argument(metavar="TASK_ID…", help="Tasks that have ended.")],
    folder: Annotated[
        Path, typer.Option("--folder", metavar="FOLDER", file_okay=False, help="Where to; made when missing.")
    ] = Path(),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each job: its id and its songs' paths.")
    ] = False,
) -> None:
    """Download the songs of earlier jobs, however long ago they ended.

    Songs become `TASK_ID-0.mp3` and so on; lyrics with times lie beside them, `.lrc` and `.vtt`. Prints the songs'
    paths. Each file appears whole and with the SHA-256 of its event, or not at all: what is there already and right is
    left alone, and an interrupted download is resumed by the same command. The settings of storage apply
    (`ACESTEP_S3_…`); neither broker nor worker is needed.

    - `download first-take` – into this folder
    - `lineage first-take --json | jq -r '.tasks[].task_id' | xargs acestep-consumer download --folder family`

    Exit code 0: all songs are there. 1: a job has no songs, or no result; those of the others are there. 4: the same of
    a song that is gone, or not the one of its event; or the storage is out of reach.
    """
    from acestep_consumer.commands import download as command  # noqa: PLC0415 - as above

    for task_id in task_ids:
        check_task_id(task_id)
    exit_after(command.download(load_settings(), tuple(dict.fromkeys(task_ids)), folder, note, as_json=as_json))


@app.command(cls=Command, rich_help_panel=JOBS)
def lineage(
    task_id: Annotated[str, typer.Argument(metavar="TASK_ID", help="A task that has ended.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: the tasks, oldest first.")] = False,
) -> None:
    """Print the family of a song: what it was made from, and what was made from it.

    A line for each task: its id, what made it (the task type, or the edit), its songs, its prompt; below it what was
    made from its songs. The task that you asked for is marked. A task can be there twice, if it comes from two songs.

    Ancestors are read from the manifests in S3, where each names its parents; descendants from small objects that
    workers write below the parent (`…/TASK_ID/children/`), as well as they can: an outage, or a lifecycle rule, may
    have cost one. Tasks whose objects were deleted are shown as such. The settings of storage apply (`ACESTEP_S3_…`);
    neither broker nor worker is needed.

    - `lineage first-take` – the whole family of `first-take`
    - `lineage first-take --json | jq '.tasks[].task_id'`

    Exit code 0: it was found. 1: the storage has no such task. 4: the storage is out of reach.
    """
    from acestep_consumer.commands import lineage as command  # noqa: PLC0415 - as above

    check_task_id(task_id)
    exit_after(command.lineage(load_settings(), task_id, note, as_json=as_json))


@app.command(cls=Command, rich_help_panel=JOBS)
def listen(
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on; anything but loopback exposes the page: there is no login.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, metavar="PORT", help="Port; 0: any free one.")
    ] = 8090,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="HOST", help="Additional host name of the page, such as a proxy's."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a web page with players, progress and a request form.

    The page shows all active jobs and the last 100 that ended since it was started; older ones can be opened by id.
    Songs are streamed from S3 through this command, so browsers need no access to S3. Press Ctrl-C to stop it (exit
    code 130); jobs are not affected.

    There is no login: everyone who reaches the page can hear all songs, submit and cancel. For access from elsewhere,
    forward the port (`ssh -L 8090:127.0.0.1:8090 HOST`), or put a proxy with a login in front and pass its host name
    with `--name`.
    """
    from acestep_consumer.commands import listen as command  # noqa: PLC0415 - as above

    options = command.ListenOptions(host=host, port=port, names=tuple(names or ()), show=open_)
    exit_after(command.listen(load_settings(), options, note))


@app.command(cls=Command, rich_help_panel=OPERATION, epilog=_settings_by_section("Broker", "Storage (S3)", "Gateway"))
def gateway(
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen at: ACESTEP_API_HOST.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="PORT", help="Port to listen at: ACESTEP_API_PORT.")
    ] = None,
) -> None:
    """Serve ACE-Step's REST API: a request becomes a message, an event an answer.

    Programs for ACE-Step's own server work unchanged. Nothing is stored here: start as many as you like, behind any
    load balancer, and restart them at any time. SIGTERM or Ctrl-C stops it; jobs are not affected. SIGHUP reads `.env`
    and the key file again.

    Without ACESTEP_API_KEY it answers on this machine alone, and does not start on any other address.
    """
    from acestep_consumer.commands import gateway as command  # noqa: PLC0415 - as above

    given = overrides(ACESTEP_API_HOST=host, ACESTEP_API_PORT=port)
    read_again = partial(settings_module.load, overrides=given)
    exit_after(command.gateway(load_settings(**given), read_again, note))


@app.command(
    cls=Command,
    rich_help_panel=OPERATION,
    epilog=_settings_by_section("Broker", "Storage (S3)", "Audio inputs", "Engine", "Worker"),
)
def run(
    workers: Annotated[
        str | None,
        typer.Option("--workers", "-w", metavar="N", help="Concurrent jobs, or `auto`: ACESTEP_QUEUE_WORKERS."),
    ] = None,
    model: _Model = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            "--checkpoints", metavar="FOLDER", help="Folder with a folder for each model: ACESTEP_CHECKPOINT_DIR."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, xpu, mps or cpu: ACESTEP_DEVICE."),
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option("--http-port", metavar="PORT", help="Port for health checks and metrics: ACESTEP_HTTP_PORT."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, metavar="SECONDS", help="How long running jobs may take after SIGTERM.")
    ] = 600.0,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="all|0,2,…",
            help="Run one worker per GPU: `all`, or numbers as in nvidia-smi (`2` is GPU 2).",
        ),
    ] = None,
    lifeline: Annotated[int | None, typer.Option("--lifeline", hidden=True)] = None,
) -> None:
    """Run a worker: take requests, render songs, upload them.

    SIGTERM or Ctrl-C lets running jobs finish; a second one stops at once. Either way nothing is lost: unfinished
    requests go back to the queue, and the exit code is 0 (130 if Ctrl-C comes before the first log line).

    SIGHUP reads `.env` again and applies what can change at run time: log level, workers, execution timeout, inputs,
    presigned URLs, ACESTEP_SCRATCH_MIN_GB. The log names settings that need a restart.

    `--gpus` starts one worker process per GPU, all on the same queue, and replaces those that die. They share all
    settings; worker ids get the suffix `-gpu0`, `-gpu1`, …, and health ports count up from ACESTEP_HTTP_PORT.
    """
    from acestep_consumer.commands.run import exit_quietly_on_signals, join_group, run_group  # noqa: PLC0415 - as above

    exit_quietly_on_signals()
    shared = overrides(
        ACESTEP_QUEUE_WORKERS=workers,
        ACESTEP_CONFIG_PATH=model,
        ACESTEP_CHECKPOINT_DIR=checkpoints,
        ACESTEP_DEVICE=device,
        ACESTEP_HTTP_PORT=http_port,
    )
    settings = load_settings(**shared)
    if gpus is not None:
        raise typer.Exit(run_group(gpus, settings, shared, grace_s=grace))
    if lifeline is not None:
        join_group(lifeline, settings)
    from acestep_consumer.app import run_worker  # noqa: PLC0415 - the parent of several workers does not need it

    exit_after(run_worker(settings, grace_s=grace, read_again=partial(settings_module.load, overrides=shared)))


@app.command(cls=Command, rich_help_panel=OPERATION)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, max=3600, metavar="SECONDS", help="Longest wait for each check.")
    ] = 30,
) -> None:
    """Check everything a worker needs, and say how to fix it.

    Takes a few seconds and prints one line per check: settings; broker, topology, queue limit, permissions; storage,
    with a temporary object; clocks; GPU and tier; models on disk; encoders; scratch folder; port. Nothing is changed,
    and no model is loaded. A slow answer is a warning; only a refusal, or silence until the timeout, is a failure.

    Exit code 0: a worker can start here. 6: a check failed.
    """
    from acestep_consumer.commands.doctor import run as command  # noqa: PLC0415 - as above

    exit_after(command.doctor(as_json=as_json, timeout_s=timeout))


@app.command(cls=Command, rich_help_panel=OPERATION)
def plan(
    vram: Annotated[
        float | None,
        typer.Option("--vram", min=0, max=10_000, metavar="GB", help="Memory of a GPU, instead of its own; 0: none."),
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="NAME", help='Name of a GPU, such as "RTX 4090" or "L40S".')
    ] = None,
    duration: Annotated[
        float, typer.Option("--duration", min=1, max=3600, metavar="SECONDS", help="Length of a song.")
    ] = 300,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Songs per request.")] = 1,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="Plan each song with the 5Hz LM.")] = True,
    steps: Annotated[int, typer.Option("--steps", min=1, max=200, metavar="N", help="Denoising steps.")] = 8,
    guided: Annotated[
        bool | None,
        typer.Option("--guided/--no-guided", help="Classifier-free guidance; unset: on unless the model is a turbo."),
    ] = None,
    audio_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="mp3, wav, wav32, flac, ogg, opus or aac.")
    ] = "mp3",
    model: _Model = None,
    cores: Annotated[
        int | None,
        typer.Option(
            "--cores",
            min=1,
            metavar="N",
            help="CPU cores for encoding; unset: this machine's, or enough for --vram and --card.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate what a GPU can do: limits, models that fit, songs per minute.

    For this machine's GPU, or for the one that `--vram` and `--card` describe. No model is loaded and nothing is
    started. The settings of `run` apply: models, LM, offloading, MAX_CUDA_VRAM, ACESTEP_TIER_TABLE. Songs per minute
    are calculated from measurements on one type of GPU; the output says which, and how they were scaled. GB are GiB.

    - `plan` – this GPU, thinking, 1 song of 300 s per request
    - `plan --card "RTX 4090"` – another GPU, with the memory and the speed that it is sold with
    - `plan --vram 48 --card "Some GPU"` – one that is not known: with its memory and an H200's speed
    - `plan --duration 120 --batch 2 --no-thinking --model acestep-v15-base --steps 50` – another workload

    `ACESTEP_QUEUE_WORKERS=auto` finds the number of workers at run time; this command estimates the result.
    """
    from acestep_consumer.audio.formats import FORMATS  # noqa: PLC0415 - as above
    from acestep_consumer.commands.plan import run as command  # noqa: PLC0415 - as above
    from acestep_consumer.commands.plan.survey import PlanQuestion  # noqa: PLC0415 - as above

    if audio_format not in FORMATS:
        raise UsageError(f"--format {audio_format}: choose one of {', '.join(FORMATS)}")
    if not (math.isfinite(vram or 0) and math.isfinite(duration)):
        raise UsageError("--vram and --duration must be finite numbers")
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
    raise typer.Exit(command.plan(load_settings(ACESTEP_CONFIG_PATH=model), question, note, as_json=as_json))


@app.command(cls=Command, rich_help_panel=OPERATION)
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    sample: Annotated[
        float,
        typer.Option("--sample", min=0, max=3600, metavar="SECONDS", help="How long to listen to events first."),
    ] = 3.0,
    every: Annotated[
        float,
        typer.Option("--every", min=0.2, max=3600, metavar="SECONDS", help="Refresh interval of --watch."),
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; with --watch one per line.")] = False,
) -> None:
    """Show the queue, its workers, throughput and backlog.

    The queue limit counts waiting requests. In progress are at most as many as the prefetch of all workers.

    With ACESTEP_MANAGEMENT_URL the broker reports consumers, prefetch and the throughput of the last minutes. Without
    it, these come from workers that answer and from events that arrive while this command listens; `--sample 60` sees
    more. With ACESTEP_ROUTE_BY_TIER, requests forwarded to larger GPUs are shown by tier.
    """
    from acestep_consumer.commands.status import run as command  # noqa: PLC0415 - as above

    options = command.StatusOptions(watch=watch, sample_s=sample, every_s=every, as_json=as_json)
    exit_after(command.status(load_settings(), options, note))


@app.command(cls=Command, rich_help_panel=OPERATION)
def top(
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL", help="Worker's address; unset: from ACESTEP_HTTP_HOST and ACESTEP_HTTP_PORT."
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once, after one second.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per second; with --once one object.")
    ] = False,
) -> None:
    """Show live metrics of one worker.

    Jobs, songs per minute, device load and memory, batches and S3 traffic, from the worker's `/metrics` and `/readyz`,
    every second until Ctrl-C. Rates cover the last minute, or the time since this command started. Workers of
    `run --gpus` have consecutive ports: `--url http://host:8081`.
    """
    from acestep_consumer.commands.top import run as command  # noqa: PLC0415 - as above

    try:
        address = command.address_of(load_settings().worker) if url is None else command.completed(url)
    except command.NoWorker as error:
        raise UsageError(str(error)) from error
    exit_after(command.top(command.TopOptions(address, once=once, as_json=as_json), note))


app.add_typer(dead, name="dead", rich_help_panel=OPERATION)
app.add_typer(models, name="models", rich_help_panel=OPERATION)


@app.command(cls=Command, rich_help_panel=OPERATION)
def topology(
    declare: Annotated[
        bool, typer.Option("--declare", help="Create them on the broker; repeating changes nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --declare: print what was declared. Otherwise it is JSON anyway.")
    ] = False,
) -> None:
    """Print the exchanges, queues and bindings, or declare them.

    The output is in RabbitMQ's format of definitions.
    """
    from acestep_consumer.commands import topology as command  # noqa: PLC0415 - as above

    exit_after(command.topology(load_settings(), note, declare=declare, as_json=as_json))


@app.command(cls=Command, rich_help_panel=REFERENCE)
def schema(
    what: Annotated[
        str, typer.Argument(metavar="NAME", help="`request`, `events`, `manifest`, or `export`.")
    ] = "request",
    folder: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Where `export` writes to.")] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the names of exported files as one JSON list; schemas are JSON anyway."),
    ] = False,
) -> None:
    """Print or export the JSON Schemas and the AsyncAPI document.

    - `schema request` – what a producer may send
    - `schema export docs` – JSON Schemas of the request, of each event and of the manifest, and `asyncapi.json`: an
      AsyncAPI 3.0 document of exchanges, queues, operations and messages with examples
    """
    from acestep_schemas.export import SCHEMAS, write  # noqa: PLC0415 - as above

    if (what == "export") is (folder is None):
        raise UsageError("`export` needs a folder; the others take none")
    if folder is not None:
        try:
            paths = [str(path) for path in write(folder)]
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
        sys.stdout.write((json.dumps(paths) if as_json else "\n".join(paths)) + "\n")
    elif what in SCHEMAS:
        sys.stdout.write(json.dumps(SCHEMAS[what](), indent=2) + "\n")
    else:
        raise UsageError(f"{what}: choose one of {', '.join(SCHEMAS)}, export")


@app.command("tiny-checkpoint", cls=Command, rich_help_panel=REFERENCE)
def tiny_checkpoint(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Gets `acestep-v15-turbo`, `acestep-v15-base`, `acestep-5Hz-lm-0.6B`."),
    ],
) -> None:
    """Write small test models with random weights.

    They run the real code but produce noise. Use the folder as ACESTEP_CHECKPOINT_DIR.
    """
    from acestep_consumer.commands.tiny_checkpoint import write  # noqa: PLC0415 - as above

    raise typer.Exit(write(folder, note))
