# SPDX-License-Identifier: Apache-2.0
"""Starts workers, their engines and commands as forks of a process that has imported everything.

Nine tenths of an engine's start on a processor are imports: eight seconds of torch, diffusers and transformers. While
``forking()`` is on, ``subprocess`` (and with it asyncio) has ``python -m acestep_consumer ...`` forked by a server
that imported all of it once. Nothing else differs from a started interpreter: the fork has the arguments, environment,
folder, descriptors, session and signal mask that it was given, runs the module as ``__main__``, and is a child of the
process that asked, which waits for it, signals it and reads its exit code as usual.

Being a child of somebody who did not fork it takes two steps: the server forks twice, and the one in between ends, so
that its child passes to the nearest ancestor that is a subreaper, which the asking process is at that moment. A worker
has a server of its own for its engines, forked before the worker's first line runs.

Anything that a fork could not do in the same way (another interpreter's options, another user, environment variables
that libraries read at import) is started as usual.
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

MODULES: Final = (
    "acestep_consumer",
    "infra.local",
    "tests.support.engine_double",
    "tests.support.light_",
    "tests.support.worker_",
)
"""Beginnings of the names of modules that are run in a fork."""

PARENTS: Final = {
    "acestep_consumer": "run",
    "infra.local": "demo",
    "tests.support.light_worker": "run",
    "tests.support.worker_group": "",
}
"""Modules that start others of these, each with its command for that; without one it always does."""

READ_AT_RUN_TIME: Final = (
    "ACESTEP_",
    "AWS_",
    "COLUMNS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "LIGHT_",
    "MAX_CUDA_VRAM",
    "PYTEST_",
    "PYTHONUNBUFFERED",
    "TORCHINDUCTOR_",
)
"""Beginnings of the names of variables that no import reads; where others differ, nothing is forked.

``PYTHONUNBUFFERED`` is read by the interpreter: a fork does what it says.
"""

SEES_ITS_PARENTS: Final = "--show-completion"
"""An option that looks for a shell among the parents of its process, where the fork server would be one."""

PR_SET_CHILD_SUBREAPER: Final = 36
NAME = "tests.support.fork_server"
SCRIPT: Final = str(Path(sys.executable).with_name("acestep-consumer"))
ROOT = Path(__file__).parents[2]
_MARK = "--fork-server"
_TITLE_BYTES = 4096
_LENGTH_BYTES = 4
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Start:
    """A process to start. Descriptors 0, 1, 2 and ``pass_fds`` travel beside it, in this order."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    pass_fds: list[int]
    new_session: bool
    blocked_signals: list[int]
    ignored_signals: list[int]

    @property
    def module(self) -> str:
        return self.arguments[1]


class ForkServer:
    """The asking side: one request at a time, answered with the id of a process that is our child."""

    def __init__(
        self, channel: socket.socket, environment: Mapping[str, str], process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self._channel = channel
        self._process = process
        self._environment = dict(environment)
        self._turn = threading.Lock()
        self.on = True

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether a fork can be what these arguments of ``Popen._execute_child`` ask for."""
        arguments = given["args"]
        if not self.on or isinstance(arguments, (str, bytes, os.PathLike)) or given["executable"] is not None:
            return False
        plain = not any(given[name] for name in ("preexec_fn", "shell", "gids")) and given["close_fds"]
        same_user = all(given[name] in {None, -1} for name in ("gid", "uid", "umask", "process_group"))
        command = as_module(arguments)
        ours = command[:2] == [sys.executable, "-m"] and command[2].startswith(MODULES)
        if SEES_ITS_PARENTS in command:
            return False
        return bool(plain and same_user and ours and self._knows(given["env"], given["cwd"]))

    def _knows(self, environment: Mapping[str, str] | None, folder: Any) -> bool:
        environment = os.environ if environment is None else environment
        differing = (set(environment.items()) ^ set(self._environment.items())) - {("PYTHONPATH", str(ROOT))}
        return all(name.startswith(READ_AT_RUN_TIME) for name, _ in differing) and Path(folder or ".").is_dir()

    def end(self) -> None:
        """End the server; its forks go on."""
        self._channel.close()
        if self._process is not None:
            self._process.wait()

    def start(self, start: Start, descriptors: list[int]) -> int:
        """Return the id of the started process."""
        with self._turn, child_subreaper():
            packed = json.dumps(asdict(start)).encode()
            socket.send_fds(self._channel, [len(packed).to_bytes(_LENGTH_BYTES)], descriptors)
            self._channel.sendall(packed)
            return int.from_bytes(read(self._channel, _LENGTH_BYTES))


_server: ForkServer | None = None
_execute_child: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_PARAMETERS = inspect.signature(_execute_child)


@contextmanager
def forking() -> Iterator[None]:
    """Fork what can be forked, as long as this lasts. The server starts at first use and stays."""
    global _server  # noqa: PLW0603 - one for all tests of a process, as its imports are
    if _server is None:
        _server = start_server()
        atexit.register(_server.end)
        subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    before, _server.on = _server.on, True
    try:
        yield
    finally:
        _server.on = before


@contextmanager
def not_forking() -> Iterator[None]:
    """Start interpreters as usual, as long as this lasts."""
    before = _server is not None and _server.on
    if _server is not None:
        _server.on = False
    try:
        yield
    finally:
        if _server is not None:
            _server.on = before


def execute_child(popen: Any, *positional: Any) -> None:
    """Take the place of ``Popen._execute_child``."""
    given = _PARAMETERS.bind(popen, *positional).arguments
    if _server is None or not _server.fits(given):
        _execute_child(popen, *positional)
        return
    ends = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
    descriptors = [number if end == -1 else end for number, end in enumerate(ends)] + list(given["pass_fds"])
    start = Start(
        arguments=as_module(given["args"])[1:],
        environment=dict(os.environ if given["env"] is None else given["env"]),
        folder=os.fspath(given["cwd"] or Path.cwd()),
        pass_fds=list(given["pass_fds"]),
        new_session=given["start_new_session"],
        blocked_signals=[int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        ignored_signals=[int(number) for number in _SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
    )
    popen.pid = _server.start(start, descriptors)
    popen._child_created = True
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    popen._close_pipe_fds(*(given[name] for name in pipes))


def as_module(arguments: Sequence[str | bytes | os.PathLike[str]]) -> list[str]:
    """Return the command, with the installed script as the module that it is made from."""
    command = [os.fsdecode(word) for word in arguments]
    return [sys.executable, "-m", "acestep_consumer", *command[1:]] if command[:1] == [SCRIPT] else command


@contextmanager
def child_subreaper() -> Iterator[None]:
    """Let orphans among our descendants become our children."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def start_server() -> ForkServer:
    """Start a server with this environment, less what tests set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(READ_AT_RUN_TIME)}
    environment["PYTHONPATH"] = str(ROOT)
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", NAME, _MARK, str(theirs.fileno()), "-" * _TITLE_BYTES]
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True
        )
    return ForkServer(ours, environment, process)


def main() -> None:
    """Import everything, then fork on request until the asking process is gone."""
    with warnings.catch_warnings():  # the filters of a new interpreter come back, whatever an import sets
        import_all()
    gc.freeze()
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a fork of a process with threads could hang"
    serve(socket.socket(fileno=int(sys.argv[2])))


def import_all() -> None:
    """Import every module of the product that can be imported here."""
    product = importlib.import_module("acestep_consumer")
    for module in pkgutil.walk_packages(product.__path__, "acestep_consumer."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # vLLM is not in this environment
                importlib.import_module(module.name)


def serve(channel: socket.socket) -> None:
    """Fork on request; a fork returns from here never, it runs its module and exits."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a signal to a worker's group is not for its server
    while True:
        length, descriptors, _, _ = socket.recv_fds(channel, _LENGTH_BYTES, 64)
        if not length:
            os._exit(0)
        start = Start(**json.loads(read(channel, int.from_bytes(length))))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            grandchild = os.fork()
            if grandchild == 0:
                become(start, descriptors)
            os.write(writing, grandchild.to_bytes(_LENGTH_BYTES))
            os._exit(0)
        os.waitpid(between, 0)
        channel.sendall(os.read(reading, _LENGTH_BYTES))
        for descriptor in (reading, writing, *descriptors):
            os.close(descriptor)


def read(channel: socket.socket, size: int) -> bytes:
    """Read so many bytes."""
    received = b""
    while len(received) < size:
        chunk = channel.recv(size - len(received))
        if not chunk:
            raise ConnectionError("the other side is gone")
        received += chunk
    return received


def become(start: Start, descriptors: list[int]) -> None:
    """Turn this fork into the process that was asked for, run it and exit."""
    if start.new_session:
        os.setsid()
    place(descriptors, [0, 1, 2, *start.pass_fds])
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    for number in _SIGNALS:
        ignored = number in start.ignored_signals
        usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if ignored else usual)
    global _server  # noqa: PLW0603 - the one of the process that this was
    _server = None
    if PARENTS.get(start.module) in {"", *start.arguments}:
        _server = fork_server_of_our_own(start.environment)
    signal.pthread_sigmask(signal.SIG_SETMASK, start.blocked_signals)
    unbuffered = bool(start.environment.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(  # type: ignore[union-attr]
        line_buffering=sys.stdout.isatty(), write_through=unbuffered
    )
    rename([sys.executable, *start.arguments])
    sys.orig_argv = [sys.executable, *start.arguments]
    os._exit(run(start))


def place(descriptors: list[int], targets: list[int]) -> None:
    """Give descriptors the numbers in ``targets`` and close all others."""
    import fcntl  # noqa: PLC0415 - not everywhere

    above = max(targets) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in descriptors]
    for number, target in zip(moved, targets, strict=True):
        os.dup2(number, target)
    kept = sorted(targets)
    for low, high in pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
        if low + 1 < high:  # an empty range would close all
            os.closerange(low + 1, high)


def fork_server_of_our_own(environment: Mapping[str, str]) -> ForkServer:
    """Fork a server whose forks become children of this process."""
    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        rename([sys.executable, "-m", NAME, _MARK])
        serve(theirs)
    theirs.close()
    return ForkServer(ours, environment)


def run(start: Start) -> int:
    """Run the module as ``python -m`` does. Returns its exit code."""
    code = 0
    sys.argv = start.arguments[1:]
    with suppress(KeyError):
        del sys.modules[start.module]  # else runpy warns that it was imported before
    try:
        runpy.run_module(start.module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            sys.stderr.write(left.code + "\n")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of its main module
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


def rename(command: list[str]) -> None:
    """Make ``ps`` and ``/proc/PID/cmdline`` show this command: it is written over our own."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    text = b"".join(os.fsencode(word) + b"\0" for word in command)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def is_fork_server(pid: int) -> bool:
    """Whether this process forks others for a worker."""
    return _MARK.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


if __name__ == "__main__":
    main()
