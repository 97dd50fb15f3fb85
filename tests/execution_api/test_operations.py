"""Execute and WaitExecution as operations: streams, names, errors, merging, caching."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from expbuild.digest import DigestFunction
from expbuild.reapi import (
    Action,
    ActionResult,
    Command,
    DigestMessage,
    ExecuteRequest,
    ExecutionStage,
    OutputFile,
    PreconditionFailure,
    Status,
)
from tests.support.actions import (
    RPC_TIMEOUT_S,
    Blobs,
    BuiltAction,
    Client,
    SideEffects,
    Stream,
    build_action,
    failing_rpc,
    from_message,
    metadata_of,
    put,
    put_tree,
    shell,
    subject,
)

INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION = 3, 5, 9
OK = Status()


# ---- the stream --------------------------------------------------------------------------------------------------


async def test_EXE_09_first_message_comes_before_the_action_runs(client: Client, effects: SideEffects) -> None:
    """The first message names the operation and describes it, while the action still waits or runs."""
    gate = effects.gate()
    action = shell(gate.script)
    stream = await client.start(action)
    first = stream.operations[0]
    assert first.name
    assert not first.done
    assert metadata_of(first).stage in (ExecutionStage.CACHE_CHECK, ExecutionStage.QUEUED, ExecutionStage.EXECUTING)
    assert metadata_of(first).action_digest == action.digest
    await gate.open()
    assert (await stream.finish()).result.exit_code == 0


async def test_stages_are_told_in_order_with_the_worker(client: Client, effects: SideEffects) -> None:
    """A running operation says where it runs, and since when."""
    gate = effects.gate()
    stream = await client.start(shell(gate.script))
    await stream.until(ExecutionStage.EXECUTING)
    await gate.open()
    whole = await stream.finish()
    stages = [metadata.stage for metadata in whole.metadata]
    assert stages == sorted(stages)
    executing = next(m for m in whole.metadata if m.stage == ExecutionStage.EXECUTING)
    assert executing.partial_execution_metadata.worker in ("host-0", "host-1")
    assert executing.partial_execution_metadata.HasField("queued_timestamp")


async def test_EXE_10_operation_names_are_distinct_and_begin_with_the_instance(client: Client) -> None:
    """Names are unguessable; those of an instance begin with its name."""
    action = shell("exit 0")
    names = {(await client.execute(action, instance="some/team")).name for _ in range(3)}
    assert len(names) == 3
    for name in names:
        prefix, _, last = name.rpartition("/")
        assert prefix == "some/team/operations"
        assert uuid.UUID(last).version == 4


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ExecuteRequest(), id="EXE-02-unset-digest"),
        pytest.param(ExecuteRequest(action_digest=DigestMessage(hash="xyz", size_bytes=1)), id="EXE-02-malformed"),
        pytest.param(ExecuteRequest(action_digest=DigestMessage(hash="A" * 64, size_bytes=1)), id="EXE-02-upper-case"),
        pytest.param(ExecuteRequest(action_digest=DigestMessage(hash="a" * 64, size_bytes=-1)), id="EXE-02-negative"),
        pytest.param(
            ExecuteRequest(action_digest=DigestMessage(hash="a" * 64, size_bytes=1), digest_function=7),  # type: ignore[arg-type]
            id="EXE-02-digest-function-not-served",
        ),
        pytest.param(
            ExecuteRequest(action_digest=DigestMessage(hash="a" * 64, size_bytes=1), instance_name="a//b"),
            id="EXE-02-malformed-instance",
        ),
        pytest.param(
            ExecuteRequest(action_digest=DigestMessage(hash="a" * 64, size_bytes=17 << 20)), id="EXE-07-huge-action"
        ),
    ],
)
@pytest.mark.duty("EXE-01")
async def test_bad_requests_are_rpc_errors(client: Client, request_: ExecuteRequest) -> None:
    """What is wrong before there is an operation is INVALID_ARGUMENT, without details."""
    async with failing_rpc() as status:
        await Stream(client.execution.Execute(request_, timeout=RPC_TIMEOUT_S)).first()
    assert status.code == INVALID_ARGUMENT
    assert not status.details


def _undecodable(kind: str) -> BuiltAction:
    blobs: Blobs = {}
    garbage = put(blobs, b"\xff\xff\xff garbage")
    root = put_tree(blobs, {})
    command = put(blobs, Command(arguments=["true"]))
    match kind:
        case "action":
            return BuiltAction(garbage, blobs)
        case "command":
            return BuiltAction(put(blobs, Action(command_digest=garbage, input_root_digest=root)), blobs)
        case "no-command":
            return BuiltAction(put(blobs, Action(input_root_digest=root)), blobs)
        case "no-input-root":
            return BuiltAction(put(blobs, Action(command_digest=command)), blobs)
        case "empty-action":
            return BuiltAction(put(blobs, b""), blobs)
        case _:
            return BuiltAction(put(blobs, Action(command_digest=command, input_root_digest=garbage)), blobs)


@pytest.mark.parametrize("kind", ["action", "command", "no-command", "no-input-root", "empty-action"])
async def test_EXE_07_undecodable_action_is_an_rpc_error(client: Client, kind: str) -> None:
    """An Action or Command that cannot be understood is INVALID_ARGUMENT, never an invitation to upload again."""
    async with failing_rpc() as status:
        await client.execute(_undecodable(kind))
    assert status.code == INVALID_ARGUMENT
    assert not status.details


@pytest.mark.duty("EXE-01")
async def test_EXE_07_undecodable_directory_is_told_in_the_operation(client: Client) -> None:
    """A Directory is read after the operation exists, so what is wrong about it is the operation's outcome."""
    whole = await client.execute(_undecodable("directory"))
    assert whole.response.status.code == INVALID_ARGUMENT
    assert not whole.response.status.details


async def test_an_error_with_a_huge_name_in_it_still_reaches_the_client(client: Client) -> None:
    """Statuses travel in headers, which have a limit: what the client sent is not sent back in full."""
    async with failing_rpc() as status:
        await client.execute(shell("true", output_paths=["/" + "x" * 100_000]))
    assert status.code == INVALID_ARGUMENT
    assert len(status.message) < 1000


def _violations(status: Status) -> list[tuple[str, str]]:
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.PreconditionFailure"
    failure = PreconditionFailure()
    assert detail.Unpack(failure)
    return [(violation.type, violation.subject) for violation in failure.violations]


@pytest.mark.duty("GEN-03", "GEN-04", "DIG-13", "EXE-06")
async def test_EXE_03_EXE_04_missing_inputs_are_all_named_in_one_detail(client: Client) -> None:
    """Three of ten inputs are missing: FAILED_PRECONDITION in the operation, exactly three MISSING violations."""
    files = {f"file-{i}": uuid.uuid4().bytes for i in range(10)}
    action = shell("cat file-*", inputs={"a": {"b": files}, "c": files})
    missing = {DigestFunction.SHA256.digest_of(files[f"file-{i}"]) for i in (2, 5, 9)}
    await client.upload({digest: data for digest, data in action.blobs.items() if digest not in missing})
    status = (await client.call(action).finish()).response.status
    assert status.code == FAILED_PRECONDITION
    assert sorted(_violations(status)) == sorted(("MISSING", f"blobs/{digest}") for digest in missing)
    assert {from_message(digest) for digest in await client.find_missing(action.blobs)} == missing


@pytest.mark.parametrize("what", ["action", "command", "root"])
async def test_EXE_03_a_missing_message_is_missing_too(client: Client, what: str) -> None:
    """The Action, its Command and its Directories are reported the same way as files."""
    action = shell(f": {uuid.uuid4()}", inputs={"file": uuid.uuid4().bytes})
    message = Action.FromString(action.blobs[from_message(action.digest)])
    digest = {"action": action.digest, "command": message.command_digest, "root": message.input_root_digest}[what]
    await client.upload({key: data for key, data in action.blobs.items() if key != from_message(digest)})
    status = (await client.call(action).finish()).response.status
    assert status.code == FAILED_PRECONDITION
    assert _violations(status) == [("MISSING", subject(digest))]


@pytest.mark.parametrize(
    "platform",
    [
        pytest.param({"OSFamily": "Plan9"}, id="other-system"),
        pytest.param({"Pool": "gpu"}, id="unknown-name"),
        pytest.param({"container-image": "docker://busybox"}, id="CMD-18-no-container"),
        pytest.param({"x" * 1000: "y" * 100_000}, id="huge"),
    ],
)
@pytest.mark.duty("CMD-15")
async def test_EXE_08_impossible_platform_is_refused_at_once(client: Client, platform: dict[str, str]) -> None:
    """No worker can ever match: FAILED_PRECONDITION at once, with a sentence and without details."""
    action = shell("true", platform=platform)
    await client.upload(action.blobs)
    async with asyncio.timeout(5), failing_rpc() as status:
        await client.call(action).finish()
    assert status.code == FAILED_PRECONDITION
    assert not status.details
    (name,) = platform
    assert name[:100] in status.message
    assert len(status.message) < 4000


@pytest.mark.duty("CMD-17")
async def test_tolerant_spelling_of_the_platform_matches(client: Client) -> None:
    """Old toolchains write `Linux`, clients add names of their own: neither keeps an action from running."""
    platform = {"osfamily": "Linux", "reproxy-version": "1.2", "cache-silo": "x", "Pool": "default"}
    assert (await client.execute(shell("true", platform=platform))).result.exit_code == 0


# ---- results and the cache ---------------------------------------------------------------------------------------


@pytest.mark.duty("AC-18", "EXE-11", "EXE-13")
async def test_EXE_19_EXE_20_non_zero_exit_is_a_result_and_not_cached(client: Client, effects: SideEffects) -> None:
    """A failing command ran: status OK, its exit code; and it runs again the next time."""
    action = shell(f"{effects.mark('ran')}; exit 42")
    for _ in range(2):
        whole = await client.execute(action)
        assert whole.result.exit_code == 42
        assert not whole.response.cached_result
    assert effects.count("ran") == 2
    assert await client.cached(action) is None


@pytest.mark.duty("EXE-11", "EXE-12", "EXE-13", "EXE-15", "EXE-16", "EXE-18", "EXE-41", "EXE-44")
async def test_EXE_25_EXE_26_a_hit_is_answered_at_once_with_one_operation(client: Client, effects: SideEffects) -> None:
    """The second run is a cached result: one message, the flag, and the metadata of the first run."""
    action = shell(f"{effects.mark('ran')}; echo hello")
    first, second = await client.execute(action), await client.execute(action)
    assert not first.response.cached_result
    assert second.response.cached_result
    assert len(second.operations) == 1
    assert second.result == first.result
    assert second.result.execution_metadata.worker
    assert effects.count("ran") == 1


@pytest.mark.duty("AC-20")
async def test_EXE_33_everything_named_is_there_when_done_arrives(client: Client) -> None:
    """On the done message all blobs of the result are stored, and so is the cache entry."""
    action = shell("echo out; echo err >&2; mkdir d; echo x > d/f; echo y > f", output_paths=["d", "f"])
    result = (await client.execute(action)).result
    digests = [result.stdout_digest, result.stderr_digest, result.output_files[0].digest]
    digests.append(result.output_directories[0].tree_digest)
    assert await client.find_missing(map(from_message, digests)) == []
    assert await client.cached(action) == result


async def test_EXE_28_skip_cache_lookup_runs_and_overwrites(client: Client, effects: SideEffects) -> None:
    """A planted wrong result is replaced by the run's."""
    action = shell(f"{effects.mark('ran')}; echo right")
    await client.upload(action.blobs)
    await client.plant(action, ActionResult(exit_code=0, stdout_raw=b"wrong\n"))
    planted = await client.execute(action)
    assert await client.stdout(planted.result) == b"wrong\n"
    assert planted.result.HasField("execution_metadata")
    repaired = await client.execute(action, skip_cache_lookup=True)
    assert not repaired.response.cached_result
    assert await client.cached(action) == repaired.result
    assert await client.stdout(repaired.result) == b"right\n"
    assert effects.count("ran") == 1


async def test_EXE_29_skip_cache_lookup_does_not_join_a_run_in_flight(client: Client, effects: SideEffects) -> None:
    """It repairs what a run that began earlier may have got wrong, so it begins one of its own."""
    script, gates = effects.gates_in_turn(2)
    action = shell(script)
    streams = [await client.start(action), await client.start(action, skip_cache_lookup=True)]
    for gate in gates:
        await gate.wait_reached()
    for gate in gates:
        await gate.open()
    for stream in streams:
        assert (await stream.finish()).result.exit_code == 0


async def test_EXE_30_do_not_cache_runs_every_time_and_is_not_stored(client: Client, effects: SideEffects) -> None:
    """Neither read from the cache nor written to it."""
    action = shell(effects.mark("ran"), do_not_cache=True)
    for _ in range(2):
        assert not (await client.execute(action)).response.cached_result
    assert effects.count("ran") == 2
    assert await client.cached(action) is None


@pytest.mark.duty("AC-02")
async def test_AC_hit_only_while_its_blobs_are_there(client: Client, effects: SideEffects, server_root: Path) -> None:
    """A result whose blob was lost from the store is no hit: the action runs again."""
    content = uuid.uuid4().hex
    action = shell(f"{effects.mark('ran')}; mkdir d; echo {content} > d/f", output_paths=["d"])
    await client.execute(action)
    digest = DigestFunction.SHA256.digest_of(f"{content}\n".encode())
    (blob,) = (server_root / "state/cas").glob(f"**/{digest.hash}-*")
    blob.unlink()
    again = await client.execute(action)
    assert not again.response.cached_result
    assert effects.count("ran") == 2
    assert await client.find_missing([digest]) == []


async def test_instances_have_action_caches_of_their_own(client: Client, effects: SideEffects) -> None:
    """What one instance has executed, another executes itself."""
    action = shell(effects.mark("ran"))
    for instance in ("one", "two", "one"):
        await client.execute(action, instance=instance)
    assert effects.count("ran") == 2
    assert await client.cached(action, instance="three") is None


# ---- merging -----------------------------------------------------------------------------------------------------


async def test_EXE_31_equal_actions_in_flight_run_once(client: Client, effects: SideEffects) -> None:
    """A hundred clients at once: one run, a hundred operations with names of their own, one result."""
    gate = effects.gate()
    action = shell(f"{effects.mark('ran')}; {gate.script}; echo done")
    await client.upload(action.blobs)
    streams = [client.call(action) for _ in range(100)]
    for stream in streams:
        await stream.first()
    await gate.open()
    finished = await asyncio.gather(*(stream.finish() for stream in streams))
    assert effects.count("ran") == 1
    assert len({whole.name for whole in finished}) == 100
    assert len({whole.result.SerializeToString(deterministic=True) for whole in finished}) == 1
    assert not any(whole.response.cached_result for whole in finished)


async def test_EXE_30_do_not_cache_does_not_merge(client: Client, effects: SideEffects) -> None:
    """Twins in flight run both, at the same time."""
    script, gates = effects.gates_in_turn(2)
    action = shell(script, do_not_cache=True)
    streams = [await client.start(action) for _ in range(2)]
    for gate in gates:
        await gate.wait_reached()
    for gate in gates:
        await gate.open()
    for stream in streams:
        assert (await stream.finish()).result.exit_code == 0


async def test_EXE_31_one_of_two_going_away_leaves_the_other(client: Client, effects: SideEffects) -> None:
    """Merged executions are ended by nobody alone."""
    gate = effects.gate()
    action = shell(f"{effects.mark('ran')}; {gate.script}")
    first, second = await client.start(action), await client.start(action)
    first.drop()
    await gate.open()
    assert (await second.finish()).result.exit_code == 0
    assert effects.count("ran") == 1


# ---- waiting -----------------------------------------------------------------------------------------------------


@pytest.mark.duty("EXE-49")
async def test_EXE_27_EXE_45_a_dropped_stream_is_taken_up_again(client: Client, effects: SideEffects) -> None:
    """The action goes on; several waiters get its state at once and then the result, under the same name."""
    gate = effects.gate()
    action = shell(f"{effects.mark('ran')}; {gate.script}; echo done")
    stream = await client.start(action)
    name = stream.operations[0].name
    await gate.wait_reached()
    stream.drop()
    waiters = [client.wait(name) for _ in range(3)]
    for waiter in waiters:
        assert metadata_of(await waiter.first()).stage == ExecutionStage.EXECUTING
    await gate.open()
    for waiter in waiters:
        whole = await waiter.finish()
        assert whole.name == name
        assert await client.stdout(whole.result) == b"done\n"
    assert effects.count("ran") == 1
    assert len((await client.wait(name).finish()).operations) == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("x", id="word"),
        pytest.param("a/b", id="path"),
        pytest.param("operations/6ff0bc1f-7f3e-4d4f-9d8a-2f1b6f0d9a11", id="uuid"),
        pytest.param("team/operations/6ff0bc1f-7f3e-4d4f-9d8a-2f1b6f0d9a11", id="instance"),
        pytest.param("operations/../../etc/passwd", id="traversal"),
        pytest.param("x" * 100_000, id="huge"),
    ],
)
async def test_EXE_46_unknown_or_malformed_names_are_not_found(client: Client, name: str) -> None:
    """Clients start over on NOT_FOUND and on nothing else."""
    async with failing_rpc() as status:
        await client.wait(name).finish()
    assert status.code == NOT_FOUND
    assert not status.details


async def test_EXE_46_a_name_of_another_instance_is_not_found(client: Client) -> None:
    """The name is the whole name."""
    name = (await client.execute(shell("true"))).name
    async with failing_rpc() as status:
        await client.wait(f"other/{name}").finish()
    assert status.code == NOT_FOUND


# ---- inlining ----------------------------------------------------------------------------------------------------


async def test_EXE_37_outputs_are_inlined_on_request(client: Client) -> None:
    """Fresh and cached results carry what was asked for, beside the digests."""
    action = shell("echo out; echo err >&2; echo a > a; echo b > b", output_paths=["a", "b"])
    plain = (await client.execute(action)).result
    assert not plain.stdout_raw
    for skip in (True, False):
        result = (
            await client.execute(
                action, skip_cache_lookup=skip, inline_stdout=True, inline_stderr=True, inline_output_files=["b"]
            )
        ).result
        assert (result.stdout_raw, result.stderr_raw) == (b"out\n", b"err\n")
        assert [file.contents for file in result.output_files] == [b"", b"b\n"]
        assert result.stdout_digest == plain.stdout_digest


async def test_a_planted_result_names_an_output_the_action_never_made(client: Client) -> None:
    """A result naming a blob that was never stored is no hit."""
    action = build_action(("true",), salt=uuid.uuid4().bytes)
    await client.upload(action.blobs)
    lost = DigestMessage(hash="ab" * 32, size_bytes=5)
    await client.plant(action, ActionResult(output_files=[OutputFile(path="x", digest=lost)]))
    assert not (await client.execute(action)).response.cached_result
