"""The composition root: from a configuration to a serving process, and back to nothing when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from expbuild import reapi
from expbuild.api.action_cache import ActionCacheService
from expbuild.api.admin import AdminService, serve_admin
from expbuild.api.auth import Authenticator, load_tokens
from expbuild.api.bytestream import ByteStreamService
from expbuild.api.capabilities import CapabilitiesService
from expbuild.api.cas import CasService
from expbuild.api.compression import Compressor
from expbuild.api.execution import ExecutionService
from expbuild.api.health import HealthService
from expbuild.api.instances import Instances
from expbuild.api.operations import OperationsService
from expbuild.api.resource_names import ResourceNames
from expbuild.api.rpc import register
from expbuild.api.tls import load_credentials
from expbuild.api.transport import create_server
from expbuild.config import Config
from expbuild.digest import DigestFunctions
from expbuild.errors import ExpbuildError
from expbuild.execution.action import TimeoutPolicy
from expbuild.execution.manager import ExecutionManager, ManagerPolicy
from expbuild.execution.pool import PoolPolicy, WorkerPool
from expbuild.execution.resources import Capacity
from expbuild.execution.runner import ActionRunner, OutputLimits
from expbuild.lifecycle import StopRequest, drain
from expbuild.sd_notify import ServiceManager
from expbuild.storage.base import ActionCache, BlobStore
from expbuild.storage.factory import Stores, create_stores
from expbuild.workers.factory import Workers

log = structlog.get_logger()


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupError when the configuration cannot be kept."""
    stop = StopRequest()
    stop.listen_to_signals()
    os.umask(0o022)
    _raise_file_limit()
    try:
        with contextlib.ExitStack() as executors:
            storage = executors.enter_context(ThreadPoolExecutor(_threads(), "storage"))
            workspaces = executors.enter_context(ThreadPoolExecutor(_threads(), "workspace"))
            await _serve(config, storage, workspaces, stop)
    except BaseExceptionGroup as group:
        # What a task group reports is one refusal to start, or a fault; `except*` would wrap what is raised again.
        error = _first(group)
        raise (error if isinstance(error, ExpbuildError) else group) from None
    log.info("server.stopped")


async def _serve(
    config: Config, storage: ThreadPoolExecutor, workspaces: ThreadPoolExecutor, stop: StopRequest
) -> None:
    functions = DigestFunctions(config.capabilities.digest_functions)
    stores = create_stores(config.storage, functions.enabled, storage)
    # What still runs in threads when all else has ended uses the stores: they are closed after that.
    with stores.caretaker, storage, workspaces:
        await _serve_from(config, stores, functions, workspaces, stop)


async def _serve_from(
    config: Config, stores: Stores, functions: DigestFunctions, workspaces: ThreadPoolExecutor, stop: StopRequest
) -> None:
    blobs, action_cache = stores.blobs, stores.action_cache
    log.info("storage.initialised", cas=_place(config.storage.cas), action_cache=_place(config.storage.action_cache))
    servicers = _Servicers(config, blobs, action_cache, functions)
    if not config.capabilities.exec_enabled:
        async with _admin(config, AdminService(None, stores.caretaker.status)):
            await _listen(config, servicers, stop)
        return
    async with Workers(config.execution.pool.workers) as workers, asyncio.TaskGroup() as tasks:
        absolute_symlinks = config.capabilities.symlink_absolute_path_strategy == "ALLOWED"
        pool_config = config.execution.pool
        limits = OutputLimits(pool_config.max_log_bytes, pool_config.max_output_bytes)
        runner = ActionRunner(
            blobs, action_cache, workspaces, tasks, absolute_symlinks=absolute_symlinks, limits=limits
        )
        pool = WorkerPool(
            workers.all,
            runner,
            tasks,
            PoolPolicy(
                max_queue_size=pool_config.max_queue_size,
                interval_s=pool_config.scheduler_interval_ms / 1000,
                queue_timeout_s=pool_config.queue_timeout_seconds,
                capacity=Capacity(pool_config.cpu_cores, pool_config.memory_bytes),
            ),
        )
        kinds: Counter[str] = Counter()
        for worker in pool_config.workers:
            kinds[worker.type] += worker.count
        log.info("pool.created", workers=len(workers.all), **kinds)
        await pool.start()
        policy = ManagerPolicy(
            timeouts=TimeoutPolicy(pool_config.default_task_timeout_seconds, pool_config.max_task_timeout_seconds),
            result_ttl_s=pool_config.result_ttl_seconds,
            abandoned_grace_s=pool_config.abandoned_grace_seconds,
            absolute_symlinks=absolute_symlinks,
            renewal_s=stores.renewal_s,
        )
        manager = ExecutionManager(blobs, action_cache, pool, tasks, policy)
        servicers.add_execution(manager)
        keeper = tasks.create_task(pool.keep(), name="pool")
        async with _admin(config, AdminService(manager, stores.caretaker.status)):
            await _listen(config, servicers, stop, manager)
        keeper.cancel()


@contextlib.asynccontextmanager
async def _admin(config: Config, service: AdminService) -> AsyncIterator[None]:
    """Answer the operator while the context lasts."""
    server = await serve_admin(config.admin_socket, service)
    try:
        yield
    finally:
        if server is not None:
            await server.stop(1.0)
            with contextlib.suppress(OSError):
                config.admin_socket.unlink()


class _Servicers:
    """The services of this server, registered as they are added."""

    def __init__(self, config: Config, blobs: BlobStore, action_cache: ActionCache, functions: DigestFunctions) -> None:
        self._authenticator = Authenticator(None if config.auth is None else load_tokens(config.auth.tokens_file))
        credentials = None if config.tls is None else load_credentials(config.tls)
        self.server = create_server(
            config.server.transport, credentials=credentials, tokens=not self._authenticator.is_open
        )
        self.names: list[str] = []
        self.health = HealthService()
        self._blobs = blobs
        self._functions = functions
        self._instances = Instances(config.server.instance_name, strict=config.server.strict_instance_name)
        capabilities = config.capabilities
        compressors = (Compressor.IDENTITY, *(Compressor[name] for name in capabilities.supported_compressors))
        self._add("Capabilities", CapabilitiesService(capabilities, compressors, self._instances))
        self._add(
            "ContentAddressableStorage",
            CasService(blobs, functions, compressors, self._instances, capabilities.max_batch_total_size_bytes),
        )
        self._add("ByteStream", ByteStreamService(blobs, ResourceNames(functions, compressors), self._instances))
        self._add(
            "ActionCache",
            ActionCacheService(
                action_cache,
                blobs,
                functions,
                self._instances,
                update_enabled=capabilities.action_cache_update_enabled,
            ),
        )

    def add_execution(self, manager: ExecutionManager) -> None:
        """Serve Execution, and the operations it makes."""
        self._add("Execution", ExecutionService(manager, self._blobs, self._functions, self._instances))
        self._add("Operations", OperationsService(manager, self._blobs))

    def complete(self) -> None:
        """Add what speaks about the services: health and reflection."""
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        self._register(health_pb2_grpc.add_HealthServicer_to_server, self.health, health)
        about = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
        servicer = reflection.aio.ReflectionServicer((*self.names, health.full_name, about.full_name))
        self._register(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer, about)

    def _add(self, service: str, servicer: object) -> None:
        descriptor = next(d for d in reapi.SERVICE_DESCRIPTORS if d.name == service)
        self._register(getattr(reapi, f"add_{service}Servicer_to_server"), servicer, descriptor)
        self.names.append(descriptor.full_name)

    def _register(self, add_to_server: Callable[[Any, Any], None], servicer: object, descriptor: Any) -> None:
        register(add_to_server, servicer, descriptor, self.server.handlers, self._authenticator)


async def _listen(
    config: Config, servicers: _Servicers, stop: StopRequest, manager: ExecutionManager | None = None
) -> None:
    """Serve until told to stop; then let finish what runs, end the rest, and let answers get out."""
    service_manager = ServiceManager(os.environ)
    servicers.complete()
    server = servicers.server
    port = server.bind(config.server.address)
    exposure = _exposure(config)
    if exposure is not None:
        log.warning("server.exposed", address=config.server.address, reason=exposure)
    await server.start()
    servicers.health.serve(servicers.names)
    address = f"{config.server.address.rpartition(':')[0]}:{port}"
    log.info("server.listening", address=address)
    service_manager.notify("READY=1", f"STATUS=Serving on {address}")
    alive = asyncio.ensure_future(service_manager.keep_alive())
    try:
        await stop.wait()
        service_manager.notify("STOPPING=1", "STATUS=Stopping")
        servicers.health.refuse()
        if manager is not None:
            await drain(manager.pool, config.server.drain_timeout_seconds, stop, service_manager)
        log.info("server.stopping", grace_s=stop.grace_s)
    finally:
        alive.cancel()
        servicers.health.close()
        if manager is not None:
            manager.close()
        await server.stop(stop.grace_s)


def _threads() -> int:
    return max(4, 2 * (os.cpu_count() or 1))


def _place(config: object) -> str:
    root_dir = getattr(config, "root_dir", None)
    return str(root_dir) if root_dir is not None else "memory"


def _exposure(config: Config) -> str | None:
    """Return what a network that is not trusted could do to a server on this address, None when nothing is missing."""
    if _is_loopback(config.server.host):
        return None
    can = "run commands here" if config.capabilities.exec_enabled else "change what is cached here"
    if config.auth is None and config.tls is None:
        return f"anybody who reaches this address can {can}: there is no TLS and no authentication"
    if config.tls is None:
        return "tokens and files travel in the clear, for anybody on the way to read: there is no TLS"
    if config.auth is None and config.tls.client_ca is None:
        return f"anybody who reaches this address can {can}: there is no authentication"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: connections, blobs and directories all take one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error a group began with."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
