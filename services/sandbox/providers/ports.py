"""Ports for servers that others will dial: outside the range from which the kernel takes ports for dialling."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL = (32768, 60999)
_LOWEST, _HIGHEST = 20000, 65535
_TRIES = 64


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
