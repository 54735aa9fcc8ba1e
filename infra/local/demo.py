# SPDX-License-Identifier: Apache-2.0
"""The demo: starts servers and a worker with a tiny checkpoint, submits one request, and checks the audio.

Messages go to standard error. Standard output has two lines: the path of the terminal event, and that of the audio.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.local.ports import LOOPBACK, PortClaim
from infra.local.process import Process, ServerError, tail
from infra.local.stack import Stack, say
from infra.local.state import LOCAL, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

DURATION_S = 10
PROMPT = "warm lo-fi piano, brushed drums, late at night"
LYRICS = "[verse]\nA message waits in line\nA melody comes out\n"

_TINY_MODEL = "acestep-v15-turbo"
_READY_TIMEOUT_S = 600.0
_READY_TIMEOUT_REAL_S = 1800.0
_SUBMIT_TIMEOUT_S = 1800.0
_WORKER_GRACE_S = 30.0
_REPORT_EVERY_S = 10.0
_POLL_S = 0.2

_RANDOM_WEIGHTS = """
The demo's model has random weights, so the audio is noise, but it went through the whole real pipeline.
For music you need a GPU and ACE-Step 1.5's checkpoints, as its own server has them. Set
  ACESTEP_CHECKPOINT_DIR   that server's folder "checkpoints"
  ACESTEP_CONFIG_PATH      the model in it; acestep-v15-turbo if unset
and run the demo again.
"""


def main(*, rest: bool = False) -> int:
    """Run the demo in a new folder, in which event, audio and log remain. Raises ServerError if a step fails.

    ``rest``: the request comes over ACE-Step's REST API.
    """
    folder = LOCAL / f"demo-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    say(f"Demo in {folder}: servers, model, worker, one request.")
    try:
        event, audio = (_RestDemo if rest else _Demo)(folder).run()
    finally:
        for part in ("servers", "checkpoints"):
            shutil.rmtree(folder / part, ignore_errors=True)
    print(event, audio, sep="\n", flush=True)
    return 0


class _Demo:
    """One run; everything it starts is stopped at the end of `run()`, in reverse order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._audio = folder / "audio"
        self._event_file = folder / "event.json"
        self._log = folder / "worker.log"
        self._real = bool(os.environ.get("ACESTEP_CHECKPOINT_DIR"))
        self._claim = PortClaim(1)

    def run(self) -> tuple[Path, Path]:
        """Run the demo; returns the paths of the terminal event and of the checked audio file."""
        with ExitStack() as running:
            say("1/4  Servers")
            environment = running.enter_context(Stack(self._folder / "servers"))
            variables = os.environ | environment.variables() | self._worker_variables()
            self._make_checkpoint(variables)
            worker = self._start_worker(variables)
            running.callback(self._stop_worker, worker)
            self._wait_until_ready(worker)
            audio = self._make_song(worker, variables)
        if not self._real:
            say(_RANDOM_WEIGHTS)
        say("The event and the song:")
        return self._event_file, audio

    def _worker_variables(self) -> dict[str, str]:
        variables = {"ACESTEP_HTTP_PORT": str(self._claim.ports[0])}
        if not self._real:
            variables["ACESTEP_CHECKPOINT_DIR"] = str(self._folder / "checkpoints")
            variables["ACESTEP_CONFIG_PATH"] = _TINY_MODEL
            variables["ACESTEP_INIT_LLM"] = "false"
        return variables

    def _make_checkpoint(self, variables: dict[str, str]) -> None:
        if self._real:
            say(f"2/4  Model: the checkpoints in {variables['ACESTEP_CHECKPOINT_DIR']}")
            return
        say("2/4  Model: writing a tiny one with random weights (about ten seconds) ...")
        command = [_consumer_command(), "tiny-checkpoint", variables["ACESTEP_CHECKPOINT_DIR"]]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServerError(f"tiny-checkpoint failed with status {done.returncode}:\n{done.stdout}{done.stderr}")

    def _start_worker(self, variables: dict[str, str]) -> Process:
        say("3/4  Worker: starting, loading the model ...")
        say(f"Its log: {self._log}")
        return Process([_consumer_command(), "run"], env=variables, folder=ROOT, log=self._log, guarded=True)

    def _stop_worker(self, worker: Process) -> None:
        say("Stopping the worker and the servers ...")
        worker.end(_WORKER_GRACE_S)
        self._claim.release()

    def _wait_until_ready(self, worker: Process) -> None:
        started = reported = time.monotonic()
        timeout_s = _READY_TIMEOUT_REAL_S if self._real else _READY_TIMEOUT_S
        url = f"http://{LOOPBACK}:{self._claim.ports[0]}/readyz"
        while not _answers_ok(url):
            now = time.monotonic()
            if not worker.running():
                raise ServerError(f"the worker ended with status {worker.returncode()}\n{tail(self._log)}")
            if now - started > timeout_s:
                raise ServerError(f"the worker was not ready within {timeout_s:.0f} s\n{tail(self._log)}")
            if now - reported > _REPORT_EVERY_S:
                say(f"Still loading the model, {now - started:.0f} s ...")
                reported = now
            time.sleep(_POLL_S)
        say(f"Ready after {time.monotonic() - started:.1f} s.")

    def _make_song(self, worker: Process, variables: dict[str, str]) -> Path:
        """Ask for a song, check it, and return its file."""
        return self._check(self._submit(worker, variables))

    def _submit(self, worker: Process, variables: dict[str, str]) -> dict[str, Any]:
        """Submit the request as any producer would; keeps the terminal event in a file and returns it."""
        say(f"4/4  Request: {PROMPT!r}, {DURATION_S} s ...")
        command = [
            _consumer_command(), "submit", "--prompt", PROMPT, "--lyrics", LYRICS, "--duration", str(DURATION_S),
            "--format", "wav", "--wait", "--download", str(self._audio), "--json",
        ]  # fmt: skip
        # Its estimate is of no use before the first job; its errors are.
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=variables, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as child:
            try:
                output, said = self._output(child, worker)
            finally:
                child.kill()
        if child.returncode:
            raise ServerError(f"submit ended with status {child.returncode}\n{said}\n{tail(self._log)}")
        self._event_file.write_text(output, encoding="utf-8")
        return self._event(output)

    def _output(self, child: subprocess.Popen[str], worker: Process) -> tuple[str, str]:
        """Return the command's two outputs. Raises ServerError if the worker dies meanwhile."""
        started = reported = time.monotonic()
        while True:
            try:
                return child.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if not worker.running():
                    raise ServerError(f"the worker died, status {worker.returncode()}\n{tail(self._log)}") from None
                if now - started > _SUBMIT_TIMEOUT_S:
                    raise ServerError(f"no result after {_SUBMIT_TIMEOUT_S:.0f} s\n{tail(self._log)}") from None
                if now - reported > _REPORT_EVERY_S:
                    say(f"Still rendering, {now - started:.0f} s ...")
                    reported = now

    def _event(self, output: str) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(output)
        except json.JSONDecodeError as error:
            raise ServerError(f"submit --json did not print one JSON value: {output[:500]!r}") from error
        if event.get("type") != "acestep.job.completed.v1":
            raise ServerError(f"the job did not complete\n{tail(self._log)}")
        return event

    def _check(self, event: dict[str, Any]) -> Path:
        """Compare the downloaded file with the event and return its path."""
        described = event["data"]["audios"][0]
        files = sorted(path for path in self._audio.rglob("*.wav") if path.is_file())
        if len(files) != 1:
            raise ServerError(f"expected one audio file in {self._audio}, found {len(files)}")
        content = files[0].read_bytes()
        if hashlib.sha256(content).hexdigest() != described["sha256"]:
            raise ServerError(f"{files[0]} does not have the event's SHA-256 {described['sha256']}")
        _check_sound(files[0])
        _say_what_came(event["data"], described)
        return files[0]


class _RestDemo(_Demo):
    """The same with a gateway, and curl as a client of ACE-Step's server would call it."""

    def _make_song(self, worker: Process, variables: dict[str, str]) -> Path:
        say("4/4  Request: over ACE-Step's REST API, by curl ...")
        claim = PortClaim(1)
        environment = variables | {"ACESTEP_API_PORT": str(claim.ports[0])}
        log = self._folder / "gateway.log"
        gateway = Process([_consumer_command(), "gateway"], env=environment, folder=ROOT, log=log, guarded=True)
        try:
            url = f"http://{LOOPBACK}:{claim.ports[0]}"
            return song_over_rest(url, self._folder, self._event_file, lambda: worker.running() and gateway.running())
        finally:
            gateway.end(_WORKER_GRACE_S)
            claim.release()


def song_over_rest(url: str, folder: Path, manifest: Path, going_on: Callable[[], bool]) -> Path:
    """Make a song by the requests of ACE-Step's clients; keeps its manifest and returns its file.

    Raises ServerError if the song does not come, or ``going_on`` says so.
    """
    started = time.monotonic()
    while not _answers_ok(f"{url}/readyz"):
        if not going_on() or time.monotonic() - started > _READY_TIMEOUT_S:
            raise ServerError(f"no gateway at {url}")
        time.sleep(_POLL_S)
    request = {"prompt": PROMPT, "lyrics": LYRICS, "audio_duration": DURATION_S, "audio_format": "wav", "batch_size": 1}
    task = _curl(f"{url}/release_task", request)["data"]
    say(f"Accepted: {json.dumps(task)}")
    ask, started = {"task_id_list": [task["task_id"]]}, time.monotonic()
    say_command = True
    while True:
        (entry,) = _curl(f"{url}/query_result", ask, say_command=say_command)["data"]
        say_command = False
        if entry["status"] != 0:
            break
        if not going_on() or time.monotonic() - started > _SUBMIT_TIMEOUT_S:
            raise ServerError(f"no song: {entry}")
        time.sleep(_POLL_S)
    (item,) = json.loads(entry["result"])
    if not item["file"]:
        raise ServerError(f"no song: {item['error']}")
    say(f"Completed: {item['file']}, seed {item['seed_value']}, {item['generation_info']}")
    song = folder / "song.wav"
    _run_curl(["--output", str(song), url + item["file"]])
    if hashlib.sha256(song.read_bytes()).hexdigest() != item["sha256"]:
        raise ServerError(f"{song} is not the song of the task")
    manifest.write_text(json.dumps(_curl(f"{url}/v1/jobs/{task['task_id']}")["data"]["manifest"]), encoding="utf-8")
    return song


def _curl(url: str, body: dict[str, Any] | None = None, *, say_command: bool = True) -> dict[str, Any]:
    sent = [] if body is None else ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    output = _run_curl([*sent, url], say_command=say_command)
    answer: dict[str, Any] = json.loads(output)
    return answer


def _run_curl(arguments: list[str], *, say_command: bool = True) -> str:
    if say_command:
        say(f"$ curl {shlex.join(arguments)}")
    try:
        done = subprocess.run(
            ["curl", "--silent", "--show-error", "--fail-with-body", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ServerError("curl is missing; on Debian or Ubuntu: apt-get install curl") from None
    if done.returncode:
        raise ServerError(f"curl ended with status {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def _say_what_came(data: dict[str, Any], song: dict[str, Any]) -> None:
    stages = ((name, data["timings"][name]) for name in ("queued", "render", "encode", "upload"))
    say(f"Completed. Seconds: {', '.join(f'{name} {value:.1f}' for name, value in stages if value is not None)}.")
    say(f"In storage: {song['uri']}, {song['bytes']:,} bytes, and its manifest.")
    say("Downloaded and checked: it decodes, lasts as long as requested, and has the event's SHA-256.")


def _check_sound(path: Path) -> None:
    try:
        with wave.open(str(path), "rb") as sound:
            seconds = sound.getnframes() / sound.getframerate()
            silent = not any(sound.readframes(sound.getnframes()))
    except (wave.Error, EOFError) as error:
        raise ServerError(f"{path} does not decode: {error}") from error
    if abs(seconds - DURATION_S) > 1 / 25:  # a latent frame is a 25th of a second
        raise ServerError(f"{path} lasts {seconds:.2f} s instead of {DURATION_S} s")
    if silent:
        raise ServerError(f"{path} is silent")


def _consumer_command() -> str:
    """Return the installed `acestep-consumer`, beside the running Python."""
    command = Path(sys.executable).with_name("acestep-consumer")
    if not command.exists():
        raise ServerError(f"{command} is missing; run: bash infra/dev setup")
    return str(command)


def _answers_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  # an http address on this machine
            return bool(answer.status == HTTPStatus.OK)
    except (OSError, urllib.error.URLError):
        return False
