# SPDX-License-Identifier: Apache-2.0
"""Log lines as a process writes them: each one names its module."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SETUP = """
import logging, structlog
from acestep_consumer.config.logs import set_up_logs
"""
INNER = """
import structlog
log = structlog.get_logger()
def work():
    log.info("from a function")
    password = "hunter2"
    try:
        1 / len(password[:0])
    except ZeroDivisionError:
        log.exception("from a handler")
"""
MAIN = f"""{SETUP}
from package import inner
set_up_logs("info", "STYLE")
structlog.get_logger().info("from the program")
inner.work()
logging.getLogger("some.library").warning("from a library")
"""
EXPECTED = {
    "from the program": "package.program",
    "from a function": "package.inner",
    "from a handler": "package.inner",
    "from a library": "some.library",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "inner.py").write_text(INNER, encoding="utf-8")
    return folder


def logged(package: Path, style: str) -> list[str]:
    """Run the program as ``python -m package.program`` and return its log."""
    (package / "program.py").write_text(MAIN.replace("STYLE", style), encoding="utf-8")
    paths = os.pathsep.join(map(str, (package.parent, ROOT / "consumer", ROOT / "schemas")))
    done = subprocess.run(
        [sys.executable, "-m", "package.program"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stderr.splitlines()


def test_each_json_line_names_its_module(package: Path) -> None:
    lines = [json.loads(line) for line in logged(package, "json")]
    assert {line["event"]: line["logger"] for line in lines} == EXPECTED


def test_each_console_line_names_its_module(package: Path) -> None:
    lines = logged(package, "console")
    for event, module in EXPECTED.items():
        assert any(event in line and f"[{module}]" in line for line in lines)


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_shows_no_values_of_variables(package: Path, style: str) -> None:
    """They may be secrets, and are whole models where a model is loaded: writing them takes minutes."""
    text = "\n".join(logged(package, style))
    assert "ZeroDivisionError" in text
    assert "hunter2" not in text.replace('password = "hunter2"', "").replace(r"password = \"hunter2\"", "")


LEVELS = """
import logging, structlog
from acestep_consumer.config.logs import set_log_level, set_up_logs
log = structlog.get_logger()
assert set_up_logs("info", "auto")
log.debug("too low")
set_log_level("debug")
log.debug("low enough")
"""


def test_the_level_can_change_while_loggers_are_cached() -> None:
    done = subprocess.run([sys.executable, "-c", LEVELS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["low enough"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_log_that_cannot_be_written_does_not_disturb_whatever_logs(package: Path, style: str) -> None:
    """Its disk is full, or its reader is gone: the error would end a job, and the task that settles its message."""
    (package / "program.py").write_text(f"{MAIN.replace('STYLE', style)}print('went on')", encoding="utf-8")
    paths = os.pathsep.join(map(str, (package.parent, ROOT / "consumer", ROOT / "schemas")))
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as full, os.fdopen(writer, "wb") as gone:
        for stderr in (full, gone):
            done = subprocess.run(
                [sys.executable, "-m", "package.program"],
                env={**os.environ, "PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                stderr=stderr,
                check=False,
            )
            assert done.stdout == b"went on\n"
