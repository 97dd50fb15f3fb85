"""A store's root: format, owner, durability, and what is known after a power cut."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import pytest

from expbuild.digest import DigestFunction
from expbuild.errors import StartupError, StorageUnavailable
from expbuild.reapi import ActionResult
from expbuild.storage.action_cache import FilesystemActionCache
from expbuild.storage.base import CHUNK_BYTES, ActionKey, read_blob, write_blob
from expbuild.storage.files import blob_name
from expbuild.storage.filesystem import FilesystemBlobStore
from expbuild.storage.policy import StorePolicy
from expbuild.storage.root import Durability, StoreRoot, away_name
from tests.storage.conftest import FUNCTIONS, files_below

SHA256 = DigestFunction.SHA256
SMALL = b"a small blob"
LARGE = b"large " * (CHUNK_BYTES // 4)


def open_root(path: Path, durability: Durability = Durability.NONE) -> StoreRoot:
    return StoreRoot(path, "storage.cas.root_dir", "cas", durability=durability)


def reboot(path: Path) -> None:
    """Make the root look as if another boot of the machine had used it."""
    state = json.loads((path / "STATE").read_text())
    (path / "STATE").write_text(json.dumps({**state, "boot_id": "another"}))


class TestFormat:
    def test_another_format_is_refused_by_name(self, tmp_path: Path) -> None:
        open_root(tmp_path).close()
        (tmp_path / "FORMAT").write_text("expbuild cas 99\n")
        with pytest.raises(StartupError) as caught:
            open_root(tmp_path)
        assert str(caught.value) == (
            f"storage.cas.root_dir: {tmp_path} has the format 'expbuild cas 99', and this version of re-server reads "
            "'expbuild cas 1'; choose another directory, or the version that wrote this one"
        )

    def test_a_cas_is_no_action_cache(self, tmp_path: Path) -> None:
        open_root(tmp_path).close()
        with pytest.raises(StartupError, match="has the format 'expbuild cas 1'"):
            FilesystemActionCache(tmp_path)

    @pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "empty"])
    def test_format_that_a_power_cut_lost_is_written_again(self, tmp_path: Path, lost: Callable[[Path], None]) -> None:
        open_root(tmp_path).close()
        lost(tmp_path / "FORMAT")
        open_root(tmp_path).close()
        assert (tmp_path / "FORMAT").read_text() == "expbuild cas 1\n"


class TestOwner:
    def test_one_process_owns_a_root_and_the_next_takes_over(self, tmp_path: Path) -> None:
        first = open_root(tmp_path)
        second = open_root(tmp_path)
        assert (first.is_owner, second.is_owner) == (True, False)
        assert not second.try_own()
        first.close()
        assert second.try_own()
        second.close()

    def test_a_dead_owner_leaves_its_place(self, tmp_path: Path) -> None:
        own_and_die = f"""if True:
            import os
            from pathlib import Path
            from expbuild.storage.root import StoreRoot
            assert StoreRoot(Path({str(tmp_path)!r}), "k", "cas").is_owner
            os._exit(9)"""
        done = subprocess.run([sys.executable, "-c", own_and_die], timeout=60)
        assert done.returncode == 9
        assert open_root(tmp_path).is_owner

    def test_what_lay_away_at_a_crash_is_put_back(self, tmp_path: Path) -> None:
        """An eviction that was not decided: its blob may have been promised."""
        root = open_root(tmp_path)
        name = f"sha256/ab/{'ab' * 32}-4"
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"blob")
        os.rename(tmp_path / name, tmp_path / away_name(name))
        root.close()
        open_root(tmp_path).close()
        assert files_below(tmp_path) == {name}
        assert (tmp_path / name).read_bytes() == b"blob"


class TestAtRisk:
    """A killed process loses nothing; only a machine that went down with unwritten data does."""

    def test_a_new_root_and_one_of_this_boot_are_not(self, tmp_path: Path) -> None:
        for _ in range(2):  # not closed in between: killed
            assert not open_root(tmp_path / "root").at_risk

    @pytest.mark.parametrize(
        ("durability", "clean", "at_risk"),
        [
            (Durability.NONE, True, True),  # its data may not have been written when it stopped
            (Durability.NONE, False, True),
            (Durability.ORDERED, True, False),
            (Durability.ORDERED, False, True),
            (Durability.STRICT, True, False),
            (Durability.STRICT, False, True),
        ],
    )
    def test_after_a_reboot(self, tmp_path: Path, durability: Durability, clean: bool, at_risk: bool) -> None:
        root = open_root(tmp_path, durability)
        if clean:
            root.close()
        reboot(tmp_path)
        assert open_root(tmp_path, durability).at_risk is at_risk

    def test_it_lasts_until_everything_was_verified(self, tmp_path: Path) -> None:
        open_root(tmp_path).close()
        reboot(tmp_path)
        for _ in range(2):
            root = open_root(tmp_path)
            assert root.at_risk
            root.close()
        root = open_root(tmp_path)
        root.verified()
        assert not root.at_risk
        root.close()
        assert not open_root(tmp_path).at_risk

    def test_what_was_written_without_waiting_stays_unsafe_in_a_stricter_mode(self, tmp_path: Path) -> None:
        open_root(tmp_path, Durability.NONE).close()
        open_root(tmp_path, Durability.STRICT).close()
        reboot(tmp_path)
        assert open_root(tmp_path, Durability.STRICT).at_risk

    @pytest.mark.parametrize("state", [None, b"", b"{", b"[]"])
    def test_lost_state_means_care(self, tmp_path: Path, state: bytes | None) -> None:
        open_root(tmp_path).close()
        (tmp_path / "STATE").unlink()
        if state is not None:
            (tmp_path / "STATE").write_bytes(state)
        assert open_root(tmp_path).at_risk


class _Syncs:
    """Counts calls of fsync by what is synced, and fails those that are asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = self.directories = 0
        self.fail_files = self.fail_directories = False
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, fd: int) -> None:
        is_directory = os.path.isdir(f"/proc/self/fd/{fd}")
        self.files += not is_directory
        self.directories += is_directory
        if self.fail_directories if is_directory else self.fail_files:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(fd)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> _Syncs:
    return _Syncs(monkeypatch)


def store(path: Path, executor: Executor, durability: Durability) -> FilesystemBlobStore:
    return FilesystemBlobStore(path, FUNCTIONS, executor, StorePolicy(durability, min_free_bytes=0))


class TestDurability:
    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("durability", Durability)
    async def test_what_is_synced_before_an_upload_is_answered(
        self, tmp_path: Path, executor: Executor, syncs: _Syncs, durability: Durability, data: bytes, tmpfile: bool
    ) -> None:
        blobs = store(tmp_path / "cas", executor, durability)
        await write_blob(blobs, SHA256.digest_of(b"first in its directory" + data), b"first in its directory" + data)
        syncs.files = syncs.directories = 0
        digest = SHA256.digest_of(data)
        await write_blob(blobs, digest, data)
        assert syncs.files == (durability is not Durability.NONE)
        assert (syncs.directories > 0) is (durability is Durability.STRICT)
        assert await read_blob(blobs, digest) == data

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("failing", ["fail_files", "fail_directories"])
    async def test_failed_sync_fails_the_upload_and_is_not_tried_again(
        self, tmp_path: Path, executor: Executor, syncs: _Syncs, data: bytes, failing: str, tmpfile: bool
    ) -> None:
        blobs = store(tmp_path / "cas", executor, Durability.STRICT)
        digest = SHA256.digest_of(data)
        syncs.files = 0
        setattr(syncs, failing, True)
        with pytest.raises(StorageUnavailable, match=r"cannot write blob .*: Input/output error"):
            await write_blob(blobs, digest, data)
        assert syncs.files == 1
        assert files_below(tmp_path / "cas") == set()
        assert await blobs.find_missing([digest]) == {digest}
        setattr(syncs, failing, False)
        await write_blob(blobs, digest, data)
        assert await read_blob(blobs, digest) == data

    async def test_strict_makes_a_blob_that_is_there_already_as_durable(
        self, tmp_path: Path, executor: Executor, syncs: _Syncs
    ) -> None:
        digest = SHA256.digest_of(SMALL)
        await write_blob(store(tmp_path / "cas", executor, Durability.NONE), digest, SMALL)
        inode = (tmp_path / "cas" / blob_name(digest)).stat().st_ino
        syncs.files = 0
        await write_blob(store(tmp_path / "cas", executor, Durability.STRICT), digest, SMALL)
        assert syncs.files == 2
        assert (tmp_path / "cas" / blob_name(digest)).stat().st_ino == inode

    @pytest.mark.parametrize("durability", Durability)
    async def test_action_results_too(self, tmp_path: Path, syncs: _Syncs, durability: Durability) -> None:
        cache = FilesystemActionCache(tmp_path / "ac", StorePolicy(durability, min_free_bytes=0))
        key = ActionKey("", SHA256.digest_of(b"action"))
        syncs.files = syncs.directories = 0
        await cache.put(key, ActionResult(exit_code=1))
        assert syncs.files == (durability is not Durability.NONE)
        assert (syncs.directories > 0) is (durability is Durability.STRICT)
        syncs.fail_files = True
        if durability is not Durability.NONE:
            with pytest.raises(StorageUnavailable):
                await cache.put(key, ActionResult(exit_code=2))
        assert await cache.get(key) == ActionResult(exit_code=1)
