"""All attacks, and how they are run on one server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from expbuild.reapi import Tree
from tests.attacks.attack import Attack, Outcome, Target
from tests.attacks.commands import COMMANDS
from tests.attacks.machine import MACHINE
from tests.attacks.running import INPUTS, OUTPUTS
from tests.attacks.trees import TREES
from tests.support.actions import status_of

ATTACKS: tuple[Attack, ...] = (*TREES, *COMMANDS, *INPUTS, *OUTPUTS, *MACHINE)

_AT_ONCE = 2
_SEEN_BYTES = 4 << 20


@dataclass(frozen=True)
class Ended:
    """Whether an attack succeeded, and what was seen of it."""

    succeeded: bool
    outcome: Outcome


async def run_all(target: Target, attacks: Sequence[Attack] = ATTACKS) -> dict[str, Ended]:
    """Run the attacks; return how each ended."""
    gate = asyncio.Semaphore(_AT_ONCE)
    ended: dict[str, Ended] = {}

    async def one(attack: Attack) -> None:
        async with gate:
            outcome = await _attack(target, attack)
            ended[attack.id] = Ended(await attack.judge(target, outcome), outcome)

    async with asyncio.TaskGroup() as tasks:
        for attack in attacks:
            tasks.create_task(one(attack))
    return ended


async def _attack(target: Target, attack: Attack) -> Outcome:
    outcome = Outcome()
    started = time.monotonic()
    try:
        finished = await target.client.execute(attack.build(target))
    except grpc.aio.AioRpcError as error:
        status = status_of(error)
        outcome.code, outcome.text = status.code, status.message
    else:
        outcome.response = finished.response
        outcome.code, outcome.text = finished.response.status.code, finished.response.status.message
        await _gather(target, outcome)
    outcome.wall_s = time.monotonic() - started
    return outcome


async def _gather(target: Target, outcome: Outcome) -> None:
    """Read everything that the action got out."""
    result, read = outcome.response.result, target.client.read
    if result.HasField("stdout_digest"):
        outcome.stdout = await read(result.stdout_digest)
    digests = [result.stderr_digest] if result.HasField("stderr_digest") else []
    digests += [file.digest for file in result.output_files]
    for directory in result.output_directories:
        tree = Tree.FromString(await read(directory.tree_digest))
        digests += [file.digest for node in (tree.root, *tree.children) for file in node.files]
    parts = [outcome.stdout]
    for digest in {digest.hash: digest for digest in digests if digest.size_bytes}.values():
        if digest.size_bytes <= _SEEN_BYTES:
            parts.append(await read(digest))
    outcome.seen = b"\n".join(parts)
