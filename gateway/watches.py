"""The public watches: topics of the fan-out, filtered for the caller."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from branchline.gateway.v1 import history_pb2, organizations_pb2, tasks_pb2
from branchline.organization.v1 import organization_pb2
from branchline.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline.repository.v1 import repository_pb2
from branchline.repository.v1.repository_pb2_grpc import RepositoryServiceStub
from branchline.resource.v1.session_pb2 import TranscriptEntry
from branchline.resource.v1.watch_pb2 import WatchChange
from branchline.spine.v1.push_pb2 import ConsistencyPoint

from gateway.caller import Authenticator, current_caller
from gateway.fanout import FanOut, Watch
from gateway.placement import Placement
from services.runtime.spine.tokens import parse_consistency_token

Context = grpc.aio.ServicerContext[Any, Any]

ORGANIZATION_KINDS = frozenset({"organization", "member", "repository", "task", "github_status", "user_task_state"})
HISTORY_KINDS = frozenset({"history_event"})
TASK_KINDS = frozenset({"task", "session", "sandbox", "transcript_entry"})


class Watches:
    """Serves the three public watches."""

    def __init__(
        self,
        fan_out: FanOut,
        authenticator: Authenticator,
        placement: Placement,
        organization: OrganizationServiceStub,
        repository: RepositoryServiceStub,
    ) -> None:
        self._fan_out = fan_out
        self._authenticator = authenticator
        self._placement = placement
        self._organization = organization
        self._repository = repository

    async def organization(
        self, request: organizations_pb2.WatchOrganizationRequest, context: Context
    ) -> AsyncIterator[organizations_pb2.WatchOrganizationResponse]:
        """Watch an organization: everything but history, and of the users' own states only the caller's."""
        user_id = current_caller().user.id
        organization_id = request.organization_id
        point = parse_consistency_token(request.consistency_token)
        watch = await self._watch("organization_id", organization_id, request.resume_token, point, _mine(user_id))

        def upstream(token: str) -> AsyncIterator[Any]:
            wanted = organization_pb2.WatchIndexRequest(organization_id=organization_id, resume_token=token)
            return aiter(self._organization.WatchIndex(wanted))

        with self._fan_out.topic(f"organization/{organization_id}", ORGANIZATION_KINDS, upstream) as topic:
            async for frame in topic.watch(watch):
                yield organizations_pb2.WatchOrganizationResponse(frame=frame)

    async def history(
        self, request: history_pb2.WatchHistoryRequest, context: Context
    ) -> AsyncIterator[history_pb2.WatchHistoryResponse]:
        """Watch an organization's feed."""
        organization_id = request.organization_id

        def visible(change: WatchChange) -> bool:
            return not request.task_id or change.task_id == request.task_id

        watch = await self._watch("organization_id", organization_id, request.resume_token, ConsistencyPoint(), visible)

        def upstream(token: str) -> AsyncIterator[Any]:
            wanted = organization_pb2.WatchIndexRequest(
                organization_id=organization_id, resume_token=token, history=True
            )
            return aiter(self._organization.WatchIndex(wanted))

        with self._fan_out.topic(f"history/{organization_id}", HISTORY_KINDS, upstream) as topic:
            async for frame in topic.watch(watch):
                yield history_pb2.WatchHistoryResponse(frame=frame)

    async def task(
        self, request: tasks_pb2.WatchTaskRequest, context: Context
    ) -> AsyncIterator[tasks_pb2.WatchTaskResponse]:
        """Watch a task's workbench and transcripts, or one session of it."""
        point = parse_consistency_token(request.consistency_token)
        visible = _of_session(request.session_id) if request.session_id else _everything
        watch = await self._watch(
            "task_id", request.task_id, request.resume_token, point, visible, request.consistency_token
        )

        def upstream(token: str) -> AsyncIterator[Any]:
            wanted = repository_pb2.WatchIndexRequest(task_id=request.task_id, resume_token=token)
            return aiter(self._repository.WatchIndex(wanted))

        with self._fan_out.topic(f"task/{request.task_id}", TASK_KINDS, upstream) as topic:
            async for frame in topic.watch(watch):
                yield tasks_pb2.WatchTaskResponse(frame=frame)

    async def _watch(
        self,
        target: str,
        wanted: str,
        resume_token: str,
        point: ConsistencyPoint,
        visible: Callable[[WatchChange], bool],
        consistency_token: str = "",
    ) -> Watch:
        """Check that the caller may watch, now and at every heartbeat."""
        hashed = current_caller().token_hash

        async def still_allowed() -> None:
            caller = await self._authenticator.authenticate(hashed)
            await self._placement.place(caller, target, wanted)

        await self._placement.place(current_caller(), target, wanted, consistency_token)
        return Watch(resume_token, point, visible, still_allowed)


def _everything(_change: WatchChange) -> bool:
    return True


def _mine(user_id: str) -> Callable[[WatchChange], bool]:
    def visible(change: WatchChange) -> bool:
        return change.viewer_id in ("", user_id)

    return visible


def _of_session(session_id: str) -> Callable[[WatchChange], bool]:
    def visible(change: WatchChange) -> bool:
        if change.kind == "session":
            return change.id == session_id
        if change.kind == "transcript_entry":
            return TranscriptEntry.FromString(change.resource.value).session_id == session_id
        return True

    return visible
