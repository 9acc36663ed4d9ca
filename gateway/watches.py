"""The public watches: replicas of the coordinators' indexes, seen and filtered for the caller."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from branchline.v1 import history_pb2, organizations_pb2, tasks_pb2
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.repository.v1 import repository_pb2
from branchline_internal.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline_internal.spine.v1.push_pb2 import WatchSelection

from gateway.caller import Authenticator, current_caller
from gateway.fanout import FanOut
from gateway.forward import seconds_left
from gateway.frames import FrameWriter
from gateway.placement import Placement
from gateway.replica import Upstream, View
from gateway.routes import ORGANIZATION, REPOSITORY, STREAM_SECONDS
from gateway.selection import HistoryView, OrganizationView, TaskView, event_matcher, task_matcher
from gateway.standing import CHECK_SECONDS, standing_check
from services.runtime.principal import Metadata, Principal, Signer
from services.runtime.serving import Context
from services.runtime.spine.tokens import history_topic, organization_topic, parse_resume_token, selection_of
from services.runtime.spine.watch import Sight, Watch, heartbeat_seconds, watch

Ask = Callable[[WatchSelection, Principal | None, float | None], Any]
"""Opens a coordinator's watch, in the gateway's own name or in that of the caller, who waits no longer than so long."""

STALLED_SECONDS = 60.0
"""How long a frame may wait to be taken before its watcher is cut off; it comes back with its resume token."""

PAUSE_SECONDS = 0.001
"""How long a watcher waits after a frame of changes for each watcher of the same above `FEW_WATCHERS`, so that all of
them together leave time for calls.
"""

FEW_WATCHERS = 20

_PLACE_SECONDS = 30.0
_ORGANIZATION = FrameWriter(organizations_pb2.WatchOrganizationResponse.DESCRIPTOR)
_HISTORY = FrameWriter(history_pb2.WatchHistoryResponse.DESCRIPTOR)
_TASK = FrameWriter(tasks_pb2.WatchTaskResponse.DESCRIPTOR)


_Request = organizations_pb2.WatchOrganizationRequest | history_pb2.WatchHistoryRequest | tasks_pb2.WatchTaskRequest


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a caller wants to watch."""

    target: str
    id: str
    topic: str
    """The replica's topic."""

    part: str
    """What of it only this caller may see; resume tokens are bound to it."""

    request: _Request
    writer: FrameWriter
    sight: Callable[[bool], Sight]
    """Makes what the caller sees, told whether an earlier watch may have shown something."""


@dataclass(frozen=True, slots=True)
class Watches:
    """Serves the three public watches."""

    fan_out: FanOut
    authenticator: Authenticator
    placement: Placement
    organization: OrganizationServiceStub
    repository: RepositoryServiceStub
    signer: Signer

    def of_organization(
        self, request: organizations_pb2.WatchOrganizationRequest, context: Context
    ) -> AsyncGenerator[bytes, None]:
        """Watch an organization: everything but history, and of the users' own states only the caller's."""
        user_id, organization_id = current_caller().user.id, request.organization_id
        matches = task_matcher(request.tasks)

        def sight(resumed: bool) -> Sight:
            return OrganizationView(user_id, frozenset(request.kinds), matches, resumed)

        def ask(selection: WatchSelection, principal: Principal | None, seconds: float | None) -> Any:
            upstream = organization_pb2.WatchIndexRequest(organization_id=organization_id, selection=selection)
            if principal is not None:  # the caller's own snapshot is no larger than what is seen of it
                upstream.kinds.extend(request.kinds)
                upstream.tasks.CopyFrom(request.tasks)
            return self.organization.WatchIndex(upstream, metadata=self._of(ORGANIZATION, principal), timeout=seconds)

        topic = organization_topic(organization_id)
        wanted = _Wanted("organization_id", organization_id, topic, user_id, request, _ORGANIZATION, sight)
        return self._frames(wanted, ask, context)

    def of_history(self, request: history_pb2.WatchHistoryRequest, context: Context) -> AsyncGenerator[bytes, None]:
        """Watch an organization's feed, or some of its events."""
        organization_id = request.organization_id

        def ask(selection: WatchSelection, principal: Principal | None, seconds: float | None) -> Any:
            upstream = organization_pb2.WatchIndexRequest(
                organization_id=organization_id, selection=selection, history=True
            )
            return self.organization.WatchIndex(upstream, metadata=self._of(ORGANIZATION, principal), timeout=seconds)

        sight = HistoryView(event_matcher(request.filter))
        topic = history_topic(organization_id)
        wanted = _Wanted("organization_id", organization_id, topic, "", request, _HISTORY, lambda _: sight)
        return self._frames(wanted, ask, context)

    def of_task(self, request: tasks_pb2.WatchTaskRequest, context: Context) -> AsyncGenerator[bytes, None]:
        """Watch a task's workbench and transcripts."""

        def ask(selection: WatchSelection, principal: Principal | None, seconds: float | None) -> Any:
            upstream = repository_pb2.WatchIndexRequest(task_id=request.task_id, selection=selection)
            if principal is not None:
                upstream.transcripts.CopyFrom(request.transcripts)
            return self.repository.WatchIndex(upstream, metadata=self._of(REPOSITORY, principal), timeout=seconds)

        sight = TaskView(frozenset(request.transcripts.session_ids))
        topic = f"task/{request.task_id}"
        wanted = _Wanted("task_id", request.task_id, topic, "", request, _TASK, lambda _: sight)
        return self._frames(wanted, ask, context)

    def _of(self, owner: str, principal: Principal | None) -> Metadata | None:
        """Return what a call of a caller's carries; None stands for the gateway itself."""
        return principal and self.signer.metadata(owner, principal)

    async def _frames(self, wanted: _Wanted, ask: Ask, context: Context) -> AsyncGenerator[bytes, None]:
        """Yield the frames of one watcher. Its resume tokens are good for what its request selects alone."""
        caller, request = current_caller(), wanted.request
        topic, selected = f"{wanted.topic}/{wanted.part}", selection_of(request)
        begin = parse_resume_token(request.resume_token, topic, selected)
        principal = await self.placement.place_new(
            caller, wanted.target, wanted.id, request.consistency, seconds_left(context, _PLACE_SECONDS)
        )

        def of_caller(selection: WatchSelection) -> Any:
            return ask(selection, principal, seconds_left(context, STREAM_SECONDS))

        heartbeat = heartbeat_seconds(request.heartbeat_interval)
        with self.fan_out.replica(wanted.topic, _own(ask)) as replica:

            def pause_seconds() -> float:
                return max(0, replica.watchers - FEW_WATCHERS) * PAUSE_SECONDS

            asked = Watch(
                topic,
                selected,
                begin.position,
                begin.changed,
                sight=wanted.sight(begin.position is not None),
                heartbeat_seconds=heartbeat,
                check=standing_check(self.authenticator, self.placement, wanted.target, wanted.id),
                check_seconds=CHECK_SECONDS,
                pause_seconds=pause_seconds,
            )
            view = View(replica, of_caller, caller.user.id, request.consistency)
            async with aclosing(watch(view, asked)) as frames:
                async for frame in frames:
                    with _taken_in_time():
                        yield wanted.writer.write(frame, heartbeat)


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
    return lambda selection: ask(selection, None, None)
