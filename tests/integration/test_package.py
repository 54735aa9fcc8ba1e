# SPDX-License-Identifier: Apache-2.0
"""The wheel as it is installed: beside anything, with few dependencies, and with its types."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, broker_settings
from tests.support.distributions import link, with_requirements
from tests.support.readme import examples
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
# Names that many projects have; each would have hidden, or been hidden by, a package called like it.
FOREIGN = {
    "schemas/__init__.py": "",
    "schemas/events.py": "OURS = False\n",
    "consumer.py": "OURS = False\n",
}
PRODUCER = """
import consumer, schemas.events
from acestep_consumer.client.sync import Client

assert not consumer.OURS and not schemas.events.OURS
with Client({url!r}) as client:
    print(client.submit({{"prompt": "slow jazz"}}))
"""


def run(command: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sources without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, ROOT], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's, with modules of its own, into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    run([sys.executable, "-m", "pip", "install", *OFFLINE, "--target", folder, wheel], folder)
    return folder


def test_it_holds_two_packages_with_their_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"acestep_consumer", "acestep_schemas"}
    assert {"acestep_consumer/py.typed", "acestep_schemas/py.typed"} <= set(names)
    assert {"acestep_consumer/webui/page/index.html", "acestep_consumer/webui/page/page.js"} <= set(names)


def test_installing_it_changes_nothing_that_lay_there(project: Path) -> None:
    assert {name: (project / name).read_text() for name in FOREIGN} == FOREIGN


async def test_the_client_works_beside_other_packages_with_its_two_dependencies_alone(
    project: Path, amqp_url: str, tmp_path: Path
) -> None:
    link(with_requirements("aio-pika", "pydantic"), tmp_path / "dependencies")
    async with BrokerConnection(broker_settings(amqp_url), "test"), Peer(amqp_url) as peer:
        # Without `site`, nothing of this environment is on the path.
        command = [sys.executable, "-S", "-c", PRODUCER.format(url=amqp_url)]
        task_id = run(command, project, {"PYTHONPATH": str(tmp_path / "dependencies")}).strip()
        assert (await peer.take(GENERATE)).message_id == task_id


def test_the_examples_with_the_client_pass_mypy_as_strict_as_it_gets(project: Path, tmp_path: Path) -> None:
    """In an environment like their reader's: the installed wheel, and no plugin."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    dependencies = importlib.metadata.distribution("aio-pika").locate_file("")
    (site / "installed.pth").write_text(f"{project}\n{dependencies}\n")
    programs = {name: code for name, code in examples().items() if "acestep_consumer.client" in code}
    assert "sdk.py" in programs
    for name, code in programs.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    options = (f"--python-executable={python}", f"--cache-dir={tmp_path / 'cache'}")
    said = run([sys.executable, "-m", "mypy", "--strict", *options, *programs], tmp_path)
    assert f"no issues found in {len(programs)} source files" in said
