"""Table R, first part: a running action against the cache, its inputs and what is made of its outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tests.attacks.attack import CANARY, Attack, Outcome, Target, printed, py, sh
from tests.support.actions import Executable, build_action, from_message

POISON = b"#!/bin/sh\necho original input of an attack\n"
"""The input that attacks try to change: one blob, shared by all of them."""


async def _poisoned(target: Target, outcome: Outcome) -> bool:
    """Another action sees other bytes or another mode."""
    script = "cat in; stat -c %a in"
    for node, mode in ((POISON, b"444"), (Executable(POISON), b"555")):
        action = build_action(("/bin/sh", "-c", script), inputs={"in": node}, salt=os.urandom(8))
        if await target.client.stdout((await target.client.execute(action)).result) != POISON + mode + b"\n":
            return True
    return False


def _on_input(what: str, script: str, row: str = "R1") -> Attack:
    return sh(row, what, f"({script}) 2>&1; true", judge=_poisoned, inputs={"in": POISON, "x": Executable(POISON)})


def _py_on_input(what: str, script: str) -> Attack:
    return py("R1", what, script, judge=_poisoned, inputs={"in": POISON, "x": Executable(POISON)})


async def _empty_is_not_empty(target: Target, outcome: Outcome) -> bool:
    action = build_action(("/bin/cat", "in"), inputs={"in": b""}, salt=os.urandom(8))
    return bool(await target.client.stdout((await target.client.execute(action)).result))


async def _kind_refused(target: Target, outcome: Outcome) -> bool:
    """It came back as a file, or took long."""
    return bool(outcome.response.result.output_files) or outcome.code not in (3, 9) or outcome.wall_s > 30


async def _stored(target: Target, outcome: Outcome) -> bool:
    return bool(outcome.response.result.output_files) or outcome.code not in (0, 9)


async def _larger(target: Target, outcome: Outcome) -> bool:
    sizes = [file.digest.size_bytes for file in outcome.response.result.output_files]
    return sum(sizes) > 8 << 20 or outcome.code not in (0, 9) or outcome.wall_s > 30


async def _hangs(target: Target, outcome: Outcome) -> bool:
    return outcome.wall_s > 30 or await printed(target, outcome)


async def _lost(target: Target, outcome: Outcome) -> bool:
    """An output that is there was not returned, or with other bytes."""
    return outcome.code != 0 or b"kept" not in outcome.seen


async def _unreadable_output(target: Target, outcome: Outcome) -> bool:
    """Neither returned nor refused with a reason."""
    return outcome.code not in (0, 9)


async def _differs_from_its_digest(target: Target, outcome: Outcome) -> bool:
    for output in outcome.response.result.output_files:
        data = await target.client.read(output.digest)
        digest = from_message(output.digest)
        if digest.function.digest_of(data) != digest:
            return True
    return outcome.code not in (0, 9)


@dataclass(frozen=True)
class _Left:
    """Whether a path outside was created, or is gone."""

    name: str

    async def __call__(self, target: Target, outcome: Outcome) -> bool:
        return not os.path.exists(target.names[self.name]) or await printed(target, outcome)


INPUTS = (
    _on_input("append to an input", "echo x >> in"),
    _on_input("make an input writable, and write", "chmod u+w in x && echo x >> in && echo x >> x"),
    _on_input("truncate an input", "truncate -s 0 in; : > in"),
    _on_input("edit an input in place", "sed -i s/original/evil/ in x"),
    _on_input("rename over an input", "echo evil > new; mv -f new in; mv -f in x"),
    _on_input("write through another link to an input", "ln in other && echo evil > other"),
    _on_input("write through /proc/self/fd", "exec 5< in; echo evil > /proc/self/fd/5"),
    _on_input(
        "copy over an input", "cp --remove-destination in y; cp -f y in; cat y >> in; dd if=y of=in conv=notrunc"
    ),
    _py_on_input("open an input for writing", "os.pwrite(os.open('in', os.O_RDWR), b'evil', 0)"),
    _py_on_input("truncate an input by its descriptor", "os.ftruncate(os.open('in', os.O_RDONLY), 1)"),
    _py_on_input(
        "map an input for writing",
        "import mmap\nfd = os.open('in', os.O_RDWR)\nmmap.mmap(fd, 4)[0:4] = b'evil'",
    ),
    _py_on_input("attributes on an input", "os.setxattr('in', 'user.evil', b'x')"),
    _on_input("immutable and append-only flags", "chattr +i in; chattr +a x"),
    _on_input("the age of an input", "touch -d 2001-01-01 in x; touch in", "R3"),
    _on_input("the mode of an input", "chmod 4777 in; chmod 000 x", "R3"),
    sh("R2", "fill the empty file", "chmod u+w in; echo evil > in", judge=_empty_is_not_empty, inputs={"in": b""}),
)

OUTPUTS = (
    sh("R5", "an output symlink to a file of the server", "ln -s $SECRET out", output_paths=["out"]),
    sh("R5", "an output symlink to the server's environment", "ln -s /proc/$SERVER/environ out", output_paths=["out"]),
    sh("R5", "an output directory with a symlink to the store", "mkdir out; ln -s $CAS out/c", output_paths=["out"]),
    sh("R6", "an output symlink to a directory", "mkdir d; ln -s d out", output_paths=["out"]),
    sh("R7", "the parent of an output exchanged", "rm -r out; ln -s /etc out", output_paths=["out/shadow"]),
    sh(
        "R7",
        "the parent of an output exchanged for the state of the server",
        "rm -r out; ln -s $STATE out",
        output_paths=["out/secret"],
    ),
    sh("R7", "a symlink in the middle of an output path", "rm -r a; ln -s / a", output_paths=["a/etc/shadow"]),
    sh(
        "R8",
        "outputs that a daemon exchanges all the time",
        "mkdir out; echo a > out/f; ln -s $SECRET l; "
        "(setsid sh -c 'while :; do mv out/f g; mv l out/f; mv out/f l; mv g out/f; done' 2>&1 &); sleep 0.1",
        judge=_differs_from_its_digest,
        output_paths=["out/f"],
    ),
    sh(
        "R9",
        "an output that stays open, and is written to later",
        "echo kept > out; (setsid sh -c 'exec 5>> out; sleep 1; while :; do echo evil >&5; done' >/dev/null 2>&1 &)",
        judge=_differs_from_its_digest,
        output_paths=["out"],
    ),
    sh("R10", "a hard link to /etc/shadow for an output", "ln /etc/shadow out", output_paths=["out"], judge=_stored),
    sh("R10", "a hard link to a file of the server", "ln $SECRET out", output_paths=["out"], judge=_stored),
    sh(
        "R11",
        "a setuid program for an output",
        "cp /bin/sh out; chmod 6755 out; mkdir d; chmod 1777 d; cp out d/x",
        judge=printed,
        output_paths=["out", "d"],
    ),
    sh("R12", "a device for an output", "mknod out c 1 3 || echo kept > out", judge=_lost, output_paths=["out"]),
    py(
        "R12",
        "a socket for an output",
        "socket.socket(socket.AF_UNIX).bind('out')\nraise OSError",
        judge=_kind_refused,
        output_paths=["out"],
    ),
    sh("R13", "a pipe for an output", "mkfifo out", judge=_kind_refused, output_paths=["out"]),
    sh(
        "R13",
        "a directory full of pipes",
        "mkdir out; mkfifo out/p; echo kept > out/f",
        judge=_lost,
        output_paths=["out"],
    ),
    sh("R14", "an output of 1 TiB that is all hole", "truncate -s 1T out", judge=_larger, output_paths=["out"]),
    sh(
        "R14",
        "outputs that are larger together than allowed",
        "mkdir out; for i in 1 2 3 4 5; do truncate -s 7M out/$$i; done",
        judge=_unreadable_output,
        output_paths=["out"],
    ),
    py(
        "R16",
        "a directory 3,000 levels deep",
        "for _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nraise OSError",
        judge=_unreadable_output,
        output_paths=["d"],
    ),
    sh(
        "R16",
        "5,000 output files",
        "mkdir out; cd out; seq 5000 | xargs touch; echo kept > f",
        judge=_lost,
        output_paths=["out"],
    ),
    py(
        "R17",
        "a name that is not UTF-8",
        "os.mkdir('out')\nopen(b'out/\\xff', 'w')\nraise OSError",
        judge=_unreadable_output,
        output_paths=["out"],
    ),
    sh(
        "R17",
        "a name with a line break and a terminal sequence",
        "mkdir out; printf kept > \"$$(printf 'out/a\\nb\\033[2J')\"",
        judge=_lost,
        output_paths=["out"],
    ),
    sh(
        "R18",
        "outputs without any permission",
        "mkdir out; echo kept > out/f; chmod 000 out/f out",
        judge=_lost,
        output_paths=["out"],
    ),
    sh("R18", "a workspace without any permission", "mkdir d; touch d/f; chmod 000 d $$PWD; true", judge=_hangs),
    sh(
        "R33",
        "a symlink where the server will delete",
        "mkdir -p a/b; ln -s $VICTIM a/b/c; rm -rf $$TMPDIR/x; ln -s $VICTIM $$TMPDIR/x",
        judge=_Left("VICTIM"),
    ),
)

assert CANARY not in POISON
