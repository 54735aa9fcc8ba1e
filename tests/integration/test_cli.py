# SPDX-License-Identifier: Apache-2.0
"""The commands as a person runs them, against a real worker."""

import hashlib
import json
import signal
import socket
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from yarl import URL

from acestep_schemas.events import JobCompleted, parse_event
from tests.support.command import run_command
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment


@dataclass
class Cli:
    """Runs a command with the worker's settings."""

    environment: dict[str, str]

    def __call__(
        self, *arguments: str, text: str | None = None, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        return run_command(*arguments, variables=self.environment | variables, text=text)


@pytest.fixture
def cli(worker_environment: dict[str, str]) -> Cli:
    return Cli(worker_environment)


@pytest.mark.usefixtures("worker")
def test_submit_waits_downloads_and_prints_the_event_as_one_line_of_json(cli: Cli, tmp_path: Path) -> None:
    done = cli(
        "submit", "--prompt", "jazz", "--duration", "10", "--format", "flac", "--seed", "5", "--download",
        str(tmp_path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    event = parse_event(line.encode())
    assert isinstance(event, JobCompleted)
    (song,) = tmp_path.iterdir()
    assert song.suffix == ".flac"
    assert hashlib.sha256(song.read_bytes()).hexdigest() == event.data.audios[0].sha256
    assert event.data.audios[0].seed == 5
    assert "100%" in done.stderr


@pytest.mark.usefixtures("worker")
def test_submit_reads_a_json_file_and_flags_win(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"caption": "rock", "duration": 10, "seed": 1, "audio_format": "wav"}))
    done = cli("submit", str(file), "--seed", "2", "--wait", "--json")
    event = parse_event(done.stdout.encode())
    assert isinstance(event, JobCompleted)
    assert (event.data.request.prompt, event.data.request.seed) == ("rock", (2,))


@pytest.mark.usefixtures("worker")
def test_submit_has_flags_for_what_people_ask_for(cli: Cli, tmp_path: Path) -> None:
    lyrics = tmp_path / "lyrics.txt"
    lyrics.write_text("[verse]\nWords from a file\n")
    done = cli(
        "submit", "--prompt", "jazz", "--duration", "10", "--lyrics-file", str(lyrics), "--language", "ja", "--bpm",
        "120", "--key", "C minor", "--steps", "2", "--guidance", "5", "--expires", "600", "--timeout", "100", "--json",
        "--loudness", "-40", "--true-peak", "-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    event = parse_event(done.stdout.encode())
    assert isinstance(event, JobCompleted)
    asked = event.data.request
    assert (asked.lyrics, asked.vocal_language, asked.bpm) == ("[verse]\nWords from a file\n", "ja", 120)
    assert (asked.key_scale, asked.inference_steps, asked.guidance_scale) == ("C minor", 2, 5)
    assert (asked.loudness_lufs, asked.true_peak_db) == (-40, -2)
    (song,) = event.data.audios
    assert song.loudness is not None
    assert song.loudness.lufs == pytest.approx(-40, abs=0.1)


def test_submit_waits_no_longer_than_it_was_told_and_says_that_the_job_goes_on(cli: Cli, amqp_url: str) -> None:
    assert cli("topology", "--declare", ACESTEP_AMQP_URL=amqp_url).returncode == 0
    done = cli("submit", "--prompt", "x", "--task-id", "mine", "--timeout", "0.5", ACESTEP_AMQP_URL=amqp_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: no result within 0.5 s" in done.stderr
    assert "The job is not cancelled. Follow it with: acestep-consumer watch mine" in done.stderr


def test_a_misspelled_field_is_sent_with_a_warning(cli: Cli, amqp_url: str) -> None:
    assert cli("topology", "--declare", ACESTEP_AMQP_URL=amqp_url).returncode == 0
    done = cli("submit", "-", text=json.dumps({"prompt": "x", "audio_formt": "wav"}), ACESTEP_AMQP_URL=amqp_url)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: unknown field 'audio_formt' is ignored")


def test_topology_does_not_wait_for_a_broker_that_is_away(cli: Cli) -> None:
    done = cli("topology", "--declare", ACESTEP_AMQP_URL="amqp://user:sesame@127.0.0.1:1/")
    assert (done.returncode, done.stdout) == (4, "")
    assert "error: no connection to the broker" in done.stderr
    assert "sesame" not in done.stderr


def test_a_second_worker_on_a_port_that_is_taken_says_so_in_a_line_and_ends_with_2(cli: Cli) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        port = first.getsockname()[1]
        done = cli("run", ACESTEP_HTTP_PORT=str(port))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    said = f"ACESTEP_HTTP_PORT: port {port} on 127.0.0.1 is in use; a second worker on this machine needs another port"
    assert json.loads(line)["reason"] == said


@pytest.mark.usefixtures("worker")
def test_submit_reads_standard_input_and_without_wait_prints_the_task_id(cli: Cli) -> None:
    task_id = uuid.uuid4().hex
    done = cli("submit", "-", text=json.dumps({"task_id": task_id, "prompt": "x", "duration": 10}))
    assert (done.returncode, done.stdout.strip()) == (0, task_id)


@pytest.mark.usefixtures("worker")
def test_a_job_that_is_rejected_ends_submit_with_1_and_the_reason(cli: Cli) -> None:
    done = cli("submit", "--prompt", "x", "--batch-size", "8", "--on-limit", "reject", "--wait")
    assert done.returncode == 1
    assert "error: job rejected (limit_exceeded): batch_size = 8" in done.stderr
    assert done.stdout == ""


def test_a_full_queue_ends_submit_with_3(cli: Cli, amqp_url: str) -> None:
    full = {"ACESTEP_AMQP_URL": amqp_url, "ACESTEP_QUEUE_MAXSIZE": "1"}
    assert cli("topology", "--declare", **full).returncode == 0
    assert cli("submit", "--prompt", "first", **full).returncode == 0
    refused = cli("submit", "--prompt", "second", **full)
    assert refused.returncode == 3
    assert "queue is full" in refused.stderr


def test_submitting_before_anybody_declared_the_queue_says_what_to_do(cli: Cli, amqp_url: str) -> None:
    done = cli("submit", "--prompt", "x", ACESTEP_AMQP_URL=amqp_url)
    assert done.returncode == 4
    assert "topology --declare" in " ".join(done.stderr.split())


def test_a_broker_out_of_reach_ends_with_4_and_names_the_setting(cli: Cli) -> None:
    done = cli("submit", "--prompt", "x", ACESTEP_AMQP_URL="amqp://user:sesame@127.0.0.1:1/")
    assert done.returncode == 4
    assert "ACESTEP_AMQP_URL" in done.stderr
    assert "sesame" not in done.stderr


def test_an_unknown_setting_stops_every_command_with_2(cli: Cli) -> None:
    done = cli("topology", ACESTEP_QUEUE_SIZE="5")
    assert done.returncode == 2
    assert "ACESTEP_QUEUE_MAXSIZE" in done.stderr


def test_topology_prints_definitions_that_name_the_limit(cli: Cli) -> None:
    definitions = json.loads(cli("topology", ACESTEP_QUEUE_MAXSIZE="7").stdout)
    queues = {queue["name"]: queue["arguments"] for queue in definitions["queues"]}
    assert queues["acestep.generate"]["x-max-length"] == 7


def test_topology_warns_of_parameters_without_effect_where_it_connects(cli: Cli, amqp_url: str) -> None:
    done = cli("topology", "--declare", ACESTEP_AMQP_URL=f"{amqp_url}?cafile=/ca.pem")
    assert done.returncode == 0
    assert "warning: the parameter cafile of ACESTEP_AMQP_URL has no effect here: amqp:// is a" in done.stderr


def test_topology_prints_what_it_declared_when_asked_to(cli: Cli, amqp_url: str) -> None:
    declared = cli("topology", "--declare", "--json", ACESTEP_AMQP_URL=amqp_url)
    assert (declared.returncode, json.loads(declared.stdout)) == (0, json.loads(cli("topology").stdout))
    assert cli("topology", "--declare", ACESTEP_AMQP_URL=amqp_url).stdout == ""


def test_schema_prints_json_schemas(cli: Cli) -> None:
    request = json.loads(cli("schema", "request").stdout)
    events = json.loads(cli("schema", "events").stdout)
    assert "prompt" in request["properties"]
    assert "acestep.job.completed.v1" in events["discriminator"]["mapping"]


def test_schema_export_writes_every_document_and_names_it(cli: Cli, tmp_path: Path) -> None:
    done = cli("schema", "export", str(tmp_path / "docs"))
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert {path.name for path in paths} >= {"request.schema.json", "job.completed.schema.json", "asyncapi.json"}
    assert json.loads((tmp_path / "docs" / "asyncapi.json").read_text())["asyncapi"] == "3.0.0"
    as_json = cli("schema", "export", str(tmp_path / "docs"), "--json")
    assert [Path(each) for each in json.loads(as_json.stdout)] == paths
    assert cli("schema", "export").returncode == cli("schema", "events", str(tmp_path)).returncode == 2


@pytest.mark.usefixtures("worker")
def test_watch_tells_of_a_job_that_has_ended_already(cli: Cli) -> None:
    done = cli("submit", "--prompt", "x", "--batch-size", "8", "--on-limit", "reject", "--wait", "--json")
    (ended,) = done.stdout.splitlines()
    task_id = json.loads(ended)["subject"]
    assert cli("watch", task_id, "--json").stdout.splitlines() == [ended]


def test_a_request_file_that_is_no_json_object_is_refused_before_anything_is_sent(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text("[1, 2]")
    done = cli("submit", str(file))
    assert done.returncode == 2
    assert "JSON object" in done.stderr


def test_help_names_every_command_and_the_exit_codes(cli: Cli) -> None:
    text = cli("--help").stdout
    assert all(name in text for name in ("run", "submit", "watch", "schema", "topology", "plan", "tiny-checkpoint"))
    assert "Exit codes" in text
    assert "ACESTEP_QUEUE_MAXSIZE" in cli("run", "--help").stdout


@pytest.mark.usefixtures("worker")
def test_watch_prints_events_as_json_lines_until_it_is_interrupted(cli: Cli) -> None:
    with subprocess.Popen(
        [*COMMAND, "watch", "--json"],
        env=clean_environment(cli.environment),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert "watching" in watching.stderr.readline()
        task_id = cli("submit", "--prompt", "x", "--duration", "10").stdout.strip()
        states = []
        for line in watching.stdout:
            event = parse_event(line.encode())
            if event.subject == task_id:
                states.append(event.type.split(".")[2])
            if states[-1:] == ["completed"]:
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
    assert states[0] == "started"


def test_ctrl_c_while_submit_waits_says_that_the_job_goes_on(cli: Cli, amqp_url: str) -> None:
    assert cli("topology", "--declare", ACESTEP_AMQP_URL=amqp_url).returncode == 0
    with subprocess.Popen(
        [*COMMAND, "submit", "--prompt", "x", "--task-id", "mine", "--wait"],
        env=clean_environment(cli.environment | {"ACESTEP_AMQP_URL": amqp_url}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stderr is not None
        assert "accepted as mine" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=WITHIN_S)
    assert waiting.returncode == 130
    assert "watch mine" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("worker")
def test_watch_of_one_task_ends_with_it(cli: Cli) -> None:
    task_id = uuid.uuid4().hex
    with subprocess.Popen(
        [*COMMAND, "watch", task_id],
        env=clean_environment(cli.environment),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stderr is not None
        watching.stderr.readline()
        assert cli("submit", "--prompt", "x", "--duration", "10", "--task-id", task_id).returncode == 0
        printed, _ = watching.communicate(timeout=WITHIN_S)
    assert watching.returncode == 0
    assert f"{task_id}  completed s3://" in printed


@pytest.mark.parametrize(
    "command",
    [["status", "--json", "--sample", "0"], ["dead", "list"], ["topology", "--declare"], ["cancel", "song"]],
    ids=lambda command: command[0],
)
def test_of_a_cluster_whose_first_node_is_down_the_next_one_is_asked(
    cli: Cli, amqp_url: str, command: list[str]
) -> None:
    assert cli("topology", "--declare", ACESTEP_AMQP_URL=amqp_url).returncode == 0
    nobody = URL(amqp_url).with_port(1)
    done = cli(*command, ACESTEP_AMQP_URL=f"{nobody},{amqp_url}")
    assert done.returncode == 0, done.stderr
