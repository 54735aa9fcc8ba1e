# SPDX-License-Identifier: Apache-2.0
"""Log setup: structlog and ``logging`` to stderr, readable on a terminal, JSON otherwise. stdout is for results."""

import inspect
import logging
import sys
from contextlib import suppress
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from acestep_consumer.config.settings import LogLevel

_LEVELS = logging.getLevelNamesMapping()


def set_up_logs(level: LogLevel, style: Literal["auto", "console", "json"]) -> bool:
    """Configure structlog and the standard library's logging to the same format. Returns whether it is JSON."""
    as_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    last: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [_console_renderer()]
    )
    structlog.configure(
        processors=[_threshold, _add_module, *shared, *last],
        # Filtered by _Threshold instead: loggers are cached, and the level may change at run time.
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Stderr())),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_logging(shared, last)
    set_log_level(level)
    return as_json


def set_log_level(level: LogLevel) -> None:
    """Set the minimum level; libraries log warnings and errors only, unless it is ``debug``."""
    _threshold.level = _LEVELS[level.upper()]
    logging.getLogger().setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    for noisy in ("botocore", "urllib3", "s3transfer", "boto3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.INFO if level == "debug" else logging.NOTSET)


def _console_renderer() -> Processor:
    """Return the renderer for terminals. Its own tracebacks show the variables: secrets, and models of any size."""
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
    )


class _Stderr:
    """stderr, but a line that cannot be written is lost, as with ``logging``: the disk may be full, a pipe's end gone.

    An error would end whatever logs: a job, or the task that settles its message.
    """

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


class _Threshold:
    """Drops events below a level."""

    level = logging.INFO

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if _LEVELS[method.upper()] < self.level:
            raise structlog.DropEvent
        return event


_threshold = _Threshold()


def _add_module(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the dotted name of the module that logs, as ``logger``: the key that libraries' lines have for theirs."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"].startswith((__name__, "structlog")):
        frame = frame.f_back
    if frame is not None:
        spec = frame.f_globals.get("__spec__")  # knows the name of a module that was started with ``python -m``
        event["logger"] = spec.name if spec else frame.f_globals["__name__"]
    return event


def _adopt_standard_logging(shared: list[Processor], last: list[Processor]) -> None:
    """Route the standard library's ``logging``, which libraries use, through the same processors."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], force=True)
    for repeated in ("aiormq", "aio_pika", "botocore.credentials"):
        # Their errors become ours, which are logged once, with what they mean.
        logging.getLogger(repeated).setLevel(logging.CRITICAL)
