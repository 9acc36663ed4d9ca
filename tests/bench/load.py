"""A client that misbehaves, in a process of its own: the same one for us and for the floor.

python -m tests.bench.load calls ADDRESS METHOD REQUEST PER_SECOND [TOKEN]
python -m tests.bench.load streams ADDRESS METHOD REQUEST PER_SECOND [TOKEN [MOST]]
python -m tests.bench.load deaf ADDRESS METHOD REQUEST COUNT [TOKEN]

REQUEST is in hexadecimal digits; MOST is after how many messages a stream is left, if it has not ended before.
It prints a line once it has begun, and goes on until it is killed.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import uvloop

from tests.bench.floor import OPTIONS

_TICK_SECONDS = 0.01
_MOST_RUNNING = 4000
_CHANNELS = 10
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)

Metadata = tuple[tuple[str, str], ...]
UnaryCall = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
StreamCall = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]


class Load:
    """Makes calls of one method with the same bytes."""

    def __init__(self, address: str, method: str, request: bytes, metadata: Metadata, most: int) -> None:
        self._channels = [
            grpc.aio.insecure_channel(address, options=OPTIONS + _OWN_CONNECTION) for _ in range(_CHANNELS)
        ]
        self._method, self._request, self._metadata, self._most = method, request, metadata, most

    async def calls(self, per_second: float) -> None:
        """Make unary calls, whatever becomes of those before."""
        made = itertools.cycle(self._unary_calls())
        await _keep_starting(per_second, lambda: self._unary(next(made)))

    async def streams(self, per_second: float) -> None:
        """Open streams and read them to their end."""
        made = itertools.cycle(self._stream_calls())
        await _keep_starting(per_second, lambda: self._stream(next(made)))

    async def deaf(self, count: float) -> None:
        """Open streams and never read from them."""
        made = itertools.cycle(self._stream_calls())
        calls = [next(made)(self._request, metadata=self._metadata) for _ in range(int(count))]
        await asyncio.gather(*(call.wait_for_connection() for call in calls))
        print("begun", flush=True)
        await asyncio.Event().wait()

    def _unary_calls(self) -> list[UnaryCall]:
        return [channel.unary_unary(self._method) for channel in self._channels]

    def _stream_calls(self) -> list[StreamCall]:
        return [channel.unary_stream(self._method) for channel in self._channels]

    async def _unary(self, call: UnaryCall) -> None:
        await call(self._request, metadata=self._metadata)

    async def _stream(self, call: StreamCall) -> None:
        stream = call(self._request, metadata=self._metadata)
        count = 0
        async for _ in stream:
            count += 1
            if count == self._most:
                stream.cancel()


async def _keep_starting(per_second: float, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    started = 0
    print("begun", flush=True)
    while True:
        while started < (time.monotonic() - began) * per_second:
            started += 1
            if len(running) < _MOST_RUNNING:
                task = asyncio.create_task(start())
                running.add(task)
                task.add_done_callback(lambda done: (running.discard(done), done.cancelled() or done.exception()))
        await asyncio.sleep(_TICK_SECONDS)


async def main() -> None:
    """Run one load."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["calls", "streams", "deaf"])
    parser.add_argument("address")
    parser.add_argument("method")
    parser.add_argument("request", type=bytes.fromhex)
    parser.add_argument("amount", type=float)
    parser.add_argument("token", nargs="?", default="")
    parser.add_argument("most", nargs="?", type=int, default=0)
    given = parser.parse_args()
    metadata = (("authorization", f"Bearer {given.token}"),) if given.token else ()
    await getattr(Load(given.address, given.method, given.request, metadata, given.most), given.kind)(given.amount)


if __name__ == "__main__":
    uvloop.run(main())
