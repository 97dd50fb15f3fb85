"""`re-server storage`: looking into the stores and tending them by hand, also while a server uses them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from expbuild.storage.inspection import CachedResult, StoreInspector

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class _Duration(click.ParamType[float]):
    """`90m`, `12h`, `7d`."""

    name = "AGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"([0-9]{1,9})([smhdw])", str(value), re.ASCII)
        if match is None:
            self.fail(f"expected a number and one of s, m, h, d, w (as in 12h), got {value!r}", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class _Stores:
    """The stores of the configuration, opened when they are asked for."""

    cas: Callable[[], StoreInspector]
    action_cache: Callable[[], StoreInspector]


@click.group(help="Look into the stores of a configuration and tend them; safe while a server uses them.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="As for the server.")
@click.pass_context
def storage(context: click.Context, config_file: Path | None) -> None:
    from expbuild.log import configure_logging, level_from

    try:
        configure_logging(level_from(False, os.environ))
    except ValueError as error:
        _fail(str(error), 2)
    file = config_file or context.obj
    context.obj = _Stores(lambda: _open(file, "cas"), lambda: _open(file, "action_cache"))


@storage.command(short_help="What the stores hold.")
@_JSON
@click.pass_obj
def stats(stores: _Stores, as_json: bool) -> None:
    """Count what is stored: entries, bytes, how long ago they were used."""
    from expbuild.storage.inspection import to_json

    with _errors():
        for name, store in (("cas", stores.cas()), ("action_cache", stores.action_cache())):
            found = store.figures()
            if as_json:
                _print_json({"store": name, **to_json(found)})
                continue
            limit = "no limit" if found.max_size_bytes is None else f"of {_bytes(found.max_size_bytes)}"
            click.echo(f"{name}: {found.root}{' (a server uses it)' if found.in_use else ''}")
            click.echo(f"  {found.entries} entries in {found.files} files, {_bytes(found.used_bytes)} {limit}")
            click.echo(f"  {_bytes(found.free_bytes)} free on the file system")
            if found.oldest_age_s is not None and found.newest_age_s is not None:
                click.echo(f"  last used between {_age(found.oldest_age_s)} and {_age(found.newest_age_s)} ago")
            click.echo(f"  {_bytes(found.promised_bytes)} promised within the last {_age(found.promised_s)}")
            if found.quarantined:
                click.echo(f"  {found.quarantined} damaged files in {found.root}/quarantine")
            if found.at_risk:
                click.echo("  at risk: the machine went down while it was in use; entries are verified before use")


@storage.command(short_help="Hash everything; put damaged blobs aside.")
@_JSON
@click.pass_obj
def verify(stores: _Stores, as_json: bool) -> None:
    """Hash every blob and check every action result.

    Damaged blobs are moved to quarantine/, damaged results removed; clients upload or build them again. Exit code 1
    when there were any.
    """
    from expbuild.storage.inspection import verify_blobs, verify_results

    damaged = 0
    with _errors():
        for name, check, store in (
            ("cas", verify_blobs, stores.cas()),
            ("action_cache", verify_results, stores.action_cache()),
        ):
            files = bad = 0
            for file, is_whole in check(store):
                files += 1
                if not is_whole:
                    bad += 1
                    _say(as_json, {"store": name, "damaged": file}, f"{name}: damaged: {file}")
            _say(as_json, {"store": name, "files": files, "bad": bad}, f"{name}: {files} files verified, {bad} damaged")
            damaged += bad
    sys.exit(1 if damaged else 0)


@storage.command(short_help="Make room: remove what was used longest ago.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--older-than", type=_Duration(), help="Remove all that was not used for so long (as in 7d).")
@_JSON
@click.pass_obj
def gc(stores: _Stores, dry_run: bool, older_than: float | None, as_json: bool) -> None:
    """Remove what is over the limits of the configuration, or older than AGE; nothing that is still promised."""
    with _errors():
        for name, store in (("cas", stores.cas()), ("action_cache", stores.action_cache())):
            entries = size = 0
            for candidate in store.collectable(older_than):
                if dry_run or store.evict(candidate):
                    entries += 1
                    size += candidate.size_bytes
                    if dry_run and as_json:
                        _print_json({"store": name, "entry": candidate.name, "size_bytes": candidate.size_bytes})
            verb = "would be removed" if dry_run else "removed"
            told = {"store": name, "dry_run": dry_run, "entries": entries, "size_bytes": size}
            _say(as_json, told, f"{name}: {entries} entries {verb}, {_bytes(size)}")


@storage.command(short_help="Remove one blob.")
@click.argument("digest")
@click.pass_obj
def rm(stores: _Stores, digest: str) -> None:
    """Remove the blob DIGEST, written HASH/SIZE or FUNCTION/HASH/SIZE. Results that name it become misses."""
    from expbuild.storage.inspection import remove_blob

    with _errors():
        if not remove_blob(stores.cas(), digest):
            _fail(f"blob {digest} is not in the CAS")
        click.echo(f"removed blob {digest}")


@storage.group(short_help="The action cache: list, show, rm.")
def ac() -> None:
    """Look at cached action results, and remove them."""


_ACTION = click.option("--action", metavar="HASH", help="Only of the action whose digest begins so.")
_INVOCATION = click.option("--invocation", metavar="ID", help="Only those that this build (invocation id) stored.")
_OLDER = click.option("--older-than", type=_Duration(), help="Only those not used for so long (as in 7d).")


@ac.command("list", short_help="List results.")
@_ACTION
@_INVOCATION
@_OLDER
@_JSON
@click.pass_obj
def ac_list(
    stores: _Stores, action: str | None, invocation: str | None, older_than: float | None, as_json: bool
) -> None:
    """List cached action results."""
    from expbuild.storage.inspection import results, to_json

    with _errors():
        for cached, _, _ in results(stores.action_cache()):
            if _is_wanted(cached, action, invocation, older_than):
                text = (
                    f"{cached.action}  exit {cached.exit_code}, {cached.outputs} outputs, used {_age(cached.age_s)} ago"
                    f", instance {cached.instance_name!r}, invocation {cached.invocation_id or 'unknown'}"
                )
                _say(as_json, to_json(cached), text)


@ac.command("show", short_help="Print a result whole.")
@click.argument("action")
@_JSON
@click.pass_obj
def ac_show(stores: _Stores, action: str, as_json: bool) -> None:
    """Print every result of the action whose digest begins with ACTION."""
    from google.protobuf.json_format import MessageToDict

    from expbuild.storage.inspection import results, to_json

    with _errors():
        found = [item for item in results(stores.action_cache()) if _is_wanted(item[0], action, None, None)]
        if not found:
            _fail(f"no result of an action {action}… is cached")
        for cached, entry, _ in found:
            if as_json:
                _print_json({**to_json(cached), "result": MessageToDict(entry.result)})
            else:
                click.echo(f"action {cached.action}, instance {cached.instance_name!r}, used {_age(cached.age_s)} ago")
                click.echo(f"stored by invocation {cached.invocation_id or 'unknown'}")
                click.echo(str(entry.result))


@ac.command("rm", short_help="Remove results.")
@_ACTION
@_INVOCATION
@_OLDER
@click.option("--all", "everything", is_flag=True, help="All of them.")
@_JSON
@click.pass_obj
def ac_rm(
    stores: _Stores,
    action: str | None,
    invocation: str | None,
    older_than: float | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Remove cached action results; the actions run again when they are next asked for."""
    from expbuild.storage.inspection import results

    if not (action or invocation or older_than is not None or everything):
        raise click.UsageError("say which: --action, --invocation, --older-than or --all")
    with _errors():
        store = stores.action_cache()
        removed = 0
        for cached, _, candidate in results(store):
            if _is_wanted(cached, action, invocation, older_than) and store.evict(candidate):
                removed += 1
        _say(as_json, {"removed": removed}, f"{removed} results removed")


def _is_wanted(cached: CachedResult, action: str | None, invocation: str | None, older_than: float | None) -> bool:
    if action is not None and not cached.action.partition("/")[2].startswith(action.removeprefix("sha256/")):
        return False
    if invocation is not None and cached.invocation_id != invocation:
        return False
    return older_than is None or cached.age_s >= older_than


def _open(file: Path | None, name: str) -> StoreInspector:
    from expbuild.config import default_config, load_config
    from expbuild.storage.factory import action_cache_policy, cas_policy
    from expbuild.storage.inspection import StoreInspector

    config = (default_config() if file is None else load_config(file)).storage
    is_cas = name == "cas"
    root_dir = (config.cas if is_cas else config.action_cache).root_dir
    if root_dir is None:
        _fail(f'storage.{name}: backend = "memory" keeps nothing that could be looked at')
    policy = cas_policy(config.cas) if is_cas else action_cache_policy(config)
    return StoreInspector(root_dir, f"storage.{name}.root_dir", "cas" if is_cas else "action-cache", policy)


@contextmanager
def _errors() -> Iterator[None]:
    """Say what went wrong in a line, and end with the exit code it has everywhere."""
    from expbuild.errors import ConfigError, ExpbuildError, InvalidArgument

    try:
        yield
    except ExpbuildError as error:
        _fail(str(error), 2 if isinstance(error, ConfigError | InvalidArgument) else 1)


def _fail(text: str, exit_code: int = 1) -> NoReturn:
    click.echo(f"re-server: {text}", err=True)
    sys.exit(exit_code)


def _say(as_json: bool, told: dict[str, Any], text: str) -> None:
    if as_json:
        _print_json(told)
    else:
        click.echo(text)


def _print_json(told: dict[str, Any]) -> None:
    click.echo(json.dumps(told, sort_keys=True))


def _bytes(count: int) -> str:
    value = float(count)
    units: Iterable[str] = ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _age(seconds: float) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"
