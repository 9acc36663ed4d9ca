import socket
from collections.abc import Sequence
from typing import Any

async def start_connection(
    addr_infos: Sequence[tuple[int, int, int, str, tuple[Any, ...]]], *, happy_eyeballs_delay: float | None = None
) -> socket.socket: ...
