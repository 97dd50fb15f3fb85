"""ActionCache (conformance AC-*)."""

from __future__ import annotations

import grpc
import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import (
    ActionResult,
    DigestMessage,
    Directory,
    DirectoryNode,
    FileNode,
    GetActionResultRequest,
    OutputDirectory,
    OutputFile,
    OutputSymlink,
    Tree,
    UpdateActionResultRequest,
)
from tests.api.client import TIMEOUT_S, Client, Refusal, code_of, message, refusal
from tests.api.conftest import StartServer


async def get(
    client: Client,
    action: Digest,
    instance_name: str = "",
    *,
    stdout: bool = False,
    stderr: bool = False,
    files: tuple[str, ...] = (),
) -> ActionResult:
    request = GetActionResultRequest(
        instance_name=instance_name,
        action_digest=message(action),
        inline_stdout=stdout,
        inline_stderr=stderr,
        inline_output_files=files,
        digest_function=action.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
    )
    result: ActionResult = await client.action_cache.GetActionResult(request, timeout=TIMEOUT_S)
    return result


async def update(client: Client, action: Digest, result: ActionResult | None, instance_name: str = "") -> ActionResult:
    request = UpdateActionResultRequest(
        instance_name=instance_name,
        action_digest=message(action),
        action_result=result,
        digest_function=action.function.value,  # type: ignore[arg-type]  # our enum has the wire's numbers
    )
    stored: ActionResult = await client.action_cache.UpdateActionResult(request, timeout=TIMEOUT_S)
    return stored


def output(client: Client, path: str, data: bytes) -> OutputFile:
    return OutputFile(path=path, digest=message(client.digest(data)), is_executable=True)


async def test_ac_01_miss_is_not_found(client: Client) -> None:
    action = client.digest(b"ac-01")
    assert await refusal(get(client, action)) == Refusal(
        grpc.StatusCode.NOT_FOUND, f"no usable result of action {action} is cached"
    )


async def test_ac_13_16_stored_result_comes_back_although_the_action_is_not_in_the_cas(client: Client) -> None:
    """Update answers what it stored, as Get does later."""
    action = client.digest(b"ac-13 action, never uploaded")
    await client.upload(b"ac-13 output")
    result = ActionResult(
        output_files=[output(client, "bin/x", b"ac-13 output")],
        output_symlinks=[OutputSymlink(path="link", target="/absolute/is/fine")],
        exit_code=0,
    )
    result.execution_metadata.worker = "somebody's machine"
    assert await update(client, action, result) == result
    assert await get(client, action) == result


@pytest.mark.duty("AC-18")
async def test_ac_13_last_write_wins(client: Client) -> None:
    action = client.digest(b"ac-13 twice")
    for exit_code in (1, 2):
        await update(client, action, ActionResult(exit_code=exit_code))
    assert (await get(client, action)).exit_code == 2


async def test_ac_14_23_execution_metadata_is_always_set(client: Client) -> None:
    """Also for a result that is zero bytes on the wire, which some clients upload and others fail on."""
    action = client.digest(b"ac-14")
    assert (await update(client, action, ActionResult())).HasField("execution_metadata")
    assert (await get(client, action)).HasField("execution_metadata")


async def test_ac_17_functions_and_sizes_are_different_entries(sha256_client: Client) -> None:
    action = sha256_client.digest(b"ac-17")
    await update(sha256_client, action, ActionResult(exit_code=17))
    blake3 = Digest(action.hash, action.size_bytes, DigestFunction.BLAKE3)
    longer = Digest(action.hash, action.size_bytes + 1, DigestFunction.SHA256)
    assert await code_of(get(sha256_client, blake3)) == "NOT_FOUND"
    assert await code_of(get(sha256_client, longer)) == "NOT_FOUND"


async def test_gen_13_instances_do_not_share_entries(client: Client) -> None:
    action = client.digest(b"gen-13")
    await update(client, action, ActionResult(exit_code=13), "one/instance")
    assert (await get(client, action, "one/instance")).exit_code == 13
    for other in ("", "one", "one/instance/more", "One/Instance"):
        assert await code_of(get(client, action, other)) == "NOT_FOUND"


class TestCompleteness:
    """AC-02: a hit names only what is there; anything else is a miss, whatever is missing."""

    @pytest.mark.parametrize("kind", ["output_files", "stdout", "stderr", "tree", "file-in-tree", "root", "sub"])
    async def test_ac_02_11_each_kind_of_missing_blob_is_a_miss_until_it_is_uploaded(
        self, client: Client, kind: str
    ) -> None:
        """The update itself is accepted before its outputs are there."""
        file = f"ac-02 {kind} file".encode()
        sub = Directory(files=[FileNode(name="f", digest=message(client.digest(file)))])
        sub_blob = sub.SerializeToString()
        root = Directory(directories=[DirectoryNode(name="s", digest=message(client.digest(sub_blob)))])
        root_blob, tree_blob = root.SerializeToString(), Tree(root=root, children=[sub]).SerializeToString()
        stream = f"ac-02 {kind} stream".encode()
        tree = OutputDirectory(path="d", tree_digest=message(client.digest(tree_blob)))
        plain = OutputDirectory(path="d", root_directory_digest=message(client.digest(root_blob)))
        result, blobs = {
            "output_files": (ActionResult(output_files=[output(client, "f", file)]), [file]),
            "stdout": (ActionResult(stdout_digest=message(client.digest(stream))), [stream]),
            "stderr": (ActionResult(stderr_digest=message(client.digest(stream))), [stream]),
            "tree": (ActionResult(output_directories=[tree]), [tree_blob, file]),
            "file-in-tree": (ActionResult(output_directories=[tree]), [file, tree_blob]),
            "root": (ActionResult(output_directories=[plain]), [root_blob, sub_blob, file]),
            "sub": (ActionResult(output_directories=[plain]), [sub_blob, file, root_blob]),
        }[kind]
        action = client.digest(f"ac-02 {kind}".encode())
        await update(client, action, result)
        last, *others = blobs
        await client.upload(*others)
        assert await code_of(get(client, action)) == "NOT_FOUND"
        await client.upload(last)
        hit = await get(client, action)
        if kind in ("root", "sub"):
            hit.output_directories[0].ClearField("tree_digest")  # AC-15
        assert hit == await update(client, action, result)

    async def test_ac_15_a_result_without_a_tree_gets_one(self, client: Client) -> None:
        """Uploaded as single directories, which only some clients can read: the rest comes beside it."""
        leaf = Directory(files=[FileNode(name="f", digest=message(client.digest(b"ac-15")))])
        leaf_digest = message(client.digest(leaf.SerializeToString()))
        root = Directory(directories=[DirectoryNode(name=name, digest=leaf_digest) for name in ("a", "b")])
        await client.upload(b"ac-15", leaf.SerializeToString(), root.SerializeToString())
        action, root_digest = client.digest(b"ac-15 action"), message(client.digest(root.SerializeToString()))
        plain = OutputDirectory(path="d", root_directory_digest=root_digest)
        await update(client, action, ActionResult(output_directories=[plain]))
        (directory,) = (await get(client, action)).output_directories
        assert directory.root_directory_digest == root_digest
        digest = Digest(directory.tree_digest.hash, directory.tree_digest.size_bytes, client.function)
        data = await client.read(client.read_name(digest))
        assert Tree.FromString(data) == Tree(root=root, children=[leaf])
        await client.upload(data)

    async def test_ac_03_directories_of_a_tree_need_not_be_blobs(self, client: Client) -> None:
        sub = Directory(symlinks=[{"name": "l", "target": "t"}])  # type: ignore[list-item]  # short for SymlinkNode
        root = Directory(
            directories=[DirectoryNode(name="ac-03", digest=message(client.digest(sub.SerializeToString())))]
        )
        (tree,) = await client.upload(Tree(root=root, children=[sub]).SerializeToString())
        action = client.digest(b"ac-03")
        result = ActionResult(output_directories=[OutputDirectory(path="", tree_digest=message(tree))])
        await update(client, action, result)
        assert (await get(client, action)).output_directories[0].tree_digest == message(tree)

    async def test_ac_05_unreadable_tree_is_a_miss(self, client: Client) -> None:
        (tree,) = await client.upload(b"\xff not a tree")
        action = client.digest(b"ac-05")
        await update(
            client, action, ActionResult(output_directories=[OutputDirectory(path="d", tree_digest=message(tree))])
        )
        assert await code_of(get(client, action)) == "NOT_FOUND"

    async def test_dig_05_empty_blobs_are_always_there(self, client: Client) -> None:
        empty = message(client.digest(b""))
        action = client.digest(b"dig-05 ac")
        result = ActionResult(
            output_files=[OutputFile(path="e", digest=empty)],
            output_directories=[OutputDirectory(path="d", tree_digest=empty, root_directory_digest=empty)],
            stdout_digest=empty,
            stderr_digest=empty,
        )
        await update(client, action, result)
        assert (await get(client, action)).stdout_digest == empty


class TestInlining:
    async def test_ac_06_07_what_is_asked_for_is_inlined_beside_its_digest(self, client: Client) -> None:
        await client.upload(b"ac-06 out", b"ac-06 err", b"ac-06 a", b"ac-06 b")
        action = client.digest(b"ac-06")
        result = ActionResult(
            output_files=[output(client, "a", b"ac-06 a"), output(client, "b", b"ac-06 b")],
            stdout_digest=message(client.digest(b"ac-06 out")),
            stderr_digest=message(client.digest(b"ac-06 err")),
        )
        plain = await update(client, action, result)
        assert await get(client, action) == plain
        full = await get(client, action, stdout=True, stderr=True, files=("b", "unknown", "b"))
        expected = ActionResult()
        expected.CopyFrom(plain)
        expected.stdout_raw, expected.stderr_raw = b"ac-06 out", b"ac-06 err"
        expected.output_files[1].contents = b"ac-06 b"
        assert full == expected

    async def test_ac_06_large_contents_are_not_inlined(self, client: Client) -> None:
        """Not one that is large, nor so many that the message would be."""
        large = b"ac-06 large " * 10_000
        small = [b"%4d" % i * 15_000 for i in range(40)]
        await client.upload(large, *small)
        action = client.digest(b"ac-06 large")
        files = [output(client, f"f{i}", data) for i, data in enumerate(small)]
        await update(client, action, ActionResult(stdout_digest=message(client.digest(large)), output_files=files))
        result = await get(client, action, stdout=True, files=tuple(file.path for file in files))
        assert result.stdout_raw == b""
        assert 0 < sum(bool(file.contents) for file in result.output_files) < len(files)
        assert result.ByteSize() < 2 << 20

    async def test_ac_08_raw_contents_of_an_uploader_become_blobs(self, client: Client) -> None:
        action = client.digest(b"ac-08")
        file = output(client, "f", b"ac-08 file")
        file.contents = b"ac-08 file"
        stored = await update(
            client, action, ActionResult(stdout_raw=b"ac-08 out", stderr_raw=b"ac-08 err", output_files=[file])
        )
        assert await client.missing(*map(client.digest, (b"ac-08 out", b"ac-08 err", b"ac-08 file"))) == set()
        assert stored.stdout_digest == message(client.digest(b"ac-08 out"))
        assert (stored.stdout_raw, stored.stderr_raw, stored.output_files[0].contents) == (b"", b"", b"")
        assert await get(client, action) == stored

    async def test_ac_08_contents_that_are_not_their_digest_are_invalid(self, client: Client) -> None:
        file = output(client, "f", b"ac-08 promised")
        file.contents = b"ac-08 delivered"
        assert await code_of(update(client, client.digest(b"ac-08 no"), ActionResult(output_files=[file]))) == (
            "INVALID_ARGUMENT"
        )


class TestUpdateRefusals:
    @pytest.mark.parametrize("field", ["action_digest", "action_result"])
    async def test_ac_09_unset_fields_are_invalid(self, client: Client, field: str) -> None:
        request = UpdateActionResultRequest(
            action_digest=message(client.digest(b"ac-09")), action_result=ActionResult(exit_code=9)
        )
        request.ClearField(field)  # type: ignore[arg-type]  # one of two literals
        call = client.action_cache.UpdateActionResult(request, timeout=TIMEOUT_S)
        assert await refusal(call) == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT, f"UpdateActionResultRequest.{field} is not set"
        )

    async def test_gen_14_get_without_action_digest_is_invalid(self, client: Client) -> None:
        call = client.action_cache.GetActionResult(GetActionResultRequest(), timeout=TIMEOUT_S)
        assert await refusal(call) == Refusal(
            grpc.StatusCode.INVALID_ARGUMENT, "GetActionResultRequest.action_digest is not set"
        )

    @pytest.mark.parametrize(
        "result",
        [
            pytest.param(ActionResult(output_files=[OutputFile(path="f")]), id="file-without-digest"),
            pytest.param(
                ActionResult(output_files=[OutputFile(path="/f", digest=DigestMessage(hash="a" * 64, size_bytes=1))]),
                id="absolute-file",
            ),
            pytest.param(
                ActionResult(output_files=[OutputFile(digest=DigestMessage(hash="a" * 64, size_bytes=1))]),
                id="file-without-path",
            ),
            pytest.param(
                ActionResult(output_files=[OutputFile(path="f", digest=DigestMessage(hash="a" * 64, size_bytes=-1))]),
                id="negative-size",
            ),
            pytest.param(ActionResult(stdout_digest=DigestMessage(hash="no", size_bytes=1)), id="stdout"),
            pytest.param(ActionResult(stderr_digest=DigestMessage()), id="stderr"),
            pytest.param(ActionResult(output_directories=[OutputDirectory(path="d")]), id="AC-15-no-digest"),
            pytest.param(
                ActionResult(
                    output_directories=[
                        OutputDirectory(path="/d", tree_digest=DigestMessage(hash="a" * 64, size_bytes=1))
                    ]
                ),
                id="absolute-directory",
            ),
            pytest.param(
                ActionResult(output_directories=[OutputDirectory(path="d", tree_digest=DigestMessage(hash="x"))]),
                id="tree-digest",
            ),
            pytest.param(ActionResult(output_symlinks=[OutputSymlink(target="t")]), id="symlink-without-path"),
            pytest.param(ActionResult(output_file_symlinks=[OutputSymlink(path="/l")]), id="absolute-symlink"),
        ],
    )
    async def test_ac_19_results_no_client_could_use_are_invalid(self, client: Client, result: ActionResult) -> None:
        action = client.digest(b"ac-19")
        assert await code_of(update(client, action, result)) == "INVALID_ARGUMENT"
        assert await code_of(get(client, action)) == "NOT_FOUND"

    async def test_gen_07_result_that_clients_could_not_receive_is_invalid(self, client: Client) -> None:
        symlinks = [OutputSymlink(path=f"link-{i}", target="x" * 1000) for i in range(3100)]
        answer = await refusal(update(client, client.digest(b"gen-07"), ActionResult(output_symlinks=symlinks)))
        assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
        assert answer.message.endswith("clients could not receive it")

    async def test_ac_12_update_is_denied_where_it_is_switched_off(self, start_server: StartServer) -> None:
        server = start_server("read-only", capabilities={"action_cache_update_enabled": False})
        client = Client(server.address)
        assert await refusal(update(client, client.digest(b"ac-12"), ActionResult(exit_code=1))) == Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "clients may not write action results here (capabilities.action_cache_update_enabled = false)",
        )
        assert await code_of(get(client, client.digest(b"ac-12"))) == "NOT_FOUND"
        await client.close()


async def test_dig_04_entries_and_blobs_survive_a_restart(start_server: StartServer) -> None:
    server = start_server("restarted")
    client = Client(server.address)
    action = client.digest(b"restart")
    await client.upload(b"output of restart")
    stored = await update(client, action, ActionResult(output_files=[output(client, "f", b"output of restart")]))
    await client.close()
    server.terminate()
    server.start()
    client = Client(server.address)
    assert await get(client, action) == stored
    assert await client.read(client.read_name(client.digest(b"output of restart"))) == b"output of restart"
    await client.close()
