"""The one program of ours that warm containers are given: it gives up root's rights and becomes the command.

A shell cannot change its user, and the programs that can are not in every image. So this one comes with us: a static
executable of about 300 bytes that needs nothing of the image. `dropper PROGRAM ARGV0 ARGUMENT...` executes PROGRAM with
its own environment as the user and group it was made for, without any other group. The kernel takes all
capabilities away when root becomes another user. When something fails it writes `COMPLAINT` and the errno as one byte
to stderr and ends with 126.
"""

from __future__ import annotations

import platform
import struct

COMPLAINT = b"expbuild-agent: errno "
"""What it says before the errno byte."""

_BASE = 0x400000
_HEADERS_BYTES = 64 + 56
_SETGROUPS, _SETRESGID, _SETRESUID = 116, 119, 117
_WRITE, _EXECVE, _EXIT_GROUP = 1, 59, 231
_SYSCALL = b"\x0f\x05"


def can_drop() -> bool:
    """Whether there is such a program for the processor of this machine."""
    return platform.machine() == "x86_64"


def dropper(uid: int, gid: int) -> bytes:
    """Return the executable for x86-64 Linux that runs programs as this user, which must not be root."""
    if uid <= 0 or gid < 0:
        raise ValueError("there are no rights to drop for root")
    steps = [
        # push gid; mov edi, 1; mov rsi, rsp; ...; pop rcx
        b"\x68" + struct.pack("<I", gid) + b"\xbf\x01\x00\x00\x00\x48\x89\xe6" + _call(_SETGROUPS) + b"\x59",
        _triple(gid) + _call(_SETRESGID),
        _triple(uid) + _call(_SETRESUID),
    ]
    execute = (
        b"\x48\x8b\x04\x24"  # mov rax, [rsp]             argc
        b"\x48\x8d\x54\xc4\x10"  # lea rdx, [rsp+rax*8+16]  envp
        b"\x48\x8b\x7c\x24\x10"  # mov rdi, [rsp+16]        argv[1]
        b"\x48\x8d\x74\x24\x18"  # lea rsi, [rsp+24]        &argv[2]
    ) + _call(_EXECVE)
    code = execute
    for step in reversed(steps):  # each jumps to what follows `code` unless it succeeded
        code = step + b"\x85\xc0\x0f\x85" + struct.pack("<i", len(code)) + code  # test eax, eax; jnz
    failed = _failure(0)
    failed = _failure(_BASE + _HEADERS_BYTES + len(code) + len(failed))
    return _elf(code + failed + COMPLAINT)


def _call(number: int) -> bytes:
    return b"\xb8" + struct.pack("<I", number) + _SYSCALL  # mov eax, number; syscall


def _triple(value: int) -> bytes:
    return b"\xbf" + struct.pack("<I", value) + b"\x89\xfe\x89\xfa"  # mov edi, value; mov esi, edi; mov edx, edi


def _failure(text_address: int) -> bytes:
    """Return the code that reports -eax as an errno; the complaint lies at `text_address`."""
    to_stderr = b"\xbf\x02\x00\x00\x00"  # mov edi, 2
    return (
        b"\xf7\xd8\x50"  # neg eax; push rax
        + to_stderr
        + b"\xbe"  # mov esi, text
        + struct.pack("<I", text_address)
        + b"\xba"  # mov edx, length
        + struct.pack("<I", len(COMPLAINT))
        + _call(_WRITE)
        + to_stderr
        + b"\x48\x89\xe6\xba\x01\x00\x00\x00"  # mov rsi, rsp; mov edx, 1
        + _call(_WRITE)
        + b"\xbf\x7e\x00\x00\x00"  # mov edi, 126
        + _call(_EXIT_GROUP)
    )


def _elf(body: bytes) -> bytes:
    """Return a static executable with one segment, read and execute only."""
    entry, size = _BASE + _HEADERS_BYTES, _HEADERS_BYTES + len(body)
    identification = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = identification + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + body
