"""Ports for programs that cannot be told to take any: outside the range that the kernel gives to whoever dials."""

import random
import socket
from pathlib import Path

_LOWEST = 20_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_KERNEL_DEFAULT = 32_768


def free_port() -> int:
    """Return a port of this host that nothing listens on, and that no connection out of it will take."""
    highest = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _KERNEL_DEFAULT
    while True:
        port = random.randrange(_LOWEST, highest)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
