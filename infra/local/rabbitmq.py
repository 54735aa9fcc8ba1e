# SPDX-License-Identifier: Apache-2.0
"""Runs a private RabbitMQ: broker and port mapper on free loopback ports, with all its files in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local import rabbitmq4
from infra.local.ports import LOOPBACK, PortClaim
from infra.local.process import Process, ServerError, wait_until

if TYPE_CHECKING:
    from typing import Self

PACKAGE = "rabbitmq-server"

# The package's own scripts. The ones in /usr/sbin switch to the user rabbitmq, which cannot write our folder.
_PACKAGE_FOLDERS = ("/usr/lib/rabbitmq/bin",)

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

_CONFIGURATION = """\
listeners.tcp.default = {host}:{amqp}
log.file.level = warning
log.console = false
# A small disk must not block publishers in a test.
disk_free_limit.absolute = 50MB
"""

_MANAGEMENT_CONFIGURATION = """\
management.tcp.ip = {host}
management.tcp.port = {management}
management.disable_stats = false
collect_statistics_interval = 1000
"""

# Few schedulers that never spin, so that idle brokers cost little: tests run many side by side.
_VM_ARGUMENTS = "+S 2:2 +SDio 2 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}"

# Read by every Erlang of a broker. The start itself has this boot script; an Erlang that only starts the port mapper
# and rabbitmqctl have others.
_PRELOAD = Path(__file__).with_name("preload.erl")
_PRELOAD_ARGUMENTS = """\
-eval 'case init:get_argument(boot) of {ok,[["start_sasl"]]} -> file:eval("preload.erl"); _ -> ok end.'\
"""


def scripts_folder() -> Path | None:
    """Return the folder of rabbitmq-server and rabbitmqctl; None: RabbitMQ is not installed."""
    on_path = shutil.which("rabbitmq-server")
    candidates = [Path(folder) for folder in _PACKAGE_FOLDERS] + ([Path(on_path).parent] if on_path else [])
    return next((folder for folder in candidates if (folder / "rabbitmq-server").exists()), None)


def speaks_amqp(host: str, port: int, *, tls: bool = False) -> bool:
    """Whether a broker answers the AMQP 0.9.1 protocol header with connection.start."""
    try:
        with socket.create_connection((host, port), timeout=2) as plain:
            connection = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if tls else plain
            connection.sendall(_PROTOCOL_HEADER)
            # A method frame (type 1) on channel 0. Another protocol version would answer with its own header.
            return connection.recv(3) == b"\x01\x00\x00"
    except OSError:
        return False


class RabbitMQ:
    """A private broker.

    Use it as a context manager, or call `start()` and `stop()`. `restart()` keeps the ports and the data.
    """

    def __init__(self, folder: Path, *, management: bool = False, guarded: bool = True) -> None:
        """Reserve ports; nothing is started yet.

        Args:
            folder: for data, log, configuration and cookie; created if missing, and not deleted.
            management: also serve the HTTP API, at `management_url`.
            guarded: stop the broker when this process dies; False: it keeps running.
        """
        self.folder = folder.absolute()
        self._management = management
        self._guarded = guarded
        self._version4 = rabbitmq4.wanted()
        self._claim = PortClaim(4)
        self.port, self._management_port, self._distribution_port, self._epmd_port = self._claim.ports
        self._node = f"acestep-{self.port}@localhost"
        self._log = self.folder / "rabbitmq.log"
        self._epmd: Process | None = None
        self._broker: Process | None = None

    @property
    def amqp_url(self) -> str:
        """The default virtual host, as the user guest."""
        return self.vhost_url("/")

    @property
    def management_url(self) -> str:
        """The HTTP API's address, without a trailing slash; user and password are guest.

        Raises:
            ServerError: the broker was created without management.
        """
        if not self._management:
            raise ServerError("this broker has no HTTP API: create it with management=True")
        return f"http://{LOOPBACK}:{self._management_port}"

    @property
    def processes(self) -> tuple[Process, ...]:
        """The broker's processes, in the order in which they are stopped."""
        return tuple(process for process in (self._broker, self._epmd) if process is not None)

    def vhost_url(self, vhost: str) -> str:
        """Return the AMQP URL of a virtual host, whose name needs no quoting except for the default, `/`."""
        return f"amqp://guest:guest@{LOOPBACK}:{self.port}/{vhost.replace('/', '%2F')}"

    def start(self) -> None:
        """Start the broker; returns once it accepts connections, about five seconds on one core.

        Raises:
            ServerError: RabbitMQ is not installed or does not start; with the end of its log.
        """
        server = self._script("rabbitmq-server")
        self._write_files()
        self._start_port_mapper()
        self._broker = self._run([server])
        try:
            wait_until(self._ready, what="RabbitMQ", processes=self.processes)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the broker and its port mapper; durable data stays on disk. Can be called again."""
        for process in self.processes:
            process.end()
        self._broker = self._epmd = None

    def kill(self) -> None:
        """Kill the broker, as a power failure would; `start()` starts it again."""
        if self._broker is not None:
            self._broker.kill()
            self._broker = None

    def restart(self) -> None:
        """Stop and start on the same ports with the same data."""
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this broker (about a second) and return its output.

        Raises:
            ServerError: the command failed; with its output.
        """
        command = [self._script("rabbitmqctl"), "--quiet", "--node", self._node, *arguments]
        done = subprocess.run(
            self._wrapped(command),
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerError(f"rabbitmqctl {' '.join(arguments)} failed:\n{done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Kill it and release the ports."""
        self.kill()
        self.stop()
        self._claim.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_port_mapper(self) -> None:
        if self._epmd is None:
            epmd = "epmd" if self._version4 else _epmd_command()
            self._epmd = self._run([epmd, "-address", LOOPBACK, "-port", str(self._epmd_port)])

    def _ready(self) -> bool:
        # RabbitMQ opens its listeners last, so an answer means that everything else is up.
        api = not self._management or _accepts(self._management_port)
        return api and speaks_amqp(LOOPBACK, self.port)

    def _script(self, name: str) -> str:
        if self._version4:
            return rabbitmq4.script(name)
        folder = scripts_folder()
        if folder is None:
            raise ServerError(f"RabbitMQ is not installed; on Debian or Ubuntu: apt-get install {PACKAGE}")
        return str(folder / name)

    def _wrapped(self, argv: list[str]) -> list[str]:
        return rabbitmq4.inside(self.folder, argv) if self._version4 else argv

    def _run(self, argv: list[str]) -> Process:
        return Process(
            self._wrapped(argv), env=self._environment(), folder=self.folder, log=self._log, guarded=self._guarded
        )

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _CONFIGURATION + (_MANAGEMENT_CONFIGURATION if self._management else "")
        ports = {"host": LOOPBACK, "amqp": self.port, "management": self._management_port}
        (self.folder / "rabbitmq.conf").write_text(text.format(**ports))
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management].\n" if self._management else "[].\n")
        (self.folder / "rabbitmq-env.conf").touch()
        shutil.copy(_PRELOAD, self.folder)
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        return ours | {
            "HOME": str(self.folder),  # where Erlang reads the cookie
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_CRASH_DUMP_BYTES": "0",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _VM_ARGUMENTS,
            "ERL_AFLAGS": _PRELOAD_ARGUMENTS,
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The start script then execs the broker instead of starting a child: one process, one SIGTERM.
            "RUNNING_UNDER_SYSTEMD": "true",
        }


def _accepts(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _epmd_command() -> str:
    found = shutil.which("epmd")
    if found is None:
        raise ServerError("epmd, Erlang's port mapper, is not installed; on Debian or Ubuntu it is in erlang-base")
    return found
