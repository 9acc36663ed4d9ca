"""Every courier that a service runs, found in the services as they are built: what hangs delays nothing else. F10.

The service runs alone, with its own deliveries; in the place of its children stand servers that answer everything, or
never answer what is about certain entities.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from branchline.v1.history_pb2 import HistoryEvent
from branchline_internal.github_data.v1 import github_data_pb2
from branchline_internal.history.v1 import history_pb2
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.sandbox.v1 import sandbox_pb2
from branchline_internal.task.v1 import task_pb2
from branchline_internal.user.v1 import user_pb2
from google.protobuf.message import Message

from cli.installation import SERVICES, Installation, local_installation
from cli.settings import Addresses, Settings
from services.runtime.service import Service
from services.runtime.spine.courier import BatchCourier, Courier
from services.runtime.spine.outbox import Mark
from tests.support.databases import installed
from tests.support.stack import eventually

HANGS = "hangs"
HANGING = 100
"""Entities of each kind that hang: more than a courier has deliveries under way at once."""

SECONDS = 15.0
"""Longer than any delivery takes, shorter than the deadline of one that hangs."""

CARRIED: dict[tuple[str, str], Sequence[type[Message]]] = {
    ("organization", "repository"): (
        repository_pb2.EnsureRepositoryRequest,
        repository_pb2.DeleteRepositoryRequest,
    ),
    ("organization", "user"): (user_pb2.MarkUnreadRequest, user_pb2.ForgetTaskStatesRequest),
    ("organization", "github_data"): (
        github_data_pb2.SyncOrganizationRequest,
        github_data_pb2.DeleteOrganizationRequest,
    ),
    ("organization", "history"): (HistoryEvent, history_pb2.DeleteFeedRequest),
    ("repository", "task"): (
        task_pb2.CreateTaskRequest,
        task_pb2.DeleteTaskRequest,
        task_pb2.SetPullRequestRequest,
    ),
    ("task", "sandbox"): (
        sandbox_pb2.CancelTurnRequest,
        sandbox_pb2.AnswerInputRequest,
        sandbox_pb2.CloseSessionRequest,
        sandbox_pb2.DestroySandboxRequest,
        sandbox_pb2.ForgetTaskRequest,
    ),
    ("task", "workflow"): (),
}
"""What each courier carries. A start of a turn is asked for again by the task itself: see its own tests. A workflow
is started in the task's own database."""

LANES = [edge for edge, carried in CARRIED.items() if carried and edge[1] != "history"]


@dataclass
class Child(grpc.GenericRpcHandler):  # pyright: ignore[reportMissingTypeArgument] - it takes none when it runs
    """Answers every call with an empty message; or never, if it is about something that hangs."""

    hangs: bool = False
    """Whether it never answers anything."""

    got: list[bytes] = field(default_factory=list[bytes])

    def service(self, handler_call_details: Any) -> Any:
        return cast("Any", grpc).unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, data: bytes, _context: Any) -> bytes:
        if self.hangs or HANGS.encode() in data:
            await asyncio.Event().wait()
        self.got.append(data)
        return b""


@asynccontextmanager
async def alone(folder: Path, name: str) -> AsyncGenerator[tuple[Service, dict[str, Child]], None]:
    """Run one service of an installation; in the place of all others stand servers of the test."""
    installation = installation_in(folder)
    children = {other: Child() for other in SERVICES if other not in {name, "gateway"}}
    async with AsyncExitStack() as stack:
        for other, child in children.items():
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((child,))
            server.add_insecure_port(installation.addresses[other])
            await server.start()
            stack.push_async_callback(server.stop, 0)
        service = installation.build(name)
        await stack.enter_async_context(service.running())
        yield service, children


def installation_in(folder: Path) -> Installation:
    given: dict[str, Any] = {"addresses": Addresses(gateway="127.0.0.1:0"), "sandbox": {"local": {"isolation": "none"}}}
    return local_installation(Settings(data_dir=folder, databases=installed(), **given))


def couriers(service: Service) -> dict[str, Courier | BatchCourier]:
    """Return the couriers of a service by their destinations."""
    owners = [getattr(loop, "__self__", None) for loop in service.loops]
    return {one.destination: one for one in owners if isinstance(one, Courier | BatchCourier)}


def about(entity_id: str, kind: type[Message], destination: str) -> Mark:
    """Return a mark whose state names an entity in whatever of its fields may."""
    state = kind()
    name_all(state, entity_id)
    return Mark(entity_id, 1, state, destination)


def name_all(message: Message, entity_id: str) -> None:
    for one in message.DESCRIPTOR.fields:
        if one.is_repeated:
            continue
        if one.type == one.TYPE_STRING:
            setattr(message, one.name, entity_id)
        elif one.message_type is not None and one.name in {"repository", "task"}:
            name_all(getattr(message, one.name), entity_id)


async def arrived(child: Child, names: Sequence[str]) -> None:
    """Wait until a child got something about each of some entities."""

    async def look() -> bool:
        return all(any(name.encode() in data for data in child.got) for name in names)

    try:
        await eventually(look, SECONDS)
    except TimeoutError as error:
        missing = [name for name in names if not any(name.encode() in data for data in child.got)]
        raise AssertionError(f"not delivered: {missing}") from error


async def test_every_courier_is_tested_here(tmp_path: Path) -> None:
    installation = installation_in(tmp_path)
    built = {name: installation.build(name) for name in SERVICES}

    found = {(name, destination) for name, service in built.items() for destination in couriers(service)}

    assert found == set(CARRIED)
    for service in built.values():
        for clean in service.after_stop:
            await clean()


@pytest.mark.parametrize(("name", "destination"), LANES)
async def test_entities_that_hang_delay_no_other_on_their_courier(
    tmp_path: Path, name: str, destination: str
) -> None:  # F10
    kinds = CARRIED[name, destination]
    async with alone(tmp_path, name) as (service, children):
        outbox = couriers(service)[destination].outbox
        stuck = [about(f"{HANGS}_{n}_{kind.__name__}", kind, destination) for n in range(HANGING) for kind in kinds]
        await outbox.database.write(outbox.mark, stuck)
        await asyncio.sleep(0.1)  # they are under way
        others = [about(f"other_{n}_{kind.__name__}", kind, destination) for n in range(12) for kind in kinds]
        await outbox.database.write(outbox.mark, others)

        await arrived(children[destination], [mark.entity_id for mark in others])

        assert (await outbox.counts())[1] == 0


@pytest.mark.parametrize("name", sorted({name for name, _ in CARRIED}))
async def test_a_child_that_hangs_delays_no_other_child(tmp_path: Path, name: str) -> None:  # F10
    carried = {to: kinds for (owner, to), kinds in CARRIED.items() if owner == name and kinds}
    async with alone(tmp_path, name) as (service, children):
        found = couriers(service)
        for hanging in carried:
            for child in children.values():
                child.hangs, child.got = False, []
            children[hanging].hangs = True
            for destination, kinds in carried.items():
                marks = [about(f"{hanging}_{destination}_{kind.__name__}", kind, destination) for kind in kinds]
                await found[destination].outbox.database.write(found[destination].outbox.mark, marks)
            for destination, kinds in carried.items():
                if destination != hanging:
                    await arrived(children[destination], [f"{hanging}_{destination}_{one.__name__}" for one in kinds])
