"""The public watches: replicas of the coordinators' indexes, seen and filtered for the caller."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.v1 import history_pb2, organizations_pb2, tasks_pb2
from branchline.v1.sessions_pb2 import TranscriptEntry
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_SESSION, ENTITY_KIND_TRANSCRIPT_ENTRY
from branchline.v1.watches_pb2 import WatchChange, WatchFrame
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.spine.v1.push_pb2 import WatchSelection

from gateway.caller import Authenticator, Caller, current_caller
from gateway.fanout import FanOut
from gateway.placement import Placement
from gateway.replica import Upstream, View
from services.runtime.principal import Principal, Signer
from services.runtime.serving import Context
from services.runtime.spine.tokens import parse_consistency_token, parse_resume_token
from services.runtime.spine.watch import Watch, watch

Visible = Callable[[WatchChange], bool]
Metadata = tuple[tuple[str, str], ...]
Ask = Callable[[WatchSelection, Metadata | None], Any]
"""Opens a coordinator's watch, in the gateway's own name or in that of the caller."""

CHECK_SECONDS = 5.0
"""How often it is asked whether a caller may still watch."""

STALLED_SECONDS = 60.0
"""How long a frame may wait to be taken before its watcher is cut off; it comes back with its resume token."""

PAUSE_SECONDS = 0.001
"""How long a watcher waits after a frame of changes for each watcher of the same above `FEW_WATCHERS`, so that all of
them together leave time for calls.
"""

FEW_WATCHERS = 20

_CHECK_AGE_SECONDS = 1.0
_TRUST_SECONDS = 60.0
_PLACE_SECONDS = 10.0
_NOT_ANSWERED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a caller wants to watch. `topic` is the replica's, `part` what the caller sees of it."""

    target: str
    id: str
    topic: str
    part: str
    visible: Visible
    resume_token: str
    consistency_token: str = ""


@dataclass(frozen=True, slots=True)
class Watches:
    """Serves the three public watches."""

    fan_out: FanOut
    authenticator: Authenticator
    placement: Placement
    organization: OrganizationServiceStub
    repository: RepositoryServiceStub
    signer: Signer

    async def of_organization(
        self, request: organizations_pb2.WatchOrganizationRequest, context: Context
    ) -> AsyncIterator[organizations_pb2.WatchOrganizationResponse]:
        """Watch an organization: everything but history, and of the users' own states only the caller's."""
        user_id, organization_id = current_caller().user.id, request.organization_id
        wanted = _Wanted(
            "organization_id",
            organization_id,
            f"organization/{organization_id}",
            user_id,
            _of_viewer(user_id),
            request.resume_token,
            request.consistency_token,
        )

        def ask(selection: WatchSelection, metadata: Metadata | None) -> Any:
            upstream = organization_pb2.WatchIndexRequest(organization_id=organization_id, selection=selection)
            return self.organization.WatchIndex(upstream, metadata=metadata)

        async with aclosing(self._frames(wanted, ask)) as frames:
            async for frame in frames:
                yield organizations_pb2.WatchOrganizationResponse(frame=frame)

    async def of_history(
        self, request: history_pb2.WatchHistoryRequest, context: Context
    ) -> AsyncIterator[history_pb2.WatchHistoryResponse]:
        """Watch an organization's feed, or what it says of one task."""
        organization_id = request.organization_id
        wanted = _Wanted(
            "organization_id",
            organization_id,
            f"history/{organization_id}",
            request.task_id,
            _of_task(request.task_id),
            request.resume_token,
        )

        def ask(selection: WatchSelection, metadata: Metadata | None) -> Any:
            upstream = organization_pb2.WatchIndexRequest(
                organization_id=organization_id, selection=selection, history=True
            )
            return self.organization.WatchIndex(upstream, metadata=metadata)

        async with aclosing(self._frames(wanted, ask)) as frames:
            async for frame in frames:
                yield history_pb2.WatchHistoryResponse(frame=frame)

    async def of_task(
        self, request: tasks_pb2.WatchTaskRequest, context: Context
    ) -> AsyncIterator[tasks_pb2.WatchTaskResponse]:
        """Watch a task's workbench and transcripts, or one session of it."""
        wanted = _Wanted(
            "task_id",
            request.task_id,
            f"task/{request.task_id}",
            request.session_id,
            _of_session(request.session_id),
            request.resume_token,
            request.consistency_token,
        )

        def ask(selection: WatchSelection, metadata: Metadata | None) -> Any:
            upstream = repository_pb2.WatchIndexRequest(task_id=request.task_id, selection=selection)
            return self.repository.WatchIndex(upstream, metadata=metadata)

        async with aclosing(self._frames(wanted, ask)) as frames:
            async for frame in frames:
                yield tasks_pb2.WatchTaskResponse(frame=frame)

    async def _frames(self, wanted: _Wanted, ask: Ask) -> AsyncGenerator[WatchFrame, None]:
        """Yield the frames of one watcher. Its resume tokens are good for the same part of the same topic alone."""
        caller = current_caller()
        topic = f"{wanted.topic}/{wanted.part}"
        position = parse_resume_token(wanted.resume_token, topic)
        parse_consistency_token(wanted.consistency_token)
        principal = await self.placement.place_new(
            caller, wanted.target, wanted.id, wanted.consistency_token, _PLACE_SECONDS
        )

        def of_caller(selection: WatchSelection) -> Any:
            return ask(selection, self.signer.metadata(principal))

        check = self._check(caller, wanted, principal)
        with self.fan_out.replica(wanted.topic, _own(ask)) as replica:

            def pause_seconds() -> float:
                return max(0, replica.watchers - FEW_WATCHERS) * PAUSE_SECONDS

            asked = Watch(
                topic, position, wanted.visible, check=check, check_seconds=CHECK_SECONDS, pause_seconds=pause_seconds
            )
            view = View(replica, of_caller, caller.user.id, wanted.consistency_token)
            async with aclosing(watch(view, asked)) as frames:
                async for frame in frames:
                    with _taken_in_time():
                        yield frame

    def _check(self, caller: Caller, wanted: _Wanted, principal: Principal) -> Callable[[], Awaitable[None]]:
        """Return what raises once the caller may no longer watch, or what is watched is gone.

        While the organization does not answer, its last word counts for a while.
        """
        clock = asyncio.get_running_loop().time
        confirmed = clock()

        async def check() -> None:
            nonlocal confirmed
            try:
                now = await self.authenticator.authenticate(caller.token_hash, _CHECK_AGE_SECONDS)
                await self.placement.place(now, wanted.target, wanted.id, at_most_seconds=CHECK_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _NOT_ANSWERED or clock() - confirmed > _TRUST_SECONDS:
                    raise
            else:
                confirmed = clock()

        return check


@contextmanager
def _taken_in_time() -> Generator[None, None, None]:
    """End the running call if the block, in which a frame is sent, takes too long."""
    task = asyncio.current_task()
    assert task is not None
    stalled = asyncio.get_running_loop().call_later(STALLED_SECONDS, task.cancel)
    try:
        yield
    finally:
        stalled.cancel()


def _own(ask: Ask) -> Upstream:
    """Return the upstream of a replica, which sees what everybody may see."""
    return lambda selection: ask(selection, None)


def _of_viewer(user_id: str) -> Visible:
    return lambda change: change.viewer_id in ("", user_id)


def _of_task(task_id: str) -> Visible:
    return lambda change: not task_id or change.task_id == task_id


def _of_session(session_id: str) -> Visible:
    def visible(change: WatchChange) -> bool:
        if not session_id:
            return True
        if change.kind == ENTITY_KIND_SESSION:
            return change.id == session_id
        if change.kind == ENTITY_KIND_TRANSCRIPT_ENTRY and not change.deleted:
            return TranscriptEntry.FromString(change.resource.value).session_id == session_id
        return True

    return visible
