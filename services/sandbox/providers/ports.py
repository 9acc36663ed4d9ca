"""Ports for servers that others will dial: outside the range from which the kernel takes ports for dialling.

Source of what listens: proc_net_tcp in the kernel's documentation.
"""

import random
import socket
from dataclasses import dataclass
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL = (32768, 60999)
_LISTENING = Path("/proc/net/tcp")
_LISTEN = b"0A"
_LOWEST, _HIGHEST = 20000, 65535
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Listener:
    """Who takes the connections to a port of 127.0.0.1."""

    user_id: int
    inode: int
    """Of the socket."""


def ephemeral_range() -> tuple[int, int]:
    """Return the first and last port that the kernel gives to those who dial."""
    try:
        first, last = map(int, _RANGE.read_text().split())
    except (OSError, ValueError):
        return _USUAL
    return first, last


def free_port() -> int:
    """Return a port that is free now and that nobody will be given for dialling. Raise OSError if none is found."""
    first, last = ephemeral_range()
    ports = [port for port in range(_LOWEST, _HIGHEST + 1) if not first <= port <= last] or range(_LOWEST, _HIGHEST)
    for port in random.sample(ports, min(_TRIES, len(ports))):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port was found for a sandbox")


def listener(port: int) -> Listener | None:
    """Return who listens at a port of 127.0.0.1 itself: while somebody does, nobody else can."""
    local = f"0100007F:{port:04X}".encode()
    for line in _LISTENING.read_bytes().splitlines():
        fields = line.split()
        if fields[1] == local and fields[3] == _LISTEN:
            return Listener(int(fields[7]), int(fields[9]))
    return None
