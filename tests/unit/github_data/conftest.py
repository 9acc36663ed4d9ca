"""The parts of github-data over a real database, and a server that speaks the little of GitHub's REST API they read."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from branchline.v1.organizations_pb2 import GithubStatus
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from githubkit import GitHub
from google.protobuf.message import Message
from sqlalchemy import select

from services.github_data.reading import Account
from services.github_data.store import GithubStore
from services.github_data.sync import GithubSync
from services.runtime.clock import Clock
from services.runtime.database import Database, Reader, Statement, open_database
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.tables import outbox as outbox_table
from tests.support.databases import migrated

_MARKED = Statement(select(outbox_table).order_by(outbox_table.c.seq))


@dataclass
class FakeGithub:
    """One repository "shop" in every account; what is asked of a slow account waits."""

    url: str = ""
    branches: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    slow: set[str] = field(default_factory=set[str])
    broken: set[str] = field(default_factory=set[str])
    release: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list[str])

    def answer(self, path: str) -> tuple[int, Any]:
        """Answer a GET."""
        parts = path.partition("?")[0].strip("/").split("/")
        login = parts[1]
        self.asked.append(path)
        if login in self.slow:
            self.release.wait(30)
        if login in self.broken:
            return 200, {"what": "is this"}
        if parts[0] == "orgs":
            shop = {"id": 7, "name": "shop", "full_name": f"{login}/shop", "clone_url": f"https://x/{login}/shop.git"}
            return 200, [shop | {"default_branch": "main"}]
        return 200, self.branches if parts[-1] == "branches" else []


@pytest.fixture
def github() -> Generator[FakeGithub, None, None]:
    fake = FakeGithub(branches=[{"name": "main", "commit": {"sha": "a" * 40}}])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = fake.answer(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    fake.release.set()
    server.shutdown()
    server.server_close()


@dataclass
class Room:
    """The parts of a github-data service."""

    database: Database
    store: GithubStore
    sync: GithubSync

    async def want(self, organization_id: str, login: str) -> None:
        await self.database.write(self.store.want_sync, organization_id, login)
        self.sync.wanted.notify()

    async def marked(self, message: type[Message]) -> list[Any]:
        rows = await self.database.read(Reader.rows, _MARKED)
        name = message.DESCRIPTOR.full_name
        return [message.FromString(row.payload) for row in rows if row.type_url.endswith("/" + name)]

    async def status(self, organization_id: str, revision: int = 1) -> GithubStatus:
        """Return how a sync ended, once it has."""
        async with asyncio.timeout(20):
            while True:
                for status in await self.marked(GithubStatus):
                    if status.organization_id == organization_id and status.revision >= revision:
                        return status
                await asyncio.sleep(0.01)

    async def repositories(self) -> dict[str, GithubRepository]:
        return {one.organization_id: one for one in await self.marked(GithubRepository)}


@pytest_asyncio.fixture
async def room(tmp_path: Path, github: FakeGithub) -> AsyncGenerator[Room, None]:
    database, clock = open_database(migrated("github_data", tmp_path)), Clock()
    await database.start()
    store = GithubStore(Outbox(database, clock))
    kit = GitHub(base_url=github.url, timeout=30.0, auto_retry=False)
    room = Room(database, store, GithubSync(database, store, clock, lambda login: Account(kit, login), 20.0))
    syncing = asyncio.create_task(room.sync.run())
    yield room
    github.release.set()
    syncing.cancel()
    await asyncio.wait({syncing})
    await database.close()
