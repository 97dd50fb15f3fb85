"""The contract of ActionCache, for every implementation, and what only files can suffer."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from expbuild.digest import Digest, DigestFunction
from expbuild.reapi import ActionResult, OutputFile
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import ActionCache, ActionKey
from tests.storage.conftest import files_below

ACTION = DigestFunction.SHA256.digest_of(b"action")
KEY = ActionKey("main", ACTION)


def result(exit_code: int) -> ActionResult:
    return ActionResult(exit_code=exit_code, output_files=[OutputFile(path="out", is_executable=True)])


class TestContract:
    async def test_ac_01_unknown_action_has_no_result(self, action_cache: ActionCache) -> None:
        assert await action_cache.get(KEY) is None

    async def test_ac_13_result_comes_back_and_the_last_one_wins(self, action_cache: ActionCache) -> None:
        for exit_code in (1, 2):
            await action_cache.put(KEY, result(exit_code))
            assert await action_cache.get(KEY) == result(exit_code)

    async def test_ac_23_result_without_any_field_is_a_result(self, action_cache: ActionCache) -> None:
        """Zero bytes on the wire, and not the same as none."""
        await action_cache.put(KEY, ActionResult())
        assert await action_cache.get(KEY) == ActionResult()

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(ActionKey("", ACTION), id="GEN-13-no-instance"),
            pytest.param(ActionKey("Main", ACTION), id="GEN-13-other-case"),
            pytest.param(ActionKey("main/", ACTION), id="GEN-13-longer"),
            pytest.param(ActionKey("../main", ACTION), id="GEN-13-path"),
            pytest.param(ActionKey("\x00☃", ACTION), id="GEN-13-strange"),
            pytest.param(ActionKey("x" * 1000, ACTION), id="GEN-13-very-long"),
            pytest.param(
                ActionKey("main", Digest(ACTION.hash, ACTION.size_bytes, DigestFunction.BLAKE3)), id="AC-17-function"
            ),
            pytest.param(
                ActionKey("main", Digest(ACTION.hash, ACTION.size_bytes + 1, DigestFunction.SHA256)), id="AC-17-size"
            ),
            pytest.param(ActionKey("main", DigestFunction.SHA256.digest_of(b"other")), id="AC-17-hash"),
        ],
    )
    async def test_entries_are_kept_apart(self, action_cache: ActionCache, other: ActionKey) -> None:
        await action_cache.put(KEY, result(1))
        assert await action_cache.get(other) is None
        await action_cache.put(other, result(2))
        assert await action_cache.get(KEY) == result(1)
        assert await action_cache.get(other) == result(2)

    async def test_callers_cannot_change_what_is_stored(self, action_cache: ActionCache) -> None:
        given = result(1)
        await action_cache.put(KEY, given)
        given.exit_code = 9
        got = await action_cache.get(KEY)
        assert got == result(1)
        assert got is not None
        got.exit_code = 8
        assert await action_cache.get(KEY) == result(1)


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "action-cache"

    @pytest.fixture
    def cache(self, root: Path) -> FilesystemActionCache:
        return FilesystemActionCache(root)

    async def entry(self, cache: FilesystemActionCache, root: Path) -> Path:
        """Store a result and return its file."""
        await cache.put(KEY, result(1))
        (name,) = files_below(root)
        return root / name

    async def test_entry_is_one_file_of_ours_however_often_it_is_written(
        self, cache: FilesystemActionCache, root: Path, tmpfile: bool
    ) -> None:
        for _ in range(2):
            await self.entry(cache, root)
        seen = (await self.entry(cache, root)).stat()
        assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_nlink) == (0o400, os.geteuid(), 1)

    async def test_entries_survive_a_restart(self, cache: FilesystemActionCache, root: Path) -> None:
        await cache.put(KEY, result(1))
        assert await FilesystemActionCache(root).get(KEY) == result(1)

    @pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 8, 9, 40, 41, 42, -2, -1])
    async def test_ac_20_truncated_entry_is_a_miss(self, cache: FilesystemActionCache, root: Path, kept: int) -> None:
        path = await self.entry(cache, root)
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:kept])
        assert await cache.get(KEY) is None

    @pytest.mark.parametrize("start", [0, 4, 9, 41])
    async def test_ac_20_entry_with_zeros_or_garbage_is_a_miss(
        self, cache: FilesystemActionCache, root: Path, start: int
    ) -> None:
        """What crashes leave of files; zeros alone would parse as a successful result without outputs."""
        path = await self.entry(cache, root)
        path.chmod(0o600)
        good = path.read_bytes()
        for damaged in (good[:start] + bytes(len(good) - start), good[:start] + os.urandom(len(good) - start)):
            path.write_bytes(damaged)
            assert await cache.get(KEY) is None

    async def test_ac_20_no_changed_byte_goes_unnoticed(self, cache: FilesystemActionCache, root: Path) -> None:
        path = await self.entry(cache, root)
        path.chmod(0o600)
        good = path.read_bytes()
        for index in range(len(good)):
            path.write_bytes(good[:index] + bytes([good[index] ^ 0x10]) + good[index + 1 :])
            assert await cache.get(KEY) is None, f"byte {index}"
        path.write_bytes(good + b"\x00")
        assert await cache.get(KEY) is None, "one more byte"
        path.write_bytes(good)
        assert await cache.get(KEY) == result(1)

    async def test_damaged_entry_is_healed_by_the_next_result(self, cache: FilesystemActionCache, root: Path) -> None:
        path = await self.entry(cache, root)
        path.unlink()
        path.touch()
        await cache.put(KEY, result(2))
        assert await cache.get(KEY) == result(2)

    async def test_ac_22_hit_renews_the_promise_stamp(self, cache: FilesystemActionCache, root: Path) -> None:
        path = await self.entry(cache, root)
        now = time.time_ns()
        modified = path.stat().st_mtime_ns
        os.utime(path, ns=(now - 3600 * 10**9, modified))
        await cache.get(KEY)
        assert path.stat().st_atime_ns >= now
        assert path.stat().st_mtime_ns == modified

    async def test_leftovers_of_a_crash_are_removed(self, root: Path) -> None:
        (root / "tmp").mkdir(parents=True)
        (root / "tmp" / "half").write_bytes(b"half an entry")
        FilesystemActionCache(root)
        assert files_below(root) == set()
