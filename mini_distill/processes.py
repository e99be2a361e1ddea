"""Which process, on which host, and whether it still lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_host() -> str:
    """The host's name, as part of a file name."""
    return socket.gethostname().replace("/", "_")


def is_alive(pid: int, process_start: str = "") -> bool:
    """Whether process `pid` lives on this host and, where both are known, is the one that started at `process_start`."""
    if pid <= 0:
        return False  # to the kernel these are groups of processes
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # another user's
    except (ProcessLookupError, OverflowError):
        return False
    now = process_start_of(pid)
    return now is not None and (not process_start or not now or now == process_start)


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, Ctrl-Z); where /proc does not tell, no."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def this_machine() -> str:
    """The same for processes that see each other's numbers; where /proc does not tell, of this process alone.

    Not the host's name: containers of one host may share it, and machines made from one image too.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{this_host()} {os.getpid()}"


def process_start_of(pid: int) -> str | None:
    """Boot and clock tick at which a process started; empty where /proc does not tell; None for a zombie, which is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def children_of(pid: int, name: str) -> list[int]:
    """The processes called `name` that `pid` has started and not yet waited for; none where /proc does not tell."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            start, _, fields = file.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        if start.partition("(")[2] == name and fields.split()[1] == str(pid):
            found.append(int(file.parent.name))
    return found
