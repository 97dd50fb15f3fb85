"""Table R, second part: a running action against the server, its neighbours and the machine."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from string import Template

from tests.attacks.attack import BREACH, CANARY, Attack, Outcome, Target, printed, py, sh
from tests.support.actions import build_action
from tests.support.processes import read_stat


async def _server_hurt(target: Target, outcome: Outcome) -> bool:
    """It, or the process that starts actions, is dead or stopped; or the action says that it got through."""
    stats = [read_stat(int(target.names[name])) for name in ("SERVER", "SPAWNER")]
    return any(found is None or found.state in "TtZX" for found in stats) or await printed(target, outcome)


def _daemon(what: str, script: str) -> Attack:
    """Leave processes behind: judged by whether one still runs, or held the result up, when that is there."""
    mark = uuid.uuid4().hex

    async def judge(target: Target, outcome: Outcome) -> bool:
        return outcome.wall_s > 30 or marked_processes(mark) != [] or outcome.code != 0

    row = "R23" if "stdout" in what else "R22"
    return sh(row, what, script, judge=judge, environment={"ATTACK_MARK": mark})


def marked_processes(mark: str) -> list[str]:
    """Return the commands of the processes that have the mark in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            for file in ("cmdline", "environ"):
                try:
                    data = (entry / file).read_bytes()
                except OSError:
                    continue
                if mark.encode() in data:
                    found.append(data[:200].replace(b"\0", b" ").decode(errors="replace"))
    return found


async def _not_bounded(target: Target, outcome: Outcome) -> bool:
    return outcome.wall_s > 45 or outcome.code not in (0, 4)


async def _floods(target: Target, outcome: Outcome) -> bool:
    result = outcome.response.result
    sizes = [result.stdout_digest.size_bytes, result.stderr_digest.size_bytes]
    return max(sizes) > (1 << 20) + 200 or result.exit_code == 0


async def _claims(target: Target, outcome: Outcome) -> bool:
    """The verdict believes an exit code that the command chose itself."""
    return outcome.response.message != "" or outcome.exit_code != 137


async def _no_word(target: Target, outcome: Outcome) -> bool:
    # In a pid namespace its first process tells how the command ended: by an exit code.
    return outcome.exit_code != 139 or (target.level == "uid" and "SIGSEGV" not in outcome.response.message)


class _Cached:
    """Whether the result of an action that failed is in the action cache: executed again, it is not."""

    async def __call__(self, target: Target, outcome: Outcome) -> bool:
        return outcome.response.cached_result or await target.client.cached(self.again) is not None

    def __init__(self, script: str, **options: float) -> None:
        self.again = build_action(("/bin/sh", "-c", script), salt=b"again", **options)  # type: ignore[arg-type]


def _never_cached(what: str, script: str, timeout_s: float | None = None) -> Attack:
    judge = _Cached(script, **({} if timeout_s is None else {"timeout_s": timeout_s}))
    return Attack("R38", what, lambda _: judge.again, judge)


def _left_over(row: str, what: str, leave: str, look: str, *, admitted: bool = True) -> Attack:
    """One action leaves something, the next one looks for it."""

    async def judge(target: Target, outcome: Outcome) -> bool:
        script = Template(look).substitute(target.names)
        action = build_action(("/bin/sh", "-c", script), salt=os.urandom(8))
        return BREACH in await target.client.stdout((await target.client.execute(action)).result)

    return sh(row, what, f"{leave}; true", judge=judge, admitted=("uid",) if admitted else ())


_DAEMON = "trap '' TERM HUP INT; while :; do sleep 1; done"

SECRETS = (
    sh("R20", "a file of the server", "cat $SECRET && echo BREACH"),
    sh("R20", "the environment of the server", "cat /proc/$SERVER/environ && echo BREACH"),
    sh(
        "R20",
        "the memory of the server",
        "head -c 1 /proc/$SERVER/mem && echo BREACH; ls /proc/$SERVER/fd && echo BREACH",
    ),
    sh("R20", "the environment of the spawner", "cat /proc/$SPAWNER/environ && echo BREACH"),
    sh("R20", "every environment there is", "cat /proc/[0-9]*/environ 2>/dev/null; true"),
    sh("R20", "the names in the store", "ls $CAS/* && echo BREACH"),
    sh("R20", "a blob in the store, by its name", "cat $BLOB && echo BREACH"),
    sh("R20", "the action cache", "ls $AC/* && echo BREACH"),
    sh(
        "R20",
        "the workspaces of others",
        "ls $WORK && echo BREACH; ls $WORK/host-0 $WORK/host-1 | grep . && echo BREACH",
    ),
    sh("R20", "the password hashes", "cat /etc/shadow && echo BREACH"),
    sh("R39", "a file in the store", "touch $CAS/x && echo BREACH"),
    sh("R39", "a blob overwritten", "chmod u+w $BLOB; echo evil > $BLOB && echo BREACH; rm $BLOB && echo BREACH"),
    sh("R39", "an entry in the action cache", "touch $AC/x && echo BREACH"),
    sh("R39", "a file beside the workspace", "for f in ../x ../../x $WORK/x; do touch $$f && echo BREACH; done"),
)

PROCESSES = (
    sh("R21", "kill the server", "kill -9 $SERVER && echo BREACH", judge=_server_hurt),
    sh("R21", "kill the spawner", "kill -9 $SPAWNER && echo BREACH", judge=_server_hurt),
    sh("R21", "kill everything", "kill -9 -1; true", judge=_server_hurt),
    sh("R21", "stop the server", "kill -STOP $SERVER && echo BREACH", judge=_server_hurt),
    sh("R21", "slow the server down", "renice 19 -p $SERVER && echo BREACH", judge=_server_hurt),
    py(
        "R21",
        "trace the server",
        "libc = ctypes.CDLL(None, use_errno=True)\nif libc.ptrace(16, $SERVER, 0, 0):\n    raise OSError",
        judge=_server_hurt,
    ),
    _daemon("a daemon that ignores signals", f'setsid sh -c "{_DAEMON}" & sleep 0.1'),
    _daemon("a daemon of a daemon", f'(setsid sh -c "({_DAEMON}) &" &) ; sleep 0.1'),
    _daemon("a hundred daemons", f'for i in $$(seq 100); do setsid sh -c "{_DAEMON}" & done'),
    _daemon("a process in the background that holds stdout", "sleep 100000 & exit 0"),
    py("R24", "a fork bomb", "while True:\n    os.fork()", judge=_not_bounded, timeout_s=4),
    py(
        "R24",
        "a fork bomb that never gives up",
        "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        judge=_not_bounded,
        timeout_s=4,
    ),
    sh("R37", "an exit code that claims a kill", "exit 137", judge=_claims),
    sh("R37", "a death by signal", "kill -SEGV $$$$", judge=_no_word),
    _never_cached("a failure, for the next one", "exit 1"),
    _never_cached("a timeout, for the next one", "exec sleep 100000", 0.3),
)

RESOURCES = (
    sh("R19", "endless stdout", "yes", judge=_floods),
    sh("R19", "endless stderr", "yes >&2", judge=_floods),
    py("R25", "four times the memory allowed", "x = bytearray(512 << 20)\nx[::4096] = b'x' * len(x[::4096])"),
    py(
        "R25",
        "memory in a file without a name",
        "fd = os.memfd_create('x')\nfor _ in range(64):\n    os.write(fd, bytes(8 << 20))",
    ),
    py(
        "R26",
        "a thousand threads",
        "import threading as t\nfor _ in range(1000):\n    t.Thread(target=t.Event().wait, daemon=True).start()",
    ),
    py("R26", "a thousand open files", "for _ in range(1000):\n    os.dup(0)"),
    sh("R27", "one file of 1 GiB", "head -c 1G /dev/zero > x && echo BREACH"),
    sh(
        "R27",
        "many files, each as large as allowed",
        "for i in 1 2 3 4; do head -c 8M /dev/zero > $$i || exit; done; echo BREACH",
        admitted=("uid", "namespaces", "user"),
    ),
    sh(
        "R28",
        "many small files",
        "mkdir d; cd d; seq 3000 | xargs touch && echo BREACH",
        admitted=("uid", "namespaces", "user"),
    ),
)

NETWORK = (
    py("R29", "a connection to this server", "socket.create_connection(('127.0.0.1', $PORT), 5)", admitted=("uid",)),
    py("R29", "an abstract unix socket", "socket.socket(socket.AF_UNIX).connect('\\0$ABSTRACT')", admitted=("uid",)),
    py("R29", "a raw socket", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    py("R29", "a packet socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)"),
    py("R30", "a unix socket anybody may use", "socket.socket(socket.AF_UNIX).connect('$SOCKET')", admitted=("uid",)),
    py("R30", "a unix socket of the server's user", "socket.socket(socket.AF_UNIX).connect('$PRIVATE')"),
    py("R30", "the Docker daemon", "socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')"),
)

TRACES = (
    _left_over("R31", "a file in /tmp", "echo x > /tmp/$MARK", "[ -e /tmp/$MARK ] && echo BREACH"),
    _left_over("R31", "a file in /var/tmp", "echo x > /var/tmp/$MARK", "[ -e /var/tmp/$MARK ] && echo BREACH"),
    _left_over("R31", "a file in /dev/shm", "echo x > /dev/shm/$MARK", "[ -e /dev/shm/$MARK ] && echo BREACH"),
    _left_over("R31", "a segment of shared memory", "ipcmk -M 4242", "ipcs -m | grep 4242 && echo BREACH"),
    _left_over(
        "R31", "a file in TMPDIR", "echo x > $$TMPDIR/$MARK", "[ -e $$TMPDIR/$MARK ] && echo BREACH", admitted=False
    ),
    sh(
        "R34",
        "descriptors of the server",
        "for fd in /proc/self/fd/*; do case $$fd in */[0123]) ;; *) echo BREACH ;; esac; done",
    ),
    py("R34", "the terminal of the server", "os.open('/dev/tty', os.O_RDWR)"),
    sh("R34", "the standard input of the server", "[ -t 0 ] && echo BREACH; cat | grep . && echo BREACH; true"),
    sh(
        "R36",
        "where it runs, which may show in outputs",
        "case $$PWD in /workspace) ;; *) echo BREACH ;; esac",
        admitted=("uid",),
    ),
    sh("R36", "on which machine it runs", "[ $$(hostname) = $HOSTNAME ] && echo BREACH; true", admitted=("uid",)),
    py("R36", "rights of root", "os.setuid(0)"),
    py(
        "R36",
        "a mount",
        "libc = ctypes.CDLL(None)\nif libc.mount(b'none', b'/', b'tmpfs', 0, None):\n    raise OSError",
    ),
)

MACHINE = (*SECRETS, *PROCESSES, *RESOURCES, *NETWORK, *TRACES)

assert CANARY not in _DAEMON.encode()
