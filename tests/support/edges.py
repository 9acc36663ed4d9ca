"""One edge of the tree in this process, over real gRPC: a child, a coordinator that restarts, a proxy that cuts."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.tasks_pb2 import Task
from branchline_internal.spine.v1 import push_pb2_grpc
from sqlalchemy import MetaData, bindparam, select

from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, Tx, insert, open_database
from services.runtime.retry import Backoff
from services.runtime.spine.index import Entry, Index, IndexTable
from services.runtime.spine.ingest import Handler, Ingest, Pushed, PushServicer, each
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.push import PushClient
from services.runtime.spine.tables import add_spine_tables, index_table

TASK = ENTITY_KIND_TASK
SCOPE = "org_1"

metadata = MetaData()
add_spine_tables(metadata, coordinator=True, commands=True)
tasks = index_table("tasks", metadata, comment="Coordinator index of a test")

_INSERT = Statement(insert(tasks))
_HELD = Statement(
    select(tasks.c.id, tasks.c.revision)
    .where(tasks.c.scope == bindparam("scope"), tasks.c.deleted.is_(False))
    .order_by(tasks.c.id)
)
_CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.default_authority", "localhost"),
)


async def eventually(look: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Look until it is so."""
    async with asyncio.timeout(seconds):
        while not await look():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.01)


async def cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


@dataclass
class Coordinator:
    """The upper end of an edge; it can go away and come back at the same address with the same database."""

    url: str
    socket: Path
    bad: str = "bad"
    """Title-less name of the entity whose handler raises."""

    raises: Exception | None = None
    """What it raises; nothing: what the database does when a key is taken."""

    applied: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Index, None]:
        self.database = open_database(self.url)
        await self.database.start()
        self.index = Index(self.database, [IndexTable(TASK, tasks, Task)], Clock())
        await self.index.start()
        self.ingest = Ingest(self.database, Handler(Task, each(self._apply)))
        server = grpc.aio.server()
        push_pb2_grpc.add_PushServiceServicer_to_server(PushServicer(self.ingest), server)
        self.socket.unlink(missing_ok=True)
        server.add_insecure_port(self.address)
        await server.start()
        try:
            yield self.index
        finally:
            await server.stop(None)
            await self.database.close()

    def _apply(self, tx: Tx, pushed: Pushed[Task]) -> None:
        entry = Entry(TASK, SCOPE, pushed.id, pushed.revision, pushed.state, deleted=pushed.deleted)
        if pushed.id == self.bad:
            self.index.put(tx, entry)
            if self.raises is not None:
                raise self.raises
            self.index.put(tx, entry)
            tx.change(_INSERT, _taken(pushed.id))
        if self.index.put(tx, entry):
            tx.after_commit(lambda: self.applied.append((pushed.id, pushed.revision)))

    async def held(self) -> dict[str, int]:
        return await self.database.read(lambda tx: dict(tx.rows(_HELD, {"scope": SCOPE})))


def _taken(name: str) -> dict[str, Any]:
    empty = {"change_time": 0.0, "deleted": False, "payload": b"", "viewer_id": "", "task_id": ""}
    return {"scope": SCOPE, "id": name, "revision": 1, "change_seq": 1, **empty}


@dataclass
class Child:
    """The lower end of an edge."""

    database: Database
    outbox: Outbox
    pushing: "asyncio.Task[None]"

    async def change(self, *states: tuple[str, int], title: str = "fine", deleted: bool = False) -> None:
        marks = [
            Mark(name, revision, Task(id=name, revision=revision, title=title), deleted=deleted)
            for name, revision in states
        ]
        await self.database.write(self.outbox.mark, marks)


@asynccontextmanager
async def running_child(url: str, address: str) -> AsyncGenerator[Child, None]:
    database = open_database(url)
    await database.start()
    outbox = Outbox(database, Clock())
    channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
    client = PushClient(outbox, push_pb2_grpc.PushServiceStub(channel), "child", Backoff(0.01, 0.1))
    pushing = asyncio.create_task(client.run())
    try:
        yield Child(database, outbox, pushing)
    finally:
        await cancelled(pushing)
        await channel.close()
        await database.close()


@dataclass
class Proxy:
    """Passes bytes from one socket to another until it is told to cut."""

    socket: Path
    target: str
    connections: int = 0
    _passing: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        for passing in self._passing:
            passing.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Proxy", None]:
        server = await asyncio.start_unix_server(self._connected, self.socket)
        try:
            yield self
        finally:
            server.close()
            self.cut()

    async def _connected(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._pass(near, back))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _pass(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_unix_connection(self.target.removeprefix("unix:"))
        except OSError:
            back.close()
            return
        try:
            with suppress(OSError):
                await _first(_copy(near, forth), _copy(far, back))
        finally:
            for writer in (back, forth):
                writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def _first(*works: Any) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
