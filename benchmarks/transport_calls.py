"""Calls per second on each transport: GetActionResult of a whole server, beside a bare echo.

    python -m benchmarks.transport_calls --rounds 3 --seconds 3

from the top of the repository; it needs h2load (Debian: nghttp2-client) and the extra `expbuild[native]`.

Four servers are measured in turn, every second round in the other order. On grpcio and on the native transport each: a
whole `re-server` that holds the action result asked for (with its output file in the CAS, so that every answer is a
checked cache hit, and writes its line to the log), and an *echo*, a handler that returns the same answer ready-made
with nothing around it: what the transport itself allows. Servers and client share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import cast

import grpc
import uvloop

from expbuild.api.transport import Choice, create_server
from expbuild.reapi import (
    ActionCacheServicer,
    ActionCacheStub,
    ActionResult,
    BatchUpdateBlobsRequest,
    ContentAddressableStorageStub,
    DigestMessage,
    GetActionResultRequest,
    UpdateActionResultRequest,
    add_ActionCacheServicer_to_server,
)
from tests.support.files import scratch_directory
from tests.support.server import ReServer

METHOD = "build.bazel.remote.execution.v2.ActionCache/GetActionResult"
TRANSPORTS: tuple[Choice, ...] = ("grpcio", "native")
GOAL = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GetActionResult calls per second on both transports")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="per measurement")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16, help="concurrent calls on each connection")
    parser.add_argument("--echo", choices=TRANSPORTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.echo:
        uvloop.run(_echo(options.echo))
        return 0
    print(f"{os.cpu_count()} cores, {options.connections} connections x {options.streams} streams")
    print(
        "transport  server     " + "  ".join(f"round {n + 1:2}" for n in range(options.rounds)) + "    median calls/s"
    )
    with scratch_directory("expbuild-transport-") as directory, ExitStack() as servers:
        request = directory / "request"
        request.write_bytes(_frame(_request().SerializeToString()))
        addresses: dict[tuple[Choice, str], str] = {}
        for transport in TRANSPORTS:
            addresses[transport, "re-server"] = servers.enter_context(_re_server(directory / transport, transport))
            addresses[transport, "echo"] = servers.enter_context(_echo_server(transport))
        figures: dict[tuple[Choice, str], list[float]] = {key: [] for key in addresses}
        for number in range(options.rounds):
            for key in sorted(addresses, reverse=bool(number % 2)):
                figures[key].append(_calls_per_s(addresses[key], request, options))
    for (transport, server), rounds in figures.items():
        shown = "  ".join(f"{figure:8.0f}" for figure in rounds)
        print(f"{transport:9}  {server:9}  {shown}  {median(rounds):16.0f}")
    whole, bare = (
        median(figures["native", server]) / median(figures["grpcio", server]) for server in ("re-server", "echo")
    )
    print(f"native / grpcio: re-server {whole:.1f}, echo {bare:.1f} (goal for re-server: at least {GOAL:g})")
    for transport in TRANSPORTS:
        share = median(figures[transport, "re-server"]) / median(figures[transport, "echo"])
        print(f"re-server / echo on {transport}: {share:.2f}")
    return 0


def _calls_per_s(address: str, request: Path, options: argparse.Namespace) -> float:
    """Return the calls per second h2load gets answered. Raises RuntimeError when one of them failed."""
    command = ["h2load", f"--duration={options.seconds}", "--threads=1", f"--data={request}"]
    command += [f"--clients={options.connections}", f"--max-concurrent-streams={options.streams}"]
    command += ["--header=content-type: application/grpc", "--header=te: trailers", f"http://{address}/{METHOD}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds + 30, check=True)
    rate = re.search(r"finished in .*?, ([0-9.]+) req/s", done.stdout)
    failed = re.search(r"([0-9]+) failed, ([0-9]+) errored", done.stdout)
    if rate is None or failed is None or failed.groups() != ("0", "0"):
        raise RuntimeError(f"h2load against {address}:\n{done.stdout}{done.stderr}")
    return float(rate[1])


@contextmanager
def _re_server(directory: Path, transport: Choice) -> Iterator[str]:
    """Run a whole server with the action result in it; its address."""
    state = directory / "state"
    config = {
        "server": {"address": "127.0.0.1:0", "transport": transport},
        "storage": {
            "cas": {"backend": "filesystem", "root_dir": str(state / "cas")},
            "action_cache": {"backend": "filesystem", "root_dir": str(state / "action-cache")},
        },
        "capabilities": {"exec_enabled": False},
    }
    with ReServer(directory, config) as server:
        asyncio.run(_fill(server.address))
        yield server.address


@contextmanager
def _echo_server(transport: Choice) -> Iterator[str]:
    """Run a server that does nothing but answer; its address."""
    command = [sys.executable, "-m", "benchmarks.transport_calls", "--echo", transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            # structlog's line about the selection comes first; ours is the last.
            yield next(line.split()[1] for line in process.stdout if line.startswith("listening "))
        finally:
            process.terminate()


async def _echo(transport: Choice) -> None:
    answer = _result()

    async def get_action_result(request: GetActionResultRequest, context: object) -> ActionResult:
        return answer

    server = create_server(transport)
    echo = SimpleNamespace(GetActionResult=get_action_result, UpdateActionResult=get_action_result)
    add_ActionCacheServicer_to_server(cast("ActionCacheServicer", echo), server.handlers)
    port = server.bind("127.0.0.1:0")
    await server.start()
    print(f"listening 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


_OUTPUT = b"an object file, for all we know"


def _digest(data: bytes) -> DigestMessage:
    return DigestMessage(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def _request() -> GetActionResultRequest:
    return GetActionResultRequest(action_digest=_digest(b"an action"))


def _result() -> ActionResult:
    result = ActionResult(exit_code=0)
    result.output_files.add(path="bazel-out/k8-fastbuild/bin/object.o", digest=_digest(_OUTPUT))
    result.execution_metadata.worker = "host-0"
    return result


async def _fill(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        blobs = BatchUpdateBlobsRequest()
        blobs.requests.add(digest=_digest(_OUTPUT), data=_OUTPUT)
        await ContentAddressableStorageStub(channel).BatchUpdateBlobs(blobs)
        action_cache = ActionCacheStub(channel)
        update = UpdateActionResultRequest(action_digest=_request().action_digest, action_result=_result())
        await action_cache.UpdateActionResult(update)
        hit = await action_cache.GetActionResult(_request())
        assert hit.output_files, "not the result that was written"


def _frame(message: bytes) -> bytes:
    """Return a message as it goes over the wire: not compressed, its length, itself."""
    return b"\0" + struct.pack(">I", len(message)) + message


if __name__ == "__main__":
    raise SystemExit(main())
