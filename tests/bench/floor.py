"""The floor: what any such pipeline must do, and nothing else.

A coordinator of the floor takes batches on a stream, commits them with one upsert per row, passes the
bytes on to its own coordinator and to whoever watches, and acknowledges. Its gateway passes on what it gets.
"""

import argparse
import asyncio
import contextlib
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psycopg
import uvloop
from branchline_internal.spine.v1.push_pb2 import PushRequest, PushResponse

PUSH, WATCH, STREAM, GET, PUT, HANG = (f"/floor/{name}" for name in ("Push", "Watch", "Stream", "Get", "Put", "Hang"))
OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 1024 * 1024))

_PUT = (
    "INSERT INTO entities VALUES (?, ?, ?) ON CONFLICT (id)"
    " DO UPDATE SET revision = excluded.revision, payload = excluded.payload"
)

Context = grpc.aio.ServicerContext[Any, Any]


class Store:
    """Rows behind one writer thread: a SQLite file with write-ahead log and synchronous=FULL as ours, or psycopg."""

    def __init__(self, database: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._kind = "BYTEA" if database.startswith("postgresql:") else "BLOB"
        if self._kind == "BYTEA":
            self._connection: Any = psycopg.connect(database, autocommit=True, prepare_threshold=0)
            self._cursor: Any = self._connection.cursor()
        else:
            self._connection = self._cursor = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
        self._put = _PUT if self._kind == "BLOB" else _PUT.replace("?", "%s")
        self._connection.execute(
            f"CREATE TABLE IF NOT EXISTS entities (id TEXT PRIMARY KEY, revision INTEGER, payload {self._kind})"
        )

    async def commit(self, rows: list[tuple[str, int, bytes]]) -> None:
        """Write the rows in one transaction."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, rows)

    def _commit(self, rows: list[tuple[str, int, bytes]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE" if self._kind == "BLOB" else "BEGIN")
        self._cursor.executemany(self._put, rows)
        self._connection.execute("COMMIT")


class Pusher:
    """The lower end of a stream: batches up in order, a bounded number of them unacknowledged."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._window = asyncio.Semaphore(4)
        call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(PUSH)
        self._call = call(self._batches())
        self._acknowledged = asyncio.create_task(self._acknowledge())

    def push(self, batch: bytes) -> None:
        """Send a batch when the window allows."""
        self._queue.put_nowait(batch)

    async def close(self) -> None:
        """End the stream."""
        self._call.cancel()
        self._acknowledged.cancel()
        await asyncio.wait([self._acknowledged])

    async def _batches(self) -> AsyncIterator[bytes]:
        while True:
            batch = await self._queue.get()
            await self._window.acquire()
            yield batch

    async def _acknowledge(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # the server ends
            async for _ in self._call:
                self._window.release()


class Server:
    """A coordinator (with a store) or a gateway (without) of the floor."""

    def __init__(self, store: Store | None, upstream: str) -> None:
        self._store = store
        self._upstream = upstream
        self._watchers: set[asyncio.Queue[bytes]] = set()
        self._pusher: Pusher | None = None
        self._next: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}
        self._next_stream: Any = None

    async def run(self, listen: str) -> None:
        """Serve until the process is told to stop."""
        server = grpc.aio.server(options=OPTIONS)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Push": grpc.stream_stream_rpc_method_handler(self.push),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "Get": grpc.unary_unary_rpc_method_handler(self.get),
            "Put": grpc.unary_unary_rpc_method_handler(self.put),
            "Hang": grpc.unary_unary_rpc_method_handler(self.hang),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
        server.add_insecure_port(listen)
        await server.start()
        following = None
        if self._upstream:
            channel = grpc.aio.insecure_channel(self._upstream, options=OPTIONS)
            await channel.channel_ready()
            if self._store:
                self._pusher = Pusher(channel)
            else:
                self._next = {method: channel.unary_unary(method) for method in (GET, PUT, HANG)}
                self._next_stream = channel.unary_stream(STREAM)
                following = asyncio.create_task(self._follow(channel))
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()
        if following:
            following.cancel()
        await server.stop(0)

    async def push(self, batches: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Commit, pass on, acknowledge."""
        assert self._store
        async for batch in batches:
            request = PushRequest.FromString(batch)
            await self._store.commit([(entry.id, entry.revision, entry.state.value) for entry in request.entries])
            if self._pusher:
                self._pusher.push(batch)
            self._publish(batch)
            yield PushResponse(batch=request.batch).SerializeToString()

    async def watch(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Pass on whatever comes."""
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield b""
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def stream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Stream a number of messages of a size: from upstream, or from here."""
        if self._next_stream:
            async for message in self._next_stream(request):
                yield message
            return
        count, size = map(int, request.split())
        message = bytes(size)
        for _ in range(count):
            yield message

    async def get(self, request: bytes, context: Context) -> bytes:
        """Return as many bytes as asked for: from upstream, or from here."""
        return await self._next[GET](request) if self._next else bytes(int(request))

    async def put(self, request: bytes, context: Context) -> bytes:
        """Commit a row of its own and answer: upstream, or here."""
        if self._next:
            return await self._next[PUT](request)
        assert self._store
        await self._store.commit([(request[:36].decode(), 1, request)])
        return b""

    async def hang(self, request: bytes, context: Context) -> bytes:
        """Answer only after a minute: upstream, or here."""
        if self._next:
            return await self._next[HANG](request)
        await asyncio.sleep(60)
        return b""

    async def _follow(self, channel: grpc.aio.Channel) -> None:
        watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(WATCH)
        async for batch in watch(b""):
            if batch:
                self._publish(batch)

    def _publish(self, batch: bytes) -> None:
        for queue in self._watchers:
            queue.put_nowait(batch)


def main() -> None:
    """Run one server of the floor."""
    parser = argparse.ArgumentParser()
    parser.add_argument("listen")
    parser.add_argument("--database", default="")
    parser.add_argument("--upstream", default="")
    given = parser.parse_args()
    store = Store(given.database) if given.database else None
    uvloop.run(Server(store, given.upstream).run(given.listen))


if __name__ == "__main__":
    main()
