"""A Docker daemon as one worker sees it: every call bounded, every error ours, every container accounted for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

import aiodocker
import aiohttp
import structlog
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError

from expbuild.errors import WorkerFailed

LABEL = "expbuild.work-dir"
"""Marks our containers; its value is the worker's own directory, so that no server touches those of another."""

_NO_CONNECTION = 900
"""The status of aiodocker's own errors about the connection; the daemon itself answers with those of HTTP."""

log = structlog.get_logger()
_T = TypeVar("_T")


class Daemon:
    """The connection of one worker to the daemon, and the containers it has there."""

    def __init__(self, host: str, label: str, timeout_s: float) -> None:
        """Prepare a connection. label: the value of `LABEL` on the containers. timeout_s: the bound of each call."""
        self.host = host
        self._label = label
        self._timeout_s = timeout_s
        self._client: aiodocker.Docker | None = None
        self._alive: set[str] = set()  # created, and not known to be removed
        self._not_removed: set[str] = set()  # those of them that could not be

    @property
    def client(self) -> aiodocker.Docker:
        """The API. Raises WorkerFailed without a connection."""
        if self._client is None:
            raise WorkerFailed(f"not connected to the Docker daemon at {self.host}")
        return self._client

    async def connect(self) -> None:
        """Connect anew: a daemon that was gone may speak another version when it is back.

        Nothing is sent yet. Raises ValueError when `host` is not an address.
        """
        await self._disconnect()
        self._client = aiodocker.Docker(self.host)

    async def close(self) -> None:
        """Remove what may be left of our containers, where the daemon lets us, and disconnect."""
        try:
            if self._alive:
                await self.remove_leftovers()
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def call(self, what: str) -> AbstractAsyncContextManager[None]:
        """Return the context of one ordinary call, bounded by the worker's time limit. (`call_within`)"""
        return self.call_within(self._timeout_s, what)

    @asynccontextmanager
    async def call_within(self, timeout_s: float | None, what: str) -> AsyncIterator[None]:
        """Bound what is done with the daemon by a time limit, and turn its errors into WorkerFailed.

        timeout_s: None only where something else is the bound. what: continues "the Docker daemon could not ...".
        """
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise WorkerFailed(f"the Docker daemon did not {what} within {timeout_s} s") from error
        except (DockerError, aiohttp.ClientError, OSError) as error:
            if isinstance(error, DockerError) and error.status != _NO_CONNECTION:
                raise WorkerFailed(f"the Docker daemon could not {what}: {error.message}") from error
            raise WorkerFailed(f"cannot reach the Docker daemon at {self.host}: {_reason(error)}") from error

    async def create(self, config: dict[str, Any]) -> DockerContainer:
        """Create a container; the caller has to `remove` it.

        A cancellation takes effect only afterwards: cut off in between, we would not know of the container.
        """
        creating = asyncio.create_task(self._create(config))
        try:
            return await to_the_end(_result(creating))
        except asyncio.CancelledError:
            if not creating.cancelled() and creating.exception() is None:
                await self.remove(creating.result())
            raise

    async def _create(self, config: dict[str, Any]) -> DockerContainer:
        async with self.call("create a container"):
            container = await self.client.containers.create({**config, "Labels": {LABEL: self._label}})
        self._alive.add(container.id)
        return container

    @property
    def has_leftovers(self) -> bool:
        """Whether a container we created could not be removed: what runs in it may still be alive."""
        return bool(self._not_removed)

    async def remove(self, container: DockerContainer) -> bool:
        """Kill and remove a container, also when cancelled meanwhile; return whether it and all in it are gone.

        Never raises WorkerFailed, which would hide the reason of a run's end; see `has_leftovers` too.
        """
        return await to_the_end(self._try_to_remove(container))

    async def _try_to_remove(self, container: DockerContainer) -> bool:
        try:
            await self._remove(container)
        except WorkerFailed as error:
            self._not_removed.add(container.id)
            log.warning("container.not_removed", container=container.id, reason=str(error))
            return False
        return True

    async def remove_leftovers(self) -> int:
        """Kill and remove all containers of this worker, of an earlier process too; return how many there were."""
        async with self.call("list containers"):
            filters = json.dumps({"label": [f"{LABEL}={self._label}"]})
            found = await self.client.containers.list(all=True, filters=filters)
        for container in found:
            await self._remove(container)
        self._alive.clear()
        self._not_removed.clear()
        return len(found)

    async def has_killed(self, container: DockerContainer, state: Mapping[str, Any]) -> bool:
        """Whether the daemon sent the ended container a signal: because somebody told it to, or it is shutting down.

        state: the container's, as inspected after its end.
        """
        # The event may be written down a moment after the end it has caused. Were there no upper limit, the daemon
        # would go on reporting events for ever.
        since, until = (datetime.fromisoformat(state[key]).timestamp() for key in ("StartedAt", "FinishedAt"))
        filters = json.dumps({"container": [container.id], "event": ["kill"]})
        events = self.client.events
        found = events.subscribe(create_task=False)  # type: ignore[no-untyped-call]  # aiodocker has no types here
        async with self.call("list its events"):
            await events.run(since=f"{since:.6f}", until=f"{until + 0.5:.6f}", filters=filters)
        return await found.get() is not None  # None marks the end of the list

    async def changes(self, container: DockerContainer) -> frozenset[str]:
        """Return the paths that differ between the container's file system and its image's."""
        async with self.call("compare a container with its image"):
            found = await self.client._query_json(f"containers/{container.id}/changes")  # aiodocker does not offer it
        return frozenset(entry["Path"] for entry in found or ())

    async def _remove(self, container: DockerContainer) -> None:
        async with self.call("remove a container"):
            try:
                # By the connection there is now: the one it was created through may be gone.
                await self.client.containers.container(container.id).delete(force=True, v=True)
            except DockerError as error:
                if error.status not in (404, 409):  # gone, or about to go
                    raise
        self._alive.discard(container.id)


async def to_the_end(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Await the coroutine to its end even when cancelled meanwhile; the cancellation goes on after that."""
    task = asyncio.create_task(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # marks it as seen
        raise cancelled
    return task.result()


async def _result(task: asyncio.Task[_T]) -> _T:
    return await task


def _reason(error: Exception) -> str:
    """Return why there is no connection, in the words of the operating system where it has some."""
    for cause in (error.__context__, error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error) or type(error).__name__
