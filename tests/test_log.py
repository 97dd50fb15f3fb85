"""Logging: what a line looks like, and that logging never gets in the way."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from expbuild.log import MAX_TRACEBACK_CHARS, MAX_VALUE_CHARS, configure_logging, level_from


class Terminal(io.StringIO):
    """A stream in memory that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Leave structlog and logging as they were."""
    root = logging.getLogger()
    config, handlers, level = structlog.get_config(), root.handlers[:], root.level
    processors = list(config["processors"])
    yield
    config["processors"][:] = processors
    structlog.configure(**config)
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def logger_to(stream: io.StringIO, level: str = "info") -> Any:
    """Return a new logger that writes to `stream`."""
    configure_logging(level, stream)
    return structlog.get_logger()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return what was logged as JSON."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_off_a_terminal_each_event_is_one_line_of_json() -> None:
    """Timestamp (ISO 8601, UTC), level and event come first; then keys and context."""
    stream = io.StringIO()
    log = logger_to(stream)
    with structlog.contextvars.bound_contextvars(execution="e1"):
        log.info("execution.completed", exit_code=0, duration_ms=1.5, path=Path("/x"), outputs=["a"])
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "event", "exit_code", "duration_ms", "path", "outputs", "execution"]
    timestamp = line.pop("timestamp")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", timestamp)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(timestamp)) < timedelta(minutes=1)
    assert line == {
        "level": "info",
        "event": "execution.completed",
        "execution": "e1",
        "exit_code": 0,
        "duration_ms": 1.5,
        "path": "/x",
        "outputs": ["a"],
    }


def test_on_a_terminal_lines_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coloured, with event and keys; without colours when NO_COLOR is set."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    logger_to(stream).warning("worker.unhealthy", worker="docker-1")
    assert "\x1b[" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    logger_to(stream).warning("worker.unhealthy", worker="docker-1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6} \[warning *\] worker\.unhealthy +worker=docker-1\n", stream.getvalue())


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_only_the_level_and_above_is_written(level: str, expected: list[str]) -> None:
    """Lower levels cost nothing and say nothing."""
    stream = io.StringIO()
    log = logger_to(stream, level)
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("x")
    assert [line["level"] for line in lines(stream)] == expected


@pytest.mark.parametrize(
    ("verbose", "variable", "expected"),
    [
        (False, None, "info"),
        (False, "", "info"),
        (False, "WARNING", "warning"),
        (False, " error ", "error"),
        (True, "error", "debug"),
        (True, None, "debug"),
    ],
)
def test_level_from_flag_and_variable(verbose: bool, variable: str | None, expected: str) -> None:
    """--verbose beats EXPBUILD_LOG beats info."""
    assert level_from(verbose, {} if variable is None else {"EXPBUILD_LOG": variable}) == expected


@pytest.mark.parametrize("verbose", [False, True])
def test_an_unknown_level_is_refused(verbose: bool) -> None:
    """A typing error in the variable is not passed over."""
    with pytest.raises(ValueError, match=r'^EXPBUILD_LOG: expected debug, info, warning or error, got "lots"$'):
        level_from(verbose, {"EXPBUILD_LOG": "lots"})


def test_long_values_are_cut() -> None:
    """Clients choose much of what we log; they do not choose how much of it."""
    stream = io.StringIO()
    logger_to(stream).info("x", fits="a" * MAX_VALUE_CHARS, long="b" * 5000)
    (line,) = lines(stream)
    assert line["fits"] == "a" * MAX_VALUE_CHARS
    assert line["long"] == "b" * MAX_VALUE_CHARS + f"... ({5000 - MAX_VALUE_CHARS} more characters)"


HOSTILE = "a\nb\r\x1b[2J\x00\x7f\x9b\u2028\u202e\ud800c"


def test_hostile_text_stays_inside_its_json_line() -> None:
    """Line breaks, control characters and lone surrogates are escaped, and come back unchanged."""
    stream = io.StringIO()
    logger_to(stream).info(HOSTILE, value=HOSTILE)
    (text,) = stream.getvalue().splitlines()
    assert text.isprintable()
    assert text.isascii()
    assert (json.loads(text)["event"], json.loads(text)["value"]) == (HOSTILE, HOSTILE)


def test_hostile_text_does_not_write_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a terminal, also inside of containers."""
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    logger_to(stream).info(HOSTILE, value=HOSTILE, values=["\x1b[2J\n"])
    (text,) = stream.getvalue().splitlines()
    assert re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]", text) is None
    assert r"\u001b[2J" in text


def fail(message: str) -> None:
    raise RuntimeError(message)


def test_exceptions_carry_their_traceback() -> None:
    """In one JSON line."""
    stream = io.StringIO()
    log = logger_to(stream)
    try:
        fail("boom")
    except RuntimeError:
        log.exception("janitor.failed")
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert line["exception"].startswith("Traceback (most recent call last):")
    assert line["exception"].endswith("RuntimeError: boom")


def test_a_long_traceback_keeps_its_end() -> None:
    """Tracebacks may be longer than other values, and the error is at their end."""
    stream = io.StringIO()
    log = logger_to(stream)
    try:
        fail("x" * 50_000 + " the end")
    except RuntimeError:
        log.exception("janitor.failed")
    (line,) = lines(stream)
    assert line["exception"].endswith("the end")
    assert MAX_VALUE_CHARS < len(line["exception"]) <= MAX_TRACEBACK_CHARS + 4


def test_a_traceback_on_a_terminal_keeps_its_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """People read it as lines; the message in it is still not to be trusted."""
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    log = logger_to(stream)
    try:
        fail("boom\x1b[2J")
    except RuntimeError:
        log.exception("janitor.failed")
    assert "\nRuntimeError: boom\\u001b[2J" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_values_json_does_not_know_do_not_break_logging() -> None:
    """Whatever is logged, there is a line."""

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    endless: list[object] = []
    endless.append(endless)
    stream = io.StringIO()
    log = logger_to(stream)
    log.info("a", value=Broken())
    log.info("b", value=endless)
    log.info("c", value={b"key": 1})
    log.info("d", value=b"\xff")
    assert [line["value"] for line in lines(stream)] == ["<Broken: RuntimeError>", "[[...]]", "{b'key': 1}", "b'\\xff'"]


def test_libraries_come_out_the_same_way() -> None:
    """Warnings of logging and of the interpreter are events like ours; below WARNING libraries are quiet."""
    stream = io.StringIO()
    configure_logging("info", stream)
    logging.getLogger("aiodocker").info("quiet")
    logging.getLogger("asyncio").warning("slow: %s s", 3)
    logging.getLogger("grpc").log(35, "wrong arguments %d", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    found = lines(stream)
    assert {line["event"] for line in found} == {"library.logged"}
    assert [(line["level"], line["logger"], line["message"]) for line in found[:2]] == [
        ("warning", "asyncio", "slow: 3 s"),
        ("warning", "grpc", "wrong arguments %d"),
    ]
    assert "DeprecationWarning: old" in found[2]["message"]


def test_library_errors_carry_their_traceback() -> None:
    """asyncio reports lost exceptions this way."""
    stream = io.StringIO()
    configure_logging("info", stream)
    try:
        fail("lost")
    except RuntimeError:
        logging.getLogger("asyncio").exception("Task exception was never retrieved")
    (line,) = lines(stream)
    assert line["exception"].endswith("RuntimeError: lost")


def test_a_closed_stream_drops_lines() -> None:
    """Nobody listens: no error."""
    stream = io.StringIO()
    log = logger_to(stream)
    stream.close()
    log.info("x")
    configure_logging("info", stream)
    structlog.get_logger().info("x")


def test_a_closed_stream_never_writes_into_the_file_that_got_its_number(tmp_path: Path) -> None:
    """A descriptor number is reused by the next file opened: that may be a blob."""
    stream = (tmp_path / "log").open("w")
    configure_logging("info", stream)
    log = structlog.get_logger()
    log.info("x")
    number = stream.fileno()
    stream.close()
    with (tmp_path / "blob").open("w") as blob:
        assert blob.fileno() == number
        log.info("y")
    assert (tmp_path / "blob").read_bytes() == b""
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_full_pipe_that_does_not_block_drops_lines() -> None:
    """A stderr made non-blocking by its owner costs lines, not the server."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream, open(reader, "rb"):
        configure_logging("info", stream)
        log = structlog.get_logger()
        for _ in range(2000):
            log.info("x", value="y" * 1000)


@pytest.mark.parametrize(
    "redirection",
    [pytest.param("2>&-", id="closed"), pytest.param("2>/dev/full", id="full"), pytest.param("2>&1 | true", id="gone")],
)
def test_a_useless_stderr_does_not_change_how_the_process_ends(redirection: str) -> None:
    """Closed, full or gone: the process logs into the void and exits as it would have."""
    program = (
        "import sys, structlog, expbuild.log as l; l.configure_logging(); sys.stdin.read()\n"
        "for _ in range(99): structlog.get_logger().info('x', value='y' * 999)\n"
        "sys.exit(7)"
    )
    script = f'set -o pipefail; sleep 0.05 | "$1" -c "$2" {redirection}'
    result = subprocess.run(["bash", "-c", script, "bash", sys.executable, program], check=False, timeout=60)
    assert result.returncode == 7


def test_loggers_used_before_can_be_captured() -> None:
    """structlog's capture_logs sees module-level loggers that are cached already."""
    stream = io.StringIO()
    log = logger_to(stream)
    log.info("first")
    configure_logging("info", io.StringIO())
    with structlog.testing.capture_logs() as captured:
        log.info("second", key=1)
    assert captured == [{"event": "second", "key": 1, "log_level": "info"}]
