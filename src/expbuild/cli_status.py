"""`re-server status` and `re-server why`: what a running server does, and why things wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from expbuild.config import Config
    from expbuild.reapi import ExecutionStatus, GetStatusResponse, WhyResponse, WorkerStatus

_T = TypeVar("_T")
_WATCH_S = 2.0
_SOCKET = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The server's admin socket, if not the configured.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def add_to(group: click.Group, load: Callable[[Path | None], Config]) -> None:
    """Add the commands. load: reads the configuration that `--config` of the group names."""

    @group.command("status", short_help="Show what a running server does: workers, queue, builds, stores.")
    @click.option("--watch", is_flag=True, help=f"Again every {_WATCH_S:g} seconds, until interrupted.")
    @_JSON
    @_SOCKET
    @click.pass_obj
    def status(config_file: Path | None, watch: bool, as_json: bool, socket: Path | None) -> None:
        """Show what the server of this configuration does now."""
        from expbuild.api.admin_client import AdminClient

        client = AdminClient(socket or load(config_file).admin_socket)
        while True:
            response = _ask(client.status)
            if watch and not as_json:
                click.clear()
            click.echo(_json(response) if as_json else "\n".join(_status_lines(response)))
            if not watch:
                return
            try:
                time.sleep(_WATCH_S)
            except KeyboardInterrupt:
                return

    @group.command("why", short_help="Say why an action, or everything of a build, waits or how it ended.")
    @click.argument("subject", metavar="[ACTION|INVOCATION]", default="")
    @_JSON
    @_SOCKET
    @click.pass_obj
    def why(config_file: Path | None, subject: str, as_json: bool, socket: Path | None) -> None:
        """Say where an action is and why: ACTION is its hash, or the beginning of it; an operation's name will do too.

        With an INVOCATION, all of that build; with neither, everything that has not ended.
        """
        from expbuild.api.admin_client import AdminClient

        client = AdminClient(socket or load(config_file).admin_socket)
        response = _ask(lambda: client.why(subject))
        if as_json:
            click.echo(_json(response))
        else:
            click.echo("\n".join(_why_lines(response, subject)))
        if subject and not response.executions:
            sys.exit(1)


def _ask(call: Callable[[], _T]) -> _T:
    from expbuild.errors import ExpbuildError

    try:
        return call()
    except ExpbuildError as error:
        click.echo(f"re-server: {error}", err=True)
        sys.exit(1)


def _json(message: Message) -> str:
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _status_lines(response: GetStatusResponse) -> Iterator[str]:
    state = "draining" if response.draining else "serving"
    yield f"re-server {response.version}, {state} for {_duration(response.uptime.ToNanoseconds())}"
    counts = ", ".join(f"{response.executions[name]} {name}" for name in sorted(response.executions))
    if counts:
        yield f"executions: {counts}"
    yield f"memory: {_size(response.memory_peak_bytes)} at most"
    if response.workers:
        yield ""
        yield f"{'WORKER':<12} {'STATE':<8} DOING"
        for worker in response.workers:
            yield f"{worker.name:<12} {worker.state:<8} {_doing(worker)}".rstrip()
        yield ""
        yield f"queued: {response.queued}"
    if response.builds:
        yield ""
        yield f"{'RUNNING':>7} {'QUEUED':>7} BUILD"
        for build in response.builds:
            yield f"{build.running:>7} {build.queued:>7} {build.name or '(no invocation)'}"
    for store in response.stores:
        yield ""
        counted = store.HasField("entries")
        entries = f"{store.entries} files, {_size(store.used_bytes)}" if counted else "not counted yet"
        yield f"store {store.root}: {entries}; {_size(store.free_bytes)} free"
        yield f"  evicted {store.evicted_entries} ({_size(store.evicted_bytes)}), quarantined {store.quarantined}"
        if store.broken_promises:
            yield f"  {store.broken_promises} went before their promised time: the disk is too small for this load"
        if store.at_risk:
            yield "  an unclean stop was found: every blob is verified before it is used"


def _doing(worker: WorkerStatus) -> str:
    if worker.action:
        return f"{worker.action} for {worker.build or '(no invocation)'}"
    since = worker.since.ToNanoseconds()
    return f"{worker.reason} (for {_duration(since)})" if since else worker.reason


def _why_lines(response: WhyResponse, subject: str) -> Iterator[str]:
    if not response.executions:
        known = f"nothing is known of {subject!r}: it has expired, or never came here"
        yield known if subject else "nothing waits or runs"
    for execution in response.executions:
        yield f"{execution.action} {execution.stage.lower()} for {_duration(execution.age.ToNanoseconds())}"
        yield f"  build {execution.build or '(no invocation)'}"
        yield f"  {_state(execution)}"
    if response.left_out:
        yield f"and {response.left_out} more"


def _state(execution: ExecutionStatus) -> str:
    if execution.HasField("wait"):
        return f"waits: {execution.wait.kind}: {execution.wait.text}"
    if execution.code:
        return f"ended: {execution.code}: {execution.message}"
    return f"runs on {execution.worker}"


def _duration(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
