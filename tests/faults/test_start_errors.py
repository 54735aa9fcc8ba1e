# SPDX-License-Identifier: Apache-2.0
"""A start that cannot work: one line that names the setting, the documented exit code, no traceback.

No broker and no storage run here: all of this is found before the first of them would be needed, or without an answer.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from acestep_consumer.config.exit_codes import Exit
from tests.support.waiting import WITHIN_S
from tests.support.worker import LIGHT_COMMAND, LIGHT_VARIABLES, ROOT, clean_environment

NOBODY = "http://127.0.0.1:1"


def start(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Start a worker in ``folder``, without anything of AWS that this machine may have."""
    own = {
        "ACESTEP_HTTP_PORT": "0",
        "ACESTEP_LOG_FORMAT": "json",
        "ACESTEP_SCRATCH_DIR": str(folder),
        "ACESTEP_S3_ENDPOINT": NOBODY,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(ROOT),
    }
    environment = {
        name: value for name, value in clean_environment(LIGHT_VARIABLES).items() if not name.startswith("AWS_")
    }
    set_ = {name: value for name, value in (own | variables).items() if value}
    return subprocess.run(
        [*LIGHT_COMMAND, "run"],
        env=environment | set_,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


def reason_of(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line of an error: of the command line, or of the log."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    reasons = [str(entry["reason"]) for entry in entries if entry["level"] == "error"]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert len(reasons + said) == 1, done.stderr
    return (reasons + said)[0]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_CA_BUNDLE": "/nowhere/ca.pem"}, ["AWS_CA_BUNDLE", "/nowhere/ca.pem", "No such file"]),
        ({"ACESTEP_S3_ENDPOINT": "127.0.0.1:9000"}, ["ACESTEP_S3_ENDPOINT", "http://"]),
        ({"ACESTEP_S3_ENDPOINT": "localhost"}, ["ACESTEP_S3_ENDPOINT", "http://"]),
        ({"ACESTEP_S3_BUCKET": "songs/2026"}, ["ACESTEP_S3_BUCKET", "ACESTEP_S3_PREFIX"]),
        ({"ACESTEP_INPUT_BUCKETS": "stems,loops/2026"}, ["ACESTEP_INPUT_BUCKETS", "loops/2026"]),
        ({"ACESTEP_S3_BUCKET": "s3://songs"}, ["ACESTEP_S3_BUCKET", "without s3://"]),
        ({"ACESTEP_INPUT_BUCKETS": "s3://songs"}, ["ACESTEP_INPUT_BUCKETS", "without s3://"]),
        ({"ACESTEP_S3_PREFIX": "s3://songs/jobs"}, ["ACESTEP_S3_PREFIX", "folders in the bucket"]),
        ({"ACESTEP_S3_PREFIX": "jobs/../songs"}, ["ACESTEP_S3_PREFIX", "folders in the bucket"]),
        ({"ACESTEP_SCRATCH_DIR": "/dev/null"}, ["ACESTEP_SCRATCH_DIR", "/dev/null", "name a folder"]),
        ({"ACESTEP_AMQP_URL": "amqp://user:word@::1:5672/"}, ["ACESTEP_AMQP_URL", "IPv6", "[::1]:5672"]),
        ({"AWS_PROFILE": "nobody"}, ["profile", "nobody"]),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000", "ACESTEP_S3_ENDPOINT": ""}, ["AWS settings", "127.0.0.1:9000"]),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, ["no keys for S3", "AWS_ACCESS_KEY_ID"]),
        ({"AWS_SECRET_ACCESS_KEY": ""}, ["AWS settings", "missing: AWS_SECRET_ACCESS_KEY"]),
        ({"ACESTEP_AMQP_URL": "amqp://user:pass#word@127.0.0.1:1/"}, ["ACESTEP_AMQP_URL", "percent-encoded", "%23"]),
        ({"ACESTEP_AMQP_URL": "amqp://user:12/34@127.0.0.1:1/"}, ["ACESTEP_AMQP_URL", "percent-encoded", "%2F"]),
        ({"ACESTEP_CHECKPOINT_DIR": "~nobody-here/models"}, ["ACESTEP_CHECKPOINT_DIR", "home"]),
        ({"ACESTEP_HTTP_HOST": "a" * 80}, ["ACESTEP_HTTP_HOST"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "999999"}, ["OTEL_", "max_export_batch"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    variables: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    done = start(tmp_path, **variables)
    reason = reason_of(done)
    assert all(word in reason for word in words), reason
    assert done.returncode == Exit.USAGE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("connection_attempts", "workers do not read it"),
        ("cafile", "amqp:// is a connection without TLS; amqps:// has it"),
    ],
)
def test_a_parameter_of_the_url_that_nothing_reads_is_told_at_the_start(tmp_path: Path, name: str, reason: str) -> None:
    url = f"amqp://user:word@127.0.0.1:1/?{name}=3"
    done = start(tmp_path, ACESTEP_AMQP_URL=url, AWS_SECRET_ACCESS_KEY="")  # which ends it
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    (told,) = (entry for entry in entries if entry["level"] == "warning")
    assert told["event"] == "broker warning"
    assert told["note"] == f"the parameter {name} of ACESTEP_AMQP_URL has no effect here: {reason}"


def deep_table() -> str:
    return 'version = "deep"\ntiers = ' + "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('version = "ü"'.encode("latin-1"), ["UTF-8"]),
        (deep_table().encode(), ["nested"]),
        (b"tiers", ["TOML"]),
    ],
    ids=["bytes", "deep", "no TOML"],
)
def test_a_tier_table_that_cannot_be_read_is_one_line_and_exit_code_2(
    content: bytes, words: list[str], tmp_path: Path
) -> None:
    table = tmp_path / "tiers.toml"
    table.write_bytes(content)
    done = start(tmp_path, ACESTEP_TIER_TABLE=str(table))
    reason = reason_of(done)
    assert all(word in reason for word in ["ACESTEP_TIER_TABLE", str(table), *words]), reason
    assert done.returncode == Exit.USAGE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ACESTEP_WORKER_ID=ü\n".encode("latin-1"), ["UTF-8"]),
        (b"# a comment\n\nACESTEP_QUEUE_MAXSIZE 20\n", ["line 3", "NAME=value"]),
        (b"ACESTEP_ROUTE_BY_TIER\n", ["line 1", "NAME=value"]),
        (b"export ACESTEP_ROUTE_BY_TIER\n", ["line 1", "NAME=value"]),
        (b"ACESTEP_QUEUE_MAXSIZE=" + b"${A:-" * 5000 + b"20" + b"}" * 5000, ["ACESTEP_QUEUE_MAXSIZE"]),
    ],
    ids=["bytes", "blank for =", "no =", "export", "deep"],
)
def test_an_env_file_that_cannot_be_read_is_one_line_and_exit_code_2(
    content: bytes, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_bytes(content)
    done = start(tmp_path)
    reason = reason_of(done)
    assert all(word in reason for word in words), reason
    assert done.returncode == Exit.USAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_env_file_that_may_not_be_read_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / ".env").touch(0o000)
    done = start(tmp_path)
    assert "Permission denied" in reason_of(done)
    assert done.returncode == Exit.USAGE


@pytest.mark.usefixtures("fresh_processes")
def test_a_damaged_checkpoint_is_one_line_and_exit_code_5_before_torch_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "acestep-v15-turbo"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "acestep", "hidden_size": 64}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = start(tmp_path, ACESTEP_CHECKPOINT_DIR=str(tmp_path))
    assert "config.json has no field" in reason_of(done)
    assert done.returncode == Exit.ENGINE
