"""The command line: `re-server` serves, `check-config` explains a configuration, `new-token` makes a credential.

`storage` looks after what is stored (`cli_storage.py`).
Exit codes: 0 stopped as asked, 1 could not start or failed, 2 wrong usage or configuration, 130 interrupted.
What a command needs is imported inside it, so that all but serving answers at once and never loads gRPC.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from expbuild import __version__
from expbuild.cli_status import add_to as add_status_commands
from expbuild.cli_storage import storage

if TYPE_CHECKING:
    from expbuild.config import Config

_FILE = click.Path(path_type=Path)

_HELP = """Build remotely: a Remote Execution API v2 server for Bazel, Buck2 and other clients.

Without --config it serves on 127.0.0.1:8980, runs actions as processes of this machine, one per core, and keeps its
state in ~/.local/state/expbuild (as root: /var/lib/expbuild).

\b
Examples:
  re-server                                  serve with the built-in configuration
  re-server --config expbuild.toml           serve as the file says
  re-server check-config expbuild.toml       print what the file means, or all that is wrong with it
  re-server check-config > expbuild.toml     start a file of your own from the built-in configuration
  re-server status --watch                   show what a running server does
  re-server why                              say why actions wait
  re-server storage stats                    what the stores hold (also: verify, gc, rm, ac)
  re-server new-token alice --right write    make a token for the file that auth.tokens_file names
  bazel build --remote_executor=grpc://127.0.0.1:8980 //...

\b
Environment:
  EXPBUILD_LOG    level of the log on stderr: debug, info (default), warning or error
"""


@click.group(
    help=_HELP,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--config", "config_file", type=_FILE, metavar="FILE", help="Read the configuration from FILE (TOML).")
@click.option("--verbose", is_flag=True, help="Log at level debug, whatever EXPBUILD_LOG says.")
@click.version_option(__version__, prog_name="re-server")
@click.pass_context
def main(context: click.Context, config_file: Path | None, verbose: bool) -> None:
    """Serve, unless a subcommand is named."""
    context.obj = config_file
    if context.invoked_subcommand is None:
        _serve(config_file, verbose)


@main.command("check-config", short_help="Print what a configuration file means, or all that is wrong with it.")
@click.argument("file", type=_FILE, required=False)
@click.pass_obj
def check_config(config_file: Path | None, file: Path | None) -> None:
    """Print the configuration in FILE with all defaults filled in, or everything that is wrong with it.

    Without FILE: the one --config names, else the built-in configuration. Exit code 2 when there is a problem.
    """
    from expbuild.config import render_config

    click.echo(render_config(_load(file or config_file)), nl=False)


@main.command("new-token", short_help="Make a bearer token for a client.")
@click.argument("name")
@click.option(
    "--right",
    type=click.Choice(["read", "write"]),
    default="read",
    show_default=True,
    help="What the token allows: read caches and watch operations, or everything.",
)
def new_token(name: str, right: str) -> None:
    """Print a new token on stdout, and on stderr its line for the file that auth.tokens_file names.

    NAME is who will use it, for the log. The token itself is stored nowhere: hand it on now. The server reads the file
    when it starts. To withdraw a token, delete its line and restart the server.
    """
    from expbuild.api import auth
    from expbuild.errors import InvalidArgument

    try:
        token, line = auth.new_token(name, auth.Right[right.upper()])
    except InvalidArgument as error:
        _fail(2, str(error))
    click.echo("Add this line to the file that auth.tokens_file names; the token itself is shown only now.", err=True)
    click.echo(line, err=True)
    click.echo(token)


def _load(config_file: Path | None) -> Config:
    """Return the configuration; with problems, list them all on stderr and exit with 2."""
    from expbuild.config import default_config, load_config
    from expbuild.errors import ConfigError

    try:
        return default_config() if config_file is None else load_config(config_file)
    except ConfigError as error:
        count = len(error.problems)
        _fail(2, f"{error.source}: {count} problem{'s' if count > 1 else ''} in the configuration", *error.problems)


def _serve(config_file: Path | None, verbose: bool) -> None:
    """Serve until told to stop; what prevents it becomes one line on stderr and an exit code."""
    import structlog

    from expbuild.errors import ExpbuildError
    from expbuild.log import configure_logging, level_from

    try:
        configure_logging(level_from(verbose, os.environ))
    except ValueError as error:
        _fail(2, str(error))
    config = _load(config_file)
    structlog.get_logger().info(
        "config.loaded", version=__version__, source="built-in" if config_file is None else str(config_file)
    )
    try:
        _run(config)
    except ExpbuildError as error:
        _fail(1, str(error))
    except KeyboardInterrupt:  # before or after the time in which the server handles signals itself
        sys.exit(130)


def _run(config: Config) -> None:
    # Read by gRPC's C core when it is first imported. Its fork handlers would stop its threads around every fork, and
    # its log repeats on stderr, in its own format, what we report.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import uvloop

    from expbuild.server import serve

    uvloop.run(serve(config))


def _fail(exit_code: int, *lines: str) -> NoReturn:
    with suppress(OSError):  # nobody reads stderr; the exit code still tells
        click.echo("\n".join(["re-server: " + lines[0], *lines[1:]]), err=True)
    sys.exit(exit_code)


main.add_command(storage)
add_status_commands(main, _load)
