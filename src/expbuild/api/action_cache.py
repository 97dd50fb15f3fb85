"""ActionCache: look-ups, and results written by clients."""

from __future__ import annotations

from expbuild.api.inlining import RESULT_BYTES, InlineWishes, inlined
from expbuild.api.instances import Instances
from expbuild.api.messages import parse_digest, request_digest, to_message
from expbuild.api.rpc import ServicerContext, request_metadata
from expbuild.api.trees import with_trees
from expbuild.digest import DigestFunction, DigestFunctions
from expbuild.errors import ActionResultNotFound, InvalidArgument, PermissionDenied
from expbuild.reapi import (
    ActionCacheServicer,
    ActionResult,
    DigestMessage,
    GetActionResultRequest,
    UpdateActionResultRequest,
)
from expbuild.storage.base import ActionCache, ActionKey, BlobStore, write_blob


class ActionCacheService(ActionCacheServicer):
    """The action cache. update_enabled: whether clients may write to it."""

    def __init__(
        self,
        action_cache: ActionCache,
        blobs: BlobStore,
        functions: DigestFunctions,
        instances: Instances,
        *,
        update_enabled: bool,
    ) -> None:
        self._action_cache = action_cache
        self._blobs = blobs
        self._functions = functions
        self._instances = instances
        self._update_enabled = update_enabled

    async def GetActionResult(self, request: GetActionResultRequest, context: ServicerContext) -> ActionResult:
        instance_name = self._instances.resolve(request.instance_name)
        digest = request_digest(self._functions, request, "action_digest")
        result = await self._action_cache.get(ActionKey(instance_name, digest))
        if result is None:
            raise ActionResultNotFound(f"no usable result of action {digest} is cached")
        wishes = InlineWishes(request.inline_stdout, request.inline_stderr, request.inline_output_files)
        result = await with_trees(result, self._blobs, digest.function)
        return await inlined(result, wishes, self._blobs, digest.function)

    async def UpdateActionResult(self, request: UpdateActionResultRequest, context: ServicerContext) -> ActionResult:
        instance_name = self._instances.resolve(request.instance_name)
        digest = request_digest(self._functions, request, "action_digest")
        if not request.HasField("action_result"):
            raise InvalidArgument("UpdateActionResultRequest.action_result is not set")
        if not self._update_enabled:
            raise PermissionDenied(
                "clients may not write action results here (capabilities.action_cache_update_enabled = false)"
            )
        result = request.action_result
        _check_result(result, digest.function)
        await self._move_raw_to_cas(result, digest.function)
        # Some clients fail on a result without execution metadata; an uploaded one may lack them.
        result.execution_metadata.SetInParent()
        if result.ByteSize() > RESULT_BYTES:
            raise InvalidArgument(f"the result has {result.ByteSize()} bytes; clients could not receive it")
        invocation_id = request_metadata(context).tool_invocation_id
        await self._action_cache.put(ActionKey(instance_name, digest), result, invocation_id=invocation_id)
        return result

    async def _move_raw_to_cas(self, result: ActionResult, function: DigestFunction) -> None:
        """Store inlined content as blobs, so that clients find it either way."""
        if result.stdout_raw:
            result.stdout_digest.CopyFrom(await self._stored(result.stdout_raw, function))
            result.ClearField("stdout_raw")
        if result.stderr_raw:
            result.stderr_digest.CopyFrom(await self._stored(result.stderr_raw, function))
            result.ClearField("stderr_raw")
        for file in result.output_files:
            if file.contents:
                await write_blob(self._blobs, parse_digest(file.digest, function), file.contents)
                file.ClearField("contents")

    async def _stored(self, data: bytes, function: DigestFunction) -> DigestMessage:
        digest = function.digest_of(data)
        await write_blob(self._blobs, digest, data)
        return to_message(digest)


def _check_result(result: ActionResult, function: DigestFunction) -> None:
    """Refuse a result no client could use. Raises InvalidArgument."""
    for file in result.output_files:
        _check_path(file.path, "output_files")
        parse_digest(file.digest, function)
    for directory in result.output_directories:
        if directory.path.startswith("/"):
            raise InvalidArgument(f"ActionResult.output_directories: {directory.path!r} is absolute")
        if not (directory.HasField("tree_digest") or directory.HasField("root_directory_digest")):
            raise InvalidArgument(f"ActionResult.output_directories: {directory.path!r} has no digest")
        if directory.HasField("tree_digest"):
            parse_digest(directory.tree_digest, function)
        if directory.HasField("root_directory_digest"):
            parse_digest(directory.root_directory_digest, function)
    for links in (result.output_symlinks, result.output_file_symlinks, result.output_directory_symlinks):
        for link in links:
            _check_path(link.path, "output_symlinks")
    if result.HasField("stdout_digest"):
        parse_digest(result.stdout_digest, function)
    if result.HasField("stderr_digest"):
        parse_digest(result.stderr_digest, function)


def _check_path(path: str, field: str) -> None:
    if not path or path.startswith("/"):
        raise InvalidArgument(f"ActionResult.{field}: {path!r} is not a relative path")
