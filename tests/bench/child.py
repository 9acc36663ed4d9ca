"""A child as every service is one: rows of its own, an outbox, a push stream to its coordinator."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from branchline_internal.spine.v1.push_pb2_grpc import PushServiceStub
from google.protobuf.message import Message

from services.runtime.client import open_channel
from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, Tx, open_database, upsert
from services.runtime.principal import Signer
from services.runtime.spine.outbox import COORDINATOR, Mark, Outbox
from services.runtime.spine.push import PushClient
from tests.bench.write import entities, metadata
from tests.support.databases import engine_of

_PUT = Statement(upsert(entities, ["id"], newer="revision"))
_ARRIVAL_SECONDS = 300.0


class Child:
    """Changes entities and pushes them up."""

    def __init__(self, database: Database) -> None:
        self.outbox = Outbox(database, Clock())
        self._database = database

    async def commit(self, states: Sequence[Any]) -> None:
        """Store states of entities and mark them for the coordinator."""
        rows = [{"id": one.id, "revision": one.revision, "payload": one.SerializeToString()} for one in states]
        marks = [Mark(one.id, one.revision, one) for one in states]
        await self._database.write(_commit, self.outbox, rows, marks)

    async def push_all(self, states: Sequence[Message]) -> None:
        """Commit states, and wait until the coordinator has them."""
        await self.commit(states)
        last: Any = states[-1]
        await self.outbox.await_delivery(COORDINATOR, last.id, _ARRIVAL_SECONDS)


def _commit(tx: Tx, outbox: Outbox, rows: Sequence[dict[str, Any]], marks: Sequence[Mark]) -> None:
    tx.change_many(_PUT, rows)
    outbox.mark(tx, marks)


@asynccontextmanager
async def child(url: str, name: str, coordinator: str, address: str, key: str) -> AsyncGenerator[Child, None]:
    """Run a child that has its rows in a database and pushes to a coordinator at its address."""
    metadata.create_all(engine_of(url))
    database = open_database(url)
    await database.start()
    channel = open_channel(coordinator, address, Signer(key, name))
    stub: Any = PushServiceStub(channel)  # pyright: ignore[reportArgumentType]
    made = Child(database)
    pushing = asyncio.create_task(PushClient(made.outbox, stub, name).run())
    try:
        yield made
    finally:
        pushing.cancel()
        await asyncio.wait([pushing])
        await channel.close()
        await database.close()
