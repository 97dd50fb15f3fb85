"""The command line, as a person or systemd runs it: output, errors, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import expbuild
from expbuild.config import default_config, load_config, parse_config

EXAMPLE = Path(__file__).parent.parent / "examples" / "expbuild-server-pool.toml"

BAD = """
[server]
adress = "0.0.0.0:8980"
[execution.pool]
max_queue_size = 0
"""
BAD_LINES = [
    'server.adress: unknown key; did you mean "address"?',
    "execution.pool.max_queue_size: expected a positive integer, got 0",
]


def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `re-server` with these arguments and variables."""
    command = [sys.executable, "-m", "expbuild", *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "EXPBUILD_LOG"} | environ
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def run_with_server(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `re-server` with `body` as the body of `async def serve(config)`, in place of the real server."""
    program = (
        "import signal, sys, types\n"
        # What a shell starts in the background ignores SIGINT, and so would its children, this one too.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "server = sys.modules['expbuild.server'] = types.ModuleType('expbuild.server')\n"
        f"async def serve(config):\n    {body}\n"
        "server.serve = serve\n"
        "from expbuild.cli import main\n"
        "main(prog_name='re-server')\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """A file with two problems."""
    path = tmp_path / "bad.toml"
    path.write_text(BAD)
    return path


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_examples_options_and_commands(option: str) -> None:
    """Enough to start with, without reading anything else."""
    result = run(option)
    assert (result.returncode, result.stderr) == (0, "")
    for expected in (
        "Usage: re-server",
        "--config FILE",
        "--verbose",
        "check-config",
        "EXPBUILD_LOG",
        "127.0.0.1:8980",
    ):
        assert expected in result.stdout


def test_version() -> None:
    """The version of the installed package."""
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"re-server, version {version('expbuild')}\n", "")
    assert expbuild.__version__ == version("expbuild")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check-config", str(EXAMPLE)]], ids=" ".join)
def test_what_only_prints_does_not_load_grpc(arguments: list[str]) -> None:
    """These answer at once."""
    program = (
        "import atexit, sys\n"
        "heavy = {'grpc', 'uvloop', 'aiohttp'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from expbuild.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "[]\n")


def test_check_config_prints_the_resolved_configuration() -> None:
    """As TOML that means the same, with the defaults filled in."""
    result = run("check-config", EXAMPLE)
    assert (result.returncode, result.stderr) == (0, "")
    assert parse_config(result.stdout, "stdout") == load_config(EXAMPLE)
    assert "abandoned_grace_seconds = 300.0" in result.stdout.splitlines()


def test_check_config_without_a_file_prints_the_built_in_configuration() -> None:
    """A start for a file of one's own."""
    result = run("check-config")
    assert (result.returncode, result.stderr) == (0, "")
    assert parse_config(result.stdout, "stdout") == default_config()


def test_check_config_takes_the_file_of_the_config_option() -> None:
    """`re-server --config FILE check-config` asks about FILE."""
    assert run("--config", EXAMPLE, "check-config").stdout == run("check-config", EXAMPLE).stdout


def test_check_config_lists_every_problem_and_exits_2(bad_file: Path) -> None:
    """On stderr, each in its own line; nothing on stdout."""
    result = run("check-config", bad_file)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [f"re-server: {bad_file}: 2 problems in the configuration", *BAD_LINES]


def test_serving_with_a_bad_configuration_lists_every_problem_and_exits_2(bad_file: Path) -> None:
    """The same words as check-config; nothing is started."""
    result = run("--config", bad_file)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [f"re-server: {bad_file}: 2 problems in the configuration", *BAD_LINES]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Both ways in."""
    path = tmp_path / "none.toml"
    expected = [
        f"re-server: {path}: 1 problem in the configuration",
        f"cannot read {path}: No such file or directory",
    ]
    for arguments in (["check-config", path], ["--config", path]):
        result = run(*arguments)
        assert (result.returncode, result.stderr.splitlines()) == (2, expected)


@pytest.mark.parametrize("arguments", [["--confg", "x"], ["serve"], ["check-config", "a", "b"]], ids=" ".join)
def test_wrong_usage_exits_2_with_a_hint(arguments: list[str]) -> None:
    """No traceback, and a pointer to the help."""
    result = run(*arguments)
    assert result.returncode == 2
    assert "Try 're-server" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_log_level_exits_2() -> None:
    """Before anything is started."""
    result = run(EXPBUILD_LOG="loud")
    assert result.returncode == 2
    assert result.stderr == 're-server: EXPBUILD_LOG: expected debug, info, warning or error, got "loud"\n'


def test_serving_logs_the_source_of_the_configuration_and_runs_the_server() -> None:
    """The server gets the parsed configuration, on uvloop, with gRPC's C core told to be quiet."""
    body = (
        "import asyncio, os; print(config.server.instance_name, type(asyncio.get_running_loop()).__module__,"
        " os.environ['GRPC_ENABLE_FORK_SUPPORT'], os.environ['GRPC_VERBOSITY'])"
    )
    result = run_with_server(body, "--config", EXAMPLE)
    assert (result.returncode, result.stdout) == (0, "production uvloop 0 NONE\n")
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (line["level"], line["event"], line["source"]) == ("info", "config.loaded", str(EXAMPLE))


def test_verbose_logs_at_debug() -> None:
    """--verbose reaches the loggers of the server."""
    body = "import structlog; structlog.get_logger().debug('pool.woken')"
    assert "pool.woken" not in run_with_server(body).stderr
    assert "pool.woken" in run_with_server(body, "--verbose").stderr


def test_what_prevents_serving_is_one_line_and_exit_code_1() -> None:
    """An address in use, a work directory that cannot be made: a sentence, no traceback."""
    body = "from expbuild.errors import StartupError; raise StartupError('127.0.0.1:8980: address already in use')"
    result = run_with_server(body)
    assert result.returncode == 1
    assert result.stderr.splitlines()[1:] == ["re-server: 127.0.0.1:8980: address already in use"]


def test_an_unexpected_error_keeps_its_traceback() -> None:
    """A bug is not to be hidden."""
    result = run_with_server("raise RuntimeError('bug')")
    assert result.returncode == 1
    assert re.search(r"^RuntimeError: bug$", result.stderr, re.MULTILINE)


def test_an_interrupt_ends_without_a_traceback() -> None:
    """Ctrl-C while the server does not handle signals itself."""
    result = run_with_server(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n    import asyncio; await asyncio.sleep(60)"
    )
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_early_is_no_error_worth_a_traceback() -> None:
    """`re-server check-config | head -1`."""
    script = '"$1" -m expbuild check-config | true'
    result = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.stderr == ""


@pytest.mark.parametrize(("arguments", "right"), [(["ada"], "read"), (["ada", "--right", "write"], "write")])
def test_new_token_prints_the_token_and_the_line_that_knows_it(arguments: list[str], right: str) -> None:
    """The token alone on stdout, for a variable or a file; the line, which holds only its hash, on stderr."""
    result = run("new-token", *arguments)
    token = result.stdout.removesuffix("\n")
    assert result.returncode == 0
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    assert result.stderr.splitlines()[1:] == [f"ada {right} sha256:{hashlib.sha256(token.encode()).hexdigest()}"]
    assert token not in result.stderr


def test_new_token_with_a_name_that_cannot_be_one_exits_2() -> None:
    """Nothing on stdout that could pass for a token."""
    result = run("new-token", "ada lovelace")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("re-server: 'ada lovelace' cannot be the name of a token")
