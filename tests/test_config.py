"""The configuration file: what it may say, what is refused and in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from expbuild.config import (
    CapabilitiesConfig,
    Config,
    ServerConfig,
    default_config,
    is_well_formed_instance_name,
    load_config,
    parse_config,
    render_config,
)
from expbuild.config_directories import state_dir
from expbuild.config_pool import ExecutionConfig, PoolConfig
from expbuild.config_storage import CasConfig, StorageConfig, StoreConfig
from expbuild.config_workers import DockerWorkerConfig, HostWorkerConfig, VolumeConfig
from expbuild.digest import DigestFunction
from expbuild.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "examples" / "expbuild-server-pool.toml"

HOST = '[[execution.pool.workers]]\ntype = "host"\n'
DOCKER = '[[execution.pool.workers]]\ntype = "docker"\nimage = "i"\n'
FUNCTIONS = "SHA256, SHA1, MD5, SHA384, SHA512, SHA256TREE or BLAKE3"
ADDRESS = 'expected "host:port" (IPv6: "[host]:port")'
SEGMENTS = (
    "expected segments joined by single slashes, none of them actionResults, actions, blobs, capabilities, "
    "compressed-blobs, operations or uploads"
)
WORKER = "execution.pool.workers[0]"


def problems(text: str) -> list[str]:
    """Return the lines the text is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.toml")
    assert caught.value.source == "test.toml"
    return list(caught.value.problems)


def test_the_example_file_parses_and_every_value_lands() -> None:
    """The shipped example says exactly this."""
    config = load_config(EXAMPLE)
    assert config.server == ServerConfig(address="0.0.0.0:8980", instance_name="production", strict_instance_name=False)
    assert config.storage == StorageConfig(
        cas=CasConfig(
            backend="filesystem",
            root_dir=Path("/var/lib/expbuild/cas"),
            max_size_bytes=500_000_000_000,
            min_free_bytes=10_000_000_000,
            durability="none",
            min_age_seconds=10_800.0,
            verify_on_read=True,
            scrub_bytes_per_second=20_000_000,
        ),
        action_cache=StoreConfig(
            backend="filesystem", root_dir=Path("/var/lib/expbuild/cache"), max_size_bytes=20_000_000_000
        ),
    )
    host = HostWorkerConfig(
        type="host",
        count=4,
        work_dir=Path("/tmp/expbuild-host-workers"),
        use_chroot=False,
        isolation="auto",
        network=False,
        read_only_paths=(Path("/opt"),),
        slot_uids=(60800, 61183),
        env_whitelist=("PATH", "HOME", "USER"),
        run_as_user="nobody",
        run_as_group="nogroup",
        memory_limit=8589934592,
        cpu_limit=4.0,
        max_processes=4096,
        max_open_files=65536,
        platform={},
    )
    docker = DockerWorkerConfig(
        type="docker",
        count=2,
        image="myorg/build-env:latest",
        always_pull=False,
        cpu_limit=4.0,
        memory_limit=8589934592,
        network_mode="none",
        user="1000:1000",
        volumes=(VolumeConfig(host_path=Path("/var/cache/build"), container_path=Path("/cache"), read_only=False),),
        work_dir=state_dir() / "work/docker",
        docker_host=None,
        platform={},
    )
    assert config.execution == ExecutionConfig(
        backend="pool",
        pool=PoolConfig(
            max_queue_size=1000,
            scheduler_interval_ms=100,
            default_task_timeout_seconds=3600,
            max_task_timeout_seconds=86400,
            result_ttl_seconds=300,
            abandoned_grace_seconds=300,
            max_log_bytes=67108864,
            max_output_bytes=34359738368,
            workers=(host, docker),
        ),
    )
    assert config.capabilities == CapabilitiesConfig(
        digest_functions=(DigestFunction.SHA256,),
        max_batch_total_size_bytes=4194304,
        supported_compressors=("ZSTD", "DEFLATE"),
        exec_enabled=True,
        action_cache_update_enabled=True,
        symlink_absolute_path_strategy="ALLOWED",
    )


def test_the_default_is_a_local_server_with_a_host_worker_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user: loopback, state under XDG_STATE_HOME, every core."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/ada/state")
    config = default_config()
    assert (config.server.host, config.server.port, config.server.instance_name) == ("127.0.0.1", 8980, "")
    assert config.storage.cas == CasConfig(root_dir=Path("/home/ada/state/expbuild/cas"))
    assert config.storage.action_cache == StoreConfig(root_dir=Path("/home/ada/state/expbuild/cache"))
    (worker,) = config.execution.pool.workers
    assert isinstance(worker, HostWorkerConfig)
    assert worker.count == len(os.sched_getaffinity(0))
    assert worker.work_dir == Path("/home/ada/state/expbuild/work/host")
    assert worker.env_whitelist == ()


@pytest.mark.parametrize(
    ("euid", "state_home", "expected"),
    [
        pytest.param(0, "/elsewhere", "/var/lib/expbuild", id="root"),
        pytest.param(7, "/xdg", "/xdg/expbuild", id="xdg"),
        pytest.param(7, "relative", "/home/ada/.local/state/expbuild", id="xdg-relative-is-ignored"),
        pytest.param(7, "", "/home/ada/.local/state/expbuild", id="home"),
    ],
)
def test_state_directory(monkeypatch: pytest.MonkeyPatch, euid: int, state_home: str, expected: str) -> None:
    """Root's state is the system's; a user's follows the XDG rules."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setenv("XDG_STATE_HOME", state_home)
    monkeypatch.setenv("HOME", "/home/ada")
    assert state_dir() == Path(expected)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No home directory: a sentence, not a traceback; and no problem where no default is needed."""

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(os, "geteuid", lambda: 7)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(ConfigError, match="set HOME or XDG_STATE_HOME"):
        default_config()
    with pytest.raises(ConfigError, match="set HOME or XDG_STATE_HOME"):
        parse_config("", "test.toml")
    parse_config(
        '[storage.cas]\nbackend = "memory"\n[storage.action_cache]\nbackend = "memory"\n' + HOST + 'work_dir = "/w"\n',
        "test.toml",
    )


def test_a_file_with_only_a_server_table_gets_every_default() -> None:
    """Each table, and each key, may be left out."""
    assert parse_config('[server]\naddress = "127.0.0.1:8980"\n', "test.toml") == default_config()
    assert parse_config("", "test.toml") == default_config()


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("0.0.0.0:8980", "0.0.0.0", 8980),
        ("[::]:8980", "::", 8980),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("localhost:0", "localhost", 0),
        ("build-box.example.org:65535", "build-box.example.org", 65535),
    ],
)
def test_address(address: str, host: str, port: int) -> None:
    """Names, IPv4 and bracketed IPv6; port 0 means any."""
    server = parse_config(f'[server]\naddress = "{address}"\n', "test.toml").server
    assert (server.address, server.host, server.port) == (address, host, port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # [server]
        *(
            pytest.param(f'[server]\naddress = "{a}"', f'server.address: {ADDRESS}, got "{a}"', id=f"address-{a}")
            for a in (
                "",
                ":8980",
                "localhost",
                "::1:8980",
                "[::]",
                "h:65536",
                "h:-1",
                "1.2.3:1",
                "999.1.1.1:1",
                "a b:1",
            )
        ),
        pytest.param("[server]\naddress = 8980", f"server.address: {ADDRESS}, got 8980", id="address-type"),
        *(
            pytest.param(
                f'[server]\ninstance_name = "{n}"', f'server.instance_name: {SEGMENTS}, got "{n}"', id=f"instance-{n}"
            )
            for n in ("/", "/a", "a/", "a//b", "blobs", "a/uploads/b", "x/compressed-blobs")
        ),
        pytest.param(
            '[server]\nstrict_instance_name = "yes"',
            'server.strict_instance_name: expected true or false, got "yes"',
            id="bool-from-string",
        ),
        pytest.param(
            "[server]\nstrict_instance_name = 1",
            "server.strict_instance_name: expected true or false, got 1",
            id="bool-from-int",
        ),
        pytest.param("server = 1", "server: expected a table, got 1", id="table-type"),
        # unknown keys
        pytest.param('[server]\nadress = ""', 'server.adress: unknown key; did you mean "address"?', id="unknown-near"),
        pytest.param(
            "[storage.cas]\nroot_dir = '/c'\nquota = 1",
            "storage.cas.quota: unknown key; known here: backend, root_dir, max_size_bytes, min_free_bytes, "
            "durability, min_age_seconds, verify_on_read, scrub_bytes_per_second",
            id="unknown-far",
        ),
        pytest.param("[sever]", 'sever: unknown key; did you mean "server"?', id="unknown-table"),
        pytest.param(
            f'{DOCKER}"cpu limit" = 1',
            f'{WORKER}."cpu limit": unknown key; did you mean "cpu_limit"?',
            id="unknown-quoted",
        ),
        pytest.param(
            f"{DOCKER}[[execution.pool.workers.volumes]]\nhost_path = '/a'\ncontainer_path = '/b'\nreadonly = true",
            f'{WORKER}.volumes[0].readonly: unknown key; did you mean "read_only"?',
            id="unknown-deep",
        ),
        # [storage]
        pytest.param(
            '[storage.cas]\nbackend = "s3"',
            'storage.cas.backend: expected "filesystem" or "memory", got "s3"',
            id="backend",
        ),
        pytest.param(
            '[storage.cas]\nbackend = "filesystem"',
            'storage.cas.root_dir: expected an absolute path (needed by backend = "filesystem"), got nothing',
            id="root-dir-missing",
        ),
        pytest.param(
            '[storage.cas]\nbackend = "memory"\nmax_size_bytes = 5',
            'storage.cas.max_size_bytes: expected nothing (it is only for backend = "filesystem"), got 5',
            id="limit-of-memory",
        ),
        pytest.param(
            "[storage.cas]\nroot_dir = '/c'\nmax_size_bytes = -1",
            "storage.cas.max_size_bytes: expected a number of bytes, got -1",
            id="negative-limit",
        ),
        pytest.param(
            "[storage.cas]\nroot_dir = '/c'\ndurability = 'lax'",
            'storage.cas.durability: expected "none", "ordered" or "strict", got "lax"',
            id="durability",
        ),
        pytest.param(
            '[storage.action_cache]\nbackend = "memory"\nroot_dir = "/x"',
            'storage.action_cache.root_dir: expected nothing (it is only for backend = "filesystem"), got "/x"',
            id="root-dir-for-memory",
        ),
        *(
            pytest.param(
                f"[storage.cas]\nroot_dir = {value}",
                f"storage.cas.root_dir: expected an absolute path, got {value}",
                id=f"root-dir-{value}",
            )
            for value in ('"cas"', '"~/cas"', '""', '"/a\\u0000b"', "5")
        ),
        *(
            pytest.param(
                f'[storage.cas]\nroot_dir = "{cas}"\n[storage.action_cache]\nroot_dir = "{ac}"',
                "storage.action_cache.root_dir: expected a directory neither inside nor around storage.cas.root_dir "
                f'("{shown}"), got "{ac}"',
                id=f"roots-{id_}",
            )
            for id_, cas, shown, ac in (
                ("equal", "/s", "/s", "/s"),
                ("inside", "/s", "/s", "/s/ac"),
                ("around", "/s/cas", "/s/cas", "/s"),
                ("inside-by-dots", "/t/../s/", "/s", "/s/ac"),
            )
        ),
        pytest.param(
            f'[storage.cas]\nroot_dir = "/s"\n{HOST}work_dir = "/s/work"',
            f"{WORKER}.work_dir: expected a directory neither inside nor around storage.cas.root_dir "
            '("/s"), got "/s/work"',
            id="work-dir-inside-a-store",
        ),
        # [execution]
        pytest.param(
            '[execution]\nbackend = "k8s"', 'execution.backend: expected "pool", got "k8s"', id="execution-backend"
        ),
        pytest.param(
            "[execution.pool]\nmax_queue_size = 0",
            "execution.pool.max_queue_size: expected a positive integer, got 0",
            id="queue-zero",
        ),
        pytest.param(
            "[execution.pool]\nmax_queue_size = 99999999",
            "execution.pool.max_queue_size: expected at most 1000000, got 99999999",
            id="queue-huge",
        ),
        *(
            pytest.param(
                f"[execution.pool]\nscheduler_interval_ms = {value}",
                f"execution.pool.scheduler_interval_ms: expected an integer from 1 to 60000, got {value}",
                id=f"interval-{value}",
            )
            for value in ("0", "1.5", "true")
        ),
        pytest.param(
            "[execution.pool]\nscheduler_interval_ms = 60001",
            "execution.pool.scheduler_interval_ms: expected at most 60000, got 60001",
            id="interval-long",
        ),
        *(
            pytest.param(
                f"[execution.pool]\n{key} = {value}",
                f"execution.pool.{key}: expected a positive number of seconds, got {value}",
                id=f"{key}-{value}",
            )
            for key in ("default_task_timeout_seconds", "max_task_timeout_seconds", "result_ttl_seconds")
            for value in ("0", "-1", "nan", "inf", "true", '"1h"')
        ),
        pytest.param(
            "[execution.pool]\nabandoned_grace_seconds = 31536001",
            "execution.pool.abandoned_grace_seconds: expected at most 31536000, got 31536001",
            id="grace-long",
        ),
        pytest.param(
            "[execution.pool]\ndefault_task_timeout_seconds = 60\nmax_task_timeout_seconds = 59",
            "execution.pool.max_task_timeout_seconds: expected at least default_task_timeout_seconds (60), got 59",
            id="max-timeout-below-default",
        ),
        pytest.param(
            "[execution.pool]\nworkers = []",
            "execution.pool.workers: expected at least one worker while capabilities.exec_enabled, got an empty list",
            id="no-workers",
        ),
        pytest.param(
            "[execution.pool]\nworkers = 4", "execution.pool.workers: expected a list, got 4", id="workers-no-list"
        ),
        pytest.param("[execution.pool]\nworkers = [4]", f"{WORKER}: expected a table, got 4", id="worker-no-table"),
        pytest.param(
            "[[execution.pool.workers]]", f'{WORKER}.type: expected "host" or "docker", got nothing', id="no-type"
        ),
        pytest.param(
            '[[execution.pool.workers]]\ntype = "vm"',
            f'{WORKER}.type: expected "host" or "docker", got "vm"',
            id="type",
        ),
        pytest.param(
            "[[execution.pool.workers]]\ntype = 5", f'{WORKER}.type: expected "host" or "docker", got 5', id="type-5"
        ),
        # host workers
        *(
            pytest.param(f"{HOST}count = {v}", f"{WORKER}.count: expected a positive integer, got {v}", id=f"count-{v}")
            for v in ("0", "-3", "1.0", '"4"', "true")
        ),
        pytest.param(
            f"{HOST}[[execution.pool.workers]]\ntype = 'docker'\nimage = 'i'\ncount = 0",
            "execution.pool.workers[1].count: expected a positive integer, got 0",
            id="count-of-the-second-worker",
        ),
        pytest.param(f"{HOST}work_dir = 'w'", f'{WORKER}.work_dir: expected an absolute path, got "w"', id="work-dir"),
        pytest.param(
            f"{HOST}env_whitelist = ['PATH', 'A=B', 1]",
            [
                f'{WORKER}.env_whitelist[1]: expected the name of an environment variable, got "A=B"',
                f"{WORKER}.env_whitelist[2]: expected the name of an environment variable, got 1",
            ],
            id="env-whitelist",
        ),
        pytest.param(
            f"{HOST}env_whitelist = 'PATH'", f'{WORKER}.env_whitelist: expected a list, got "PATH"', id="env-no-list"
        ),
        pytest.param(
            f"{HOST}run_as_user = 1000",
            f"{WORKER}.run_as_user: expected a name or a number in quotes, got 1000",
            id="user",
        ),
        pytest.param(
            f"{HOST}run_as_user = ''",
            f'{WORKER}.run_as_user: expected a name or a number in quotes, got ""',
            id="user-empty",
        ),
        pytest.param(
            f"{HOST}run_as_group = 'g'",
            f'{WORKER}.run_as_group: expected run_as_user beside it, got only "g"',
            id="group",
        ),
        pytest.param(
            f"{HOST}platform = {{cores = 4}}", f"{WORKER}.platform.cores: expected a string, got 4", id="platform-value"
        ),
        pytest.param(
            f"{HOST}platform = []", f"{WORKER}.platform: expected a table of strings, got an empty list", id="platform"
        ),
        pytest.param(
            f"{HOST}isolation = 'chroot'",
            f'{WORKER}.isolation: expected "auto", "none", "uid" or "namespaces", got "chroot"',
            id="isolation",
        ),
        pytest.param(
            f"{HOST}use_chroot = true\nisolation = 'uid'",
            f'{WORKER}.isolation: expected "namespaces" or "auto" beside use_chroot, got "uid"',
            id="isolation-against-chroot",
        ),
        pytest.param(
            f"{HOST}chroot_root = 'input'",
            f'{WORKER}.chroot_root: expected use_chroot = true beside it, got only "input"',
            id="chroot-root-without-chroot",
        ),
        pytest.param(
            f"{HOST}slot_uids = [60900, 60800]",
            f"{WORKER}.slot_uids: expected the first and the last number, got a list",
            id="slot-uids",
        ),
        pytest.param(
            f"{HOST}slot_uids = [60800, 60900]\n{HOST}slot_uids = [60900, 61000]",
            "execution.pool.workers: expected slot_uids of the host workers equal or apart, got [60800, 60900] and "
            "[60900, 61000]",
            id="slot-uids-overlap",
        ),
        pytest.param(
            f"{HOST}image = 'i'",
            f"{WORKER}.image: unknown key; known here: type, count, work_dir, use_chroot, isolation, chroot_root, "
            "network, read_only_paths, slot_uids, env_whitelist, run_as_user, run_as_group, "
            "memory_limit, cpu_limit, max_processes, max_open_files, platform",
            id="host-with-docker-key",
        ),
        # docker workers
        pytest.param(
            "[[execution.pool.workers]]\ntype = 'docker'",
            f"{WORKER}.image: expected the name of a container image, got nothing",
            id="image-missing",
        ),
        *(
            pytest.param(
                f"{DOCKER}cpu_limit = {value}",
                f"{WORKER}.cpu_limit: expected a number of cores of at least 0.01, got {value}",
                id=f"cpu-{value}",
            )
            for value in ("0", "0.0", "-1", "nan", '"2"')
        ),
        pytest.param(
            f"{DOCKER}memory_limit = 6291455",
            f"{WORKER}.memory_limit: expected at least 6291456 bytes, got 6291455",
            id="memory",
        ),
        pytest.param(
            f"{DOCKER}memory_limit = '8g'",
            f'{WORKER}.memory_limit: expected at least 6291456 bytes, got "8g"',
            id="memory-text",
        ),
        pytest.param(
            f"{DOCKER}network_mode = 'container:x'",
            f'{WORKER}.network_mode: expected "none", "bridge" or "host", got "container:x"',
            id="network",
        ),
        *(
            pytest.param(
                f"{DOCKER}user = {value}",
                f'{WORKER}.user: expected "user" or "user:group", got {value}',
                id=f"user-{value}",
            )
            for value in ('""', '"1:"', '"1:2:3"', '":5"', "1000", '"a b"')
        ),
        pytest.param(
            f"{DOCKER}volumes = [{{host_path = 'x', container_path = '/'}}, {{}}]",
            [
                f'{WORKER}.volumes[0].host_path: expected an absolute path, got "x"',
                f'{WORKER}.volumes[0].container_path: expected an absolute path other than "/", got "/"',
                f"{WORKER}.volumes[1].host_path: expected an absolute path, got nothing",
                f'{WORKER}.volumes[1].container_path: expected an absolute path other than "/", got nothing',
            ],
            id="volumes",
        ),
        pytest.param(
            f"{DOCKER}volumes = [{{host_path = '/x', container_path = '/c'}}, "
            "{host_path = '/y', container_path = '/c/'}]",
            f'{WORKER}.volumes: expected a different container_path in each, got "/c" twice',
            id="volumes-on-each-other",
        ),
        *(
            pytest.param(
                f"{DOCKER}docker_host = '{value}'",
                f'{WORKER}.docker_host: expected "unix:///path" or "tcp://host:port", got "{value}"',
                id=f"docker-host-{value}",
            )
            for value in ("", "/var/run/docker.sock", "unix://run/docker.sock", "ssh://box", "tcp://")
        ),
        # [capabilities]
        pytest.param(
            "[capabilities]\ndigest_functions = ['SHA256', 'VSO', 1]",
            [
                f'capabilities.digest_functions[1]: expected {FUNCTIONS}, got "VSO"',
                f"capabilities.digest_functions[2]: expected {FUNCTIONS}, got 1",
            ],
            id="digest-function",
        ),
        pytest.param(
            "[capabilities]\ndigest_functions = []",
            "capabilities.digest_functions: expected a list with at least one of SHA256, SHA1, MD5, SHA384, SHA512, "
            "SHA256TREE, BLAKE3, got an empty list",
            id="digest-functions-empty",
        ),
        pytest.param(
            "[capabilities]\ndigest_functions = ['MD5', 'SHA1', 'MD5']",
            'capabilities.digest_functions: expected each value once, got "MD5" 2 times',
            id="digest-function-twice",
        ),
        pytest.param(
            "[capabilities]\nmax_batch_total_size_bytes = 1023",
            "capabilities.max_batch_total_size_bytes: expected an integer from 1024 to 15728640, got 1023",
            id="batch-small",
        ),
        pytest.param(
            "[capabilities]\nmax_batch_total_size_bytes = 16777216",
            "capabilities.max_batch_total_size_bytes: expected at most 15728640, got 16777216",
            id="batch-large",
        ),
        pytest.param(
            "[capabilities]\nsupported_compressors = ['BROTLI']",
            'capabilities.supported_compressors[0]: expected "ZSTD", "DEFLATE" or "IDENTITY", got "BROTLI"',
            id="compressor",
        ),
        pytest.param(
            "[capabilities]\nsupported_compressors = ['ZSTD', 'ZSTD']",
            'capabilities.supported_compressors: expected each value once, got "ZSTD" 2 times',
            id="compressor-twice",
        ),
        pytest.param(
            "[capabilities]\nsymlink_absolute_path_strategy = 'allowed'",
            'capabilities.symlink_absolute_path_strategy: expected "ALLOWED" or "DISALLOWED", got "allowed"',
            id="symlink-strategy",
        ),
        # TOML itself
        pytest.param("[server]\naddress = \n", "test.toml:2:11: not valid TOML: Invalid value", id="syntax"),
        pytest.param(
            "[server]\n[server]\n",
            "test.toml:2:8: not valid TOML: Cannot declare ('server',) twice",
            id="syntax-table-twice",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(text: str, expected: str | list[str]) -> None:
    """The full key, what is allowed, what was found."""
    assert problems(text) == ([expected] if isinstance(expected, str) else expected)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "1" * 5000], ids=["nested", "digits"])
def test_absurd_toml_is_refused_as_invalid(text: str) -> None:
    """What the TOML parser refuses in its own way is a problem like any other."""
    (line,) = problems(text)
    assert line.startswith("test.toml: not valid TOML: ")


def test_all_problems_are_reported_at_once() -> None:
    """One reading finds them all: in every table, of every kind, within and between tables."""
    text = """
        debug = true
        [server]
        adress = "0.0.0.0:1"
        [storage.cas]
        root_dir = "/s"
        size = 1
        [storage.action_cache]
        root_dir = "/s/ac"
        [execution.pool]
        max_queue_size = -1
        default_task_timeout_seconds = "1h"
        workers = []
        [capabilities]
        digest_functions = ["CRC32"]
    """
    assert problems(text) == [
        'server.adress: unknown key; did you mean "address"?',
        "storage.cas.size: unknown key; known here: backend, root_dir, max_size_bytes, min_free_bytes, durability, "
        "min_age_seconds, verify_on_read, scrub_bytes_per_second",
        "execution.pool.max_queue_size: expected a positive integer, got -1",
        'execution.pool.default_task_timeout_seconds: expected a positive number of seconds, got "1h"',
        f'capabilities.digest_functions[0]: expected {FUNCTIONS}, got "CRC32"',
        "debug: unknown key; known here: server, tls, auth, storage, execution, capabilities",
        "execution.pool.workers: expected at least one worker while capabilities.exec_enabled, got an empty list",
        'storage.action_cache.root_dir: expected a directory neither inside nor around storage.cas.root_dir ("/s"), '
        'got "/s/ac"',
    ]


def test_the_error_text_lists_every_problem() -> None:
    """str(error) is complete, for whoever only has that."""
    with pytest.raises(ConfigError) as caught:
        parse_config("a = 1\nb = 2", "test.toml")
    assert str(caught.value).splitlines() == ["test.toml: 2 problem(s) in the configuration", *caught.value.problems]


def test_a_long_or_hostile_value_cannot_break_its_line() -> None:
    """Values are quoted as TOML would, and cut."""
    (line,) = problems('[server]\naddress = "\\n\\u001b[31m' + "x" * 5000 + '"')
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 300


def test_numbers_are_not_converted_but_whole_seconds_may_be_written_as_integers() -> None:
    """TOML's integers are accepted where fractions are allowed; nothing else changes its type."""
    pool = parse_config(
        "[execution.pool]\nresult_ttl_seconds = 5\nabandoned_grace_seconds = 0.25", "test.toml"
    ).execution.pool
    assert (pool.result_ttl_seconds, pool.abandoned_grace_seconds) == (5.0, 0.25)


def test_a_long_default_timeout_raises_the_default_of_the_maximum() -> None:
    """A file that only knows default_task_timeout_seconds stays valid whatever that is."""
    pool = parse_config("[execution.pool]\ndefault_task_timeout_seconds = 172800", "test.toml").execution.pool
    assert pool.max_task_timeout_seconds == 172800
    assert PoolConfig().max_task_timeout_seconds == 86400


def test_a_cache_without_execution_needs_no_workers() -> None:
    """exec_enabled = false with an empty pool is a cache server."""
    config = parse_config("[execution.pool]\nworkers = []\n[capabilities]\nexec_enabled = false", "test.toml")
    assert config.execution.pool.workers == ()


def test_identity_may_be_listed_and_means_nothing() -> None:
    """It is always served; the resolved list holds the others."""
    config = parse_config("[capabilities]\nsupported_compressors = ['IDENTITY', 'DEFLATE']", "test.toml")
    assert config.capabilities.supported_compressors == ("DEFLATE",)


def test_digest_functions_keep_their_order() -> None:
    """The first is the default."""
    config = parse_config("[capabilities]\ndigest_functions = ['BLAKE3', 'SHA256']", "test.toml")
    assert config.capabilities.digest_functions == (DigestFunction.BLAKE3, DigestFunction.SHA256)


def test_rules_hold_for_configurations_made_in_code() -> None:
    """Tests and tools that build a Config are held to the same rules between tables."""
    with pytest.raises(ValidationError, match="at least one worker"):
        Config(execution=ExecutionConfig(pool=PoolConfig(workers=())))
    with pytest.raises(ValidationError, match="neither inside nor around"):
        Config(storage=StorageConfig(cas=CasConfig(root_dir=Path("/s")), action_cache=StoreConfig(root_dir=Path("/s"))))


def test_configurations_are_immutable() -> None:
    """What was validated stays as it is."""
    with pytest.raises(ValidationError, match="frozen"):
        default_config().server.address = "x"  # type: ignore[misc]  # that is the point


class TestFiles:
    """Reading from disk."""

    def problems(self, path: Path) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return list(caught.value.problems)

    def test_missing(self, tmp_path: Path) -> None:
        """Says which file."""
        assert self.problems(tmp_path / "x") == [f"cannot read {tmp_path}/x: No such file or directory"]

    def test_directory(self, tmp_path: Path) -> None:
        """Says why."""
        assert self.problems(tmp_path) == [f"cannot read {tmp_path}: Is a directory"]

    def test_name_that_no_file_can_have(self) -> None:
        """Even that is a sentence."""
        assert self.problems(Path("a\0b")) == ["cannot read a\0b: embedded null byte"]

    def test_not_utf_8(self, tmp_path: Path) -> None:
        """Names line and byte."""
        path = tmp_path / "c.toml"
        path.write_bytes(b"[server]\n# caf\xe9\n")
        assert self.problems(path) == [f"{path}:2: expected UTF-8 text, got byte 0xe9"]

    def test_endless(self) -> None:
        """Reading stops at a size no configuration has."""
        assert self.problems(Path("/dev/zero")) == ["/dev/zero is larger than 1048576 bytes"]

    def test_syntax_error_names_the_file(self, tmp_path: Path) -> None:
        """File, line and column, as editors understand them."""
        path = tmp_path / "c.toml"
        path.write_text("[server]\naddress: 5\n")
        assert self.problems(path) == [f"{path}:2:8: not valid TOML: Expected '=' after a key in a key/value pair"]

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        """Some editors write one."""
        path = tmp_path / "c.toml"
        path.write_bytes(b"\xef\xbb\xbf[server]\n")
        assert load_config(path) == default_config()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(EXAMPLE.read_text(), id="example"),
        pytest.param("", id="default"),
        pytest.param("[storage.cas]\nbackend = 'memory'\n[storage.action_cache]\nbackend = 'memory'", id="memory"),
        pytest.param("[execution.pool]\nworkers = []\n[capabilities]\nexec_enabled = false", id="no-workers"),
        pytest.param(
            f"{HOST}run_as_user = '65534'\n"
            "[execution.pool.workers.platform]\nPool = \"a 'b' \\u007f\\n\"\n'odd key.' = 'ü'\n"
            f"{DOCKER}cpu_limit = 0.5\ndocker_host = 'unix:///run/d.sock'\nplatform = {{gpu = 'yes'}}\n"
            "volumes = [{host_path = '/a b', container_path = '/b'}, {host_path = '/c', container_path = '/d'}]\n"
            "[capabilities]\ndigest_functions = ['BLAKE3', 'MD5']\nsupported_compressors = []",
            id="everything",
        ),
    ],
)
def test_a_rendered_configuration_reads_back_the_same(text: str) -> None:
    """render_config loses nothing and is stable."""
    config = parse_config(text, "test.toml")
    rendered = render_config(config)
    assert parse_config(rendered, "rendered") == config
    assert render_config(parse_config(rendered, "rendered")) == rendered


@given(
    platform=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))),
    seconds=st.floats(min_value=1e-9, max_value=3e7),
)
def test_any_text_and_number_survives_rendering(platform: dict[str, str], seconds: float) -> None:
    """No string and no float is changed or breaks the TOML."""
    pool = PoolConfig(workers=(HostWorkerConfig(platform=platform),), result_ttl_seconds=seconds)
    config = Config(execution=ExecutionConfig(pool=pool))
    assert parse_config(render_config(config), "rendered") == config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", True),
        ("a", True),
        ("team/project-1", True),
        ("Blobs", True),
        ("a/blobs", False),
        ("a//b", False),
        ("a\nb", False),
    ],
)
def test_well_formed_instance_names(name: str, expected: bool) -> None:
    """The rule the wire shares with the configuration."""
    assert is_well_formed_instance_name(name) is expected
