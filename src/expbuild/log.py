"""Logging: structlog, one line per event on stderr; coloured for people on a terminal, JSON for everything else.

`configure_logging` is called once, by the command line. Everything else does `log = structlog.get_logger()` at module
level and logs `noun.verb` events with keys. What libraries write through `logging` and `warnings` comes out the same
way, as event `library.logged`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
"""The levels there are, by the names people write."""

MAX_VALUE_CHARS = 1024
"""Longer string values are cut: much of what we log comes from clients."""

MAX_TRACEBACK_CHARS = 16 * 1024
"""Longer tracebacks keep their end, which names the error."""

_TRACEBACK_KEYS = ("exception", "stack")
_CONTROL_CHARACTERS = {
    code: f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
} | {9: "\\t", 10: "\\n", 13: "\\r"}
_CONTROL_CHARACTERS_IN_TRACEBACK = {k: v for k, v in _CONTROL_CHARACTERS.items() if k not in (9, 10)}


def level_from(verbose: bool, environ: Mapping[str, str]) -> str:
    """Return the level to log at: debug when `verbose`, else what EXPBUILD_LOG says, else info.

    Raises ValueError with a sentence for people when EXPBUILD_LOG is none of LEVELS (compared without case).
    """
    text = environ.get("EXPBUILD_LOG", "")
    level = text.strip().lower() or "info"
    if level not in LEVELS:
        raise ValueError(f"EXPBUILD_LOG: expected debug, info, warning or error, got {json.dumps(text[:100])}")
    return "debug" if verbose else level


def configure_logging(level: str = "info", stream: TextIO | None = None) -> None:
    """Send everything from `level` (of LEVELS) up to `stream`, by default stderr.

    Logging never raises and never waits for more than the write itself: what cannot be written is dropped. Loggers
    that were used before keep their level and stream, and take over the format.
    """
    stream = sys.stderr if stream is None else stream
    is_terminal = stream is not None and not stream.closed and stream.isatty()
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        shorten,
    ]
    if is_terminal:
        chain += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            escape_control_characters,
            structlog.dev.ConsoleRenderer(
                colors=not os.environ.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    else:
        chain.append(render_json)
    # In place: loggers that are cached already hold this very list (structlog's capture_logs relies on it too).
    processors: list[Processor] = structlog.get_config()["processors"]
    processors[:] = chain
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=_LineLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    _route_stdlib_logging(LEVELS[level])


def shorten(_logger: object, _method: str, event_dict: EventDict) -> EventDict:
    """Cut string values that are too long; says how much is missing. (A structlog processor.)"""
    for key, value in event_dict.items():
        if type(value) is str and len(value) > MAX_VALUE_CHARS:
            if key not in _TRACEBACK_KEYS:
                event_dict[key] = f"{value[:MAX_VALUE_CHARS]}... ({len(value) - MAX_VALUE_CHARS} more characters)"
            elif len(value) > MAX_TRACEBACK_CHARS:
                event_dict[key] = f"...\n{value[-MAX_TRACEBACK_CHARS:]}"
    return event_dict


def escape_control_characters(_logger: object, _method: str, event_dict: EventDict) -> EventDict:
    """Make control and direction characters visible: no value writes on the terminal. (A structlog processor.)"""
    for key, value in event_dict.items():
        if key in _TRACEBACK_KEYS and isinstance(value, str):
            event_dict[key] = value.translate(_CONTROL_CHARACTERS_IN_TRACEBACK)
        elif isinstance(value, str):
            event_dict[key] = value.translate(_CONTROL_CHARACTERS)
    return event_dict


def render_json(_logger: object, _method: str, event_dict: EventDict) -> str:
    """Return the event as one line of ASCII JSON that begins with timestamp, level, event. (A structlog processor.)

    Values JSON does not know appear as their str(). One pass of our own: this runs for every RPC.
    """
    line: dict[str, Any] = {
        "timestamp": _timestamp(),
        "level": event_dict.pop("level", ""),
        "event": event_dict.pop("event", ""),
    }
    line.update(event_dict)
    try:
        return _encode(line)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, values that contain themselves
        return _encode({str(key): _as_text(value) for key, value in line.items()})


def _timestamp() -> str:
    """Return the time as ISO 8601, in UTC, with microseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{_second(seconds)}.{nanoseconds // 1000:06}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _as_text(value: object) -> str:
    try:
        return str(value)[:MAX_VALUE_CHARS]
    except Exception as error:  # a log line must not fail on what it is about
        return f"<{type(value).__name__}: {type(error).__name__}>"


_encode = json.JSONEncoder(default=_as_text, ensure_ascii=True, separators=(",", ":")).encode


class _LineLogger:
    """Writes finished lines. Has the method names structlog's bound loggers call."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.msg = write


class _LineLoggerFactory:
    """Makes loggers that write lines to `stream` and drop those it does not take."""

    def __init__(self, stream: TextIO | None) -> None:
        self._write = _line_writer(stream)

    def __call__(self, *_args: object) -> _LineLogger:
        return _LineLogger(self._write)


def _line_writer(stream: TextIO | None) -> Callable[[str], None]:
    """Return a function that writes one line, at once, and never raises for a stream that is closed, full or gone."""
    if stream is None:  # stderr was closed when the process started
        return lambda line: None
    try:
        fd = stream.fileno()
    except (OSError, ValueError):  # a stream in memory

        def write_to_stream(line: str) -> None:
            with suppress(OSError, ValueError):
                stream.write(f"{line}\n")
                stream.flush()

        return write_to_stream

    def write_to_fd(line: str) -> None:
        # Past the stream's buffer: what a broken pipe refuses must not be kept and tried again at exit. A closed
        # stream's number may belong to somebody else's file by now.
        if not stream.closed:
            with suppress(OSError):
                os.write(fd, f"{line}\n".encode(errors="backslashreplace"))

    return write_to_fd


class _LibraryHandler(logging.Handler):
    """Hands records of `logging` to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the format: the library's mistake, not a reason to fail
            message = str(record.msg)
        fields: MutableMapping[str, Any] = {"logger": record.name, "message": message}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        known = max((level for level in LEVELS.values() if level <= record.levelno), default=logging.DEBUG)
        structlog.get_logger().log(known, "library.logged", **fields)


def _route_stdlib_logging(level: int) -> None:
    """Send what libraries log through structlog: from WARNING up, and from INFO up when we are at debug."""
    root = logging.getLogger()
    root.handlers[:] = [_LibraryHandler()]
    root.setLevel(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))
    logging.captureWarnings(True)
