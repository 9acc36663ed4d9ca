"""Reaches places beyond the door.

Names are looked up in threads of their own: people choose them, and their name servers may not answer. An address is
dialled only if it is public or named by the operator, and never this host itself.
Source: RFC 8305 (Happy Eyeballs), for places with several addresses.
"""

import asyncio
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohappyeyeballs

from services.sandbox.door.config import DoorConfig
from services.sandbox.door.destinations import Place, named, public

_THREADS = 16
_NAMES_AT_A_TIME = 4
"""Of one sandbox."""

_NEXT_ADDRESS_SECONDS = 0.25
READ_BYTES = 64 * 1024
NO_WAY = 421  # Misdirected Request; git would take a 403 for one of the remote's, about its credentials

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Found = list[tuple[int, int, int, str, tuple[Any, ...]]]
"""As getaddrinfo(3) returns."""


class Refused(Exception):
    """A request is not done; status and words are what the sandbox is told."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(slots=True)
class Dialler:
    """Connects to places for all sandboxes."""

    config: DoorConfig
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_THREADS, "names"))
    _asked: dict[Place, asyncio.Future[Found]] = field(default_factory=dict[Place, asyncio.Future[Found]])
    _asking: Counter[str] = field(default_factory=Counter[str])

    def close(self) -> None:
        """Wait for no name any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def reach(self, place: Place, sandbox_id: str) -> Ends:
        """Connect to a place for a sandbox. Raise Refused if it is inside, or nobody is there."""
        try:
            async with asyncio.timeout(self.config.head_seconds):
                found = await asyncio.shield(self._asked.get(place) or self._look_up(place, sandbox_id))
                open_to = [one for one in found if self._is_open(str(one[4][0]))]
                if not open_to:
                    words = f"{place} is at {found[0][4][0]}, which is not public: see sandbox.door.private_networks"
                    raise Refused(NO_WAY, words)
                end = await aiohappyeyeballs.start_connection(open_to, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS)
                return await asyncio.open_connection(sock=end, limit=READ_BYTES)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise Refused(502, f"{place} is not reached: {str(error) or 'it takes too long'}") from error

    def _is_open(self, address: str) -> bool:
        return named(self.config, address) or (public(address) and not is_here(address))

    def _look_up(self, place: Place, sandbox_id: str) -> asyncio.Future[Found]:
        """Ask for the addresses of a place. Raise Refused if a sandbox asks for too many at a time."""
        if self._asking[sandbox_id] >= _NAMES_AT_A_TIME:
            raise Refused(429, f"a sandbox may have {_NAMES_AT_A_TIME} names looked up at a time")
        self._asking[sandbox_id] += 1

        def done(asked: asyncio.Future[Found]) -> None:
            """Whoever asked may have gone; the thread was busy all the same."""
            with suppress(asyncio.CancelledError):
                asked.exception()
            del self._asked[place]
            self._asking[sandbox_id] -= 1
            if not self._asking[sandbox_id]:
                del self._asking[sandbox_id]

        loop = asyncio.get_running_loop()
        asked = self._asked[place] = loop.run_in_executor(self._threads, _addresses, place)
        asked.add_done_callback(done)
        return asked


def _addresses(place: Place) -> Found:
    return [*socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)]


def is_here(address: str) -> bool:
    """Say whether an address is one of this host: what it sends there would come from there. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as end:
        try:
            end.connect((address, 9))
        except OSError:  # there is no way there, as dialling will show
            return False
        return str(end.getsockname()[0]) == address
