# SPDX-License-Identifier: Apache-2.0
"""Base of all commands: console, settings, exit codes, error lines, help layout.

Results go to stdout; messages, warnings and errors go to stderr, one line each.
"""

import asyncio
import codecs
import errno
import io
import json
import os
import re
import signal
import sys
from collections.abc import Coroutine
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from acestep_consumer.client import ClientError

PROGRAM: Final = "acestep-consumer"
TASK_ID_RULE: Final = "1 to 128 letters, digits, - and _"

_ESCAPED: Final = "acestep-escaped"

# Typer does not export the base class of its errors in arguments.
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])

T = TypeVar("T")

_PRESSED_AGAIN_S: Final = 1.0

note = Console(stderr=True, highlight=False)


def open_missing_streams() -> None:
    """Open the null device in place of streams that are closed (``>&-``), which Python leaves out.

    Programs that this one starts inherit it, as they do other streams: their numbers are not free there either.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free: this one, and no socket does.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it takes no name
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def escape_unencodable() -> None:
    """Make output survive an encoding that lacks a character, such as ASCII: JSON's escape is written in its place.

    So ``--json`` prints the same values in every encoding.
    """
    codecs.register_error(_ESCAPED, _escape)
    for stream in (sys.stdout, sys.stderr):
        # In UTF-8 only half of a surrogate pair cannot be written; where Python has a way for these, it stays.
        if isinstance(stream, io.TextIOWrapper) and (_is_not_utf8(stream.encoding) or stream.errors == "strict"):
            stream.reconfigure(errors=_ESCAPED)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _is_not_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name != "utf-8"


class Command(TyperCommand):
    """A command whose help has no types for switches and no ranges: the descriptions say what is allowed."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _without_types(self.get_params(ctx))
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group of commands with the same help layout."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _without_types(self.get_params(ctx))
        super().format_help(ctx, formatter)


def _without_types(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter.min = parameter.max = None
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = _no_type


def _no_type(ctx: Any) -> None:  # noqa: ARG001 - the signature of what it replaces
    return None


def print_version(wanted: bool) -> None:  # noqa: FBT001 - an option's callback gets its value
    """Print the program's version and exit, for ``--version``."""
    if wanted:
        typer.echo(f"{PROGRAM} {version(PROGRAM)}")
        raise typer.Exit


def print_error(text: str, console: Console = note) -> None:
    """Print an error: ``error: …``, a line for each line of ``text``, never wrapped."""
    for line in text.splitlines():
        console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def print_unwritable(folder: "Path", error: OSError, console: Console = note) -> Exit:
    """Print that songs cannot be written to a folder, with the system's reason; return the exit code."""
    print_error(f"songs cannot be written to {folder}: {error.strerror or error}", console)
    return Exit.USAGE


def is_output_unwritable(error: Exception) -> TypeGuard[OSError]:
    """Whether nothing more can be written: the disk is full, or nobody reads any more."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EPIPE}


def print_output_unwritable(error: OSError, console: Console = note) -> Exit:
    """Print why nothing more can be written, unless nobody reads any more; returns the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python has left to write at its end
    if error.errno == errno.EPIPE:
        return Exit.READER_GONE
    print_error(f"{error.filename or 'the output'} cannot be written: {error.strerror}", console)
    return Exit.USAGE


def print_warning(text: str, console: Console = note) -> None:
    """Print a warning: ``warning: …``, never wrapped."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def print_usage_error(error: Any) -> Exit:
    """Print an error in the arguments and which help explains them; returns the exit code."""
    if type(error).__name__ != "NoArgsIsHelpError":  # the help is printed already
        print_error(error.format_message())
        where = PROGRAM if error.ctx is None else error.ctx.command_path
        note.print(f"Try '{where} --help'.", style="dim", markup=False, soft_wrap=True)
    return Exit.USAGE


def print_client_error(error: "ClientError", console: Console = note) -> Exit:
    """Print an error of the client; returns the exit code."""
    # Here and not above: the client takes half a second to import, and help and completion do without.
    from acestep_consumer.client import InvalidTaskId, QueueFull  # noqa: PLC0415 - as said

    print_error(str(error), console)
    match error:
        case InvalidTaskId():
            return Exit.USAGE
        case QueueFull():
            return Exit.QUEUE_FULL
    return Exit.UNREACHABLE


def overrides(**given: object) -> dict[str, str]:
    """Return the settings of the command line, as texts; None: not given."""
    return {name: str(value) for name, value in given.items() if value is not None}


def load_settings(**given: object) -> Settings:
    """Load the settings, with those of the command line on top; invalid ones end the command with 2."""
    try:
        return settings_module.load(overrides=overrides(**given))
    except SettingsError as error:
        print_error(str(error))
        raise typer.Exit(Exit.USAGE) from error


def exit_after(command: Coroutine[Any, Any, int]) -> None:
    """Run a command's coroutine and exit with its code."""
    raise typer.Exit(run_to_end(command))


def run_to_end(command: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; Ctrl-C cancels it, and raises ``KeyboardInterrupt`` once it has cleaned up.

    asyncio's own handler breaks into the cleaning up at a second one, with tracebacks, and ``timeout`` sends two. Here
    a second one counts after a second, and ends the process.
    """
    pressed_s: list[float] = []
    not_ignored = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(command)

        def interrupt() -> None:
            if pressed_s and loop.time() > pressed_s[0] + _PRESSED_AGAIN_S:
                os._exit(Exit.INTERRUPTED)
            elif not pressed_s:
                pressed_s.append(loop.time())
                task.cancel()

        if not_ignored:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if pressed_s:
            raise KeyboardInterrupt from None
        raise


def check_task_id(task_id: str) -> None:
    """Raise a usage error unless ``task_id`` can be the id of a job."""
    from acestep_schemas.request import TASK_ID_PATTERN  # noqa: PLC0415 - as above

    if not re.fullmatch(TASK_ID_PATTERN, task_id):
        raise UsageError(f"{task_id!r} is not a task id: {TASK_ID_RULE}")
