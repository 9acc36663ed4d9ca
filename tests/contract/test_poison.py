"""Whatever a child pushes, the edge lives on: the entry is taken or refused, its neighbours are taken. F9, F23."""

import asyncio
from collections.abc import Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.organizations_pb2 import GithubStatus
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.sandboxes_pb2 import Sandbox
from branchline.v1.sessions_pb2 import Session
from branchline.v1.tasks_pb2 import Task, TaskSummary
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline.v1.users_pb2 import User, UserTaskState
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentSession
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from branchline_internal.user.v1.user_pb2 import ApiTokenState
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.installation import Installation, local_installation
from cli.settings import Settings
from services.runtime.client import open_channel
from services.runtime.principal import Signer
from tests.support.databases import installed
from tests.support.messages import messages

UNCHECKED = cast("list[HealthCheck]", list(HealthCheck))
EDGES: dict[str, tuple[type[Message], ...]] = {
    "organization": (
        User,
        ApiTokenState,
        TaskSummary,
        Repository,
        GithubRepository,
        GithubStatus,
        HistoryEvent,
        UserTaskState,
    ),
    "repository": (Task, Session, Sandbox, TranscriptEntry, HistoryEvent),
    "task": (Sandbox, TranscriptEntry, AgentSession),
}
GOOD: dict[str, Message] = {
    "organization": User(id="usr_good", display_name="Good", revision=1),
    "repository": HistoryEvent(id="evt_good", organization_id="org_1"),
    "task": Sandbox(id="sbx_good", task_id="task_unknown", revision=1),
}


class Edge:
    """A coordinator alone, and a child that pushes whatever it is told to."""

    def __init__(self, name: str, installation: Installation) -> None:
        self.name = name
        self._installation = installation
        self._numbers = iter(range(1, 10**9))
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._call: Any = None

    def open(self) -> None:
        self._runner.run(self._open())

    async def _open(self) -> None:
        await self._stack.enter_async_context(self._installation.build(self.name).running())
        key = self._installation.signing_key.value
        channel = open_channel(self.name, self._installation.addresses[self.name], Signer(key, "child"))
        self._stack.push_async_callback(channel.close)
        self._call = push_pb2_grpc.PushServiceStub(cast("Any", channel)).Push()

    def push(self, entries: list[push_pb2.PushEntry]) -> push_pb2.PushResponse:
        return self._runner.run(self._push(entries))

    async def _push(self, entries: list[push_pb2.PushEntry]) -> push_pb2.PushResponse:
        for entry in entries:
            entry.outbox_seq = next(self._numbers)
        request = push_pb2.PushRequest(child="child", batch=next(self._numbers), entries=entries)
        async with asyncio.timeout(20):
            await self._call.write(request)
            return await self._call.read()

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


@pytest.fixture(scope="module", params=sorted(EDGES))
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Edge, None, None]:
    folder: Path = tmp_path_factory.mktemp("edge")
    opened = Edge(request.param, local_installation(Settings(data_dir=folder / "data", databases=installed())))
    opened.open()
    yield opened
    opened.close()


def entry(state: Message, entity_id: str = "good", revision: int = 1, *, deleted: bool = False) -> push_pb2.PushEntry:
    made = push_pb2.PushEntry(id=entity_id, revision=revision, deleted=deleted)
    made.state.Pack(state)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=UNCHECKED)
@given(data=st.data())
def test_no_entry_stops_an_edge_or_its_neighbours(edge: Edge, data: st.DataObject) -> None:
    poison = data.draw(st.lists(st.one_of(*(messages(kind) for kind in EDGES[edge.name])), min_size=1, max_size=4))
    revisions = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
    entries = [
        entry(
            state,
            data.draw(st.sampled_from(["", "a", "x" * 5000])),
            data.draw(revisions),
            deleted=data.draw(st.booleans()),
        )
        for state in poison
    ]
    place = data.draw(st.integers(0, len(entries)))
    entries.insert(place, entry(GOOD[edge.name]))

    answer = edge.push(entries)

    assert entries[place].outbox_seq not in {refused.outbox_seq for refused in answer.rejected}


@given(raw=st.binary(max_size=64))
@settings(max_examples=20, deadline=None, suppress_health_check=UNCHECKED)
def test_bytes_that_are_no_message_are_refused_alone(edge: Edge, raw: bytes) -> None:
    garbled = push_pb2.PushEntry(id="a", revision=1)
    garbled.state.type_url = f"type.googleapis.com/{EDGES[edge.name][0].DESCRIPTOR.full_name}"
    garbled.state.value = raw + b"\xff"
    unknown = push_pb2.PushEntry(id="a", revision=1)
    unknown.state.type_url = "type.googleapis.com/nobody.knows.This"
    good = entry(GOOD[edge.name])

    refused = {one.outbox_seq for one in edge.push([garbled, unknown, good]).rejected}

    assert unknown.outbox_seq in refused
    assert good.outbox_seq not in refused
