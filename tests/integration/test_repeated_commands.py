"""Every command is done once, however often its request comes: twice at the same moment, again later. API-3, C1."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from branchline.v1 import (
    history_pb2,
    organizations_pb2,
    repositories_pb2,
    sandboxes_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.v1.organizations_pb2 import Organization, OrganizationSettings
from branchline.v1.tasks_pb2 import Task
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from tests.support.stack import Stack, eventually, failure, make_remote, request_id

FILES = (history_pb2, organizations_pb2, repositories_pb2, sandboxes_pb2, sessions_pb2, tasks_pb2, users_pb2)
REPEATABLE = {
    method.name
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if "request_id" in method.input_type.fields_by_name
}

Prepared = tuple[Callable[[Any], Awaitable[Message]], Message, str]
"""The call, a request of it, and the field that another body differs in."""

Prepare = Callable[[Stack], Awaitable[Prepared]]
PREPARE: dict[str, Prepare] = {}


def prepares(method: str) -> Callable[[Prepare], Prepare]:
    def register(prepare: Prepare) -> Prepare:
        PREPARE[method] = prepare
        return prepare

    return register


@prepares("CreateOrganization")
async def _(stack: Stack) -> Prepared:
    request = organizations_pb2.CreateOrganizationRequest(
        request_id=request_id(),
        slug=f"o{uuid.uuid4().hex[:12]}",
        display_name="Twice",
        kind=organizations_pb2.ORGANIZATION_KIND_TEAM,
    )
    return stack.client.organizations.CreateOrganization, request, "display_name"


@prepares("UpdateOrganization")
async def _(stack: Stack) -> Prepared:
    request = organizations_pb2.UpdateOrganizationRequest(
        request_id=request_id(),
        organization_id=await stack.new_organization(),
        organization=Organization(settings=OrganizationSettings(default_model="m")),
        update_mask=FieldMask(paths=["settings.default_model"]),
    )
    return stack.client.organizations.UpdateOrganization, request, "organization"


@prepares("DeleteOrganization")
async def _(stack: Stack) -> Prepared:
    request = organizations_pb2.DeleteOrganizationRequest(
        request_id=request_id(), organization_id=await stack.new_organization()
    )
    return stack.client.organizations.DeleteOrganization, request, ""


@prepares("AddMember")
async def _(stack: Stack) -> Prepared:
    request = organizations_pb2.AddMemberRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        email=f"{uuid.uuid4().hex}@example.com",
        display_name="Twice",
        role=organizations_pb2.ROLE_VIEWER,
    )
    return stack.client.organizations.AddMember, request, "display_name"


@prepares("UpdateMember")
async def _(stack: Stack) -> Prepared:
    _, user_id = await stack.new_member()
    request = organizations_pb2.UpdateMemberRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        user_id=user_id,
        role=organizations_pb2.ROLE_VIEWER,
    )
    return stack.client.organizations.UpdateMember, request, "user_id"


@prepares("RemoveMember")
async def _(stack: Stack) -> Prepared:
    _, user_id = await stack.new_member()
    request = organizations_pb2.RemoveMemberRequest(
        request_id=request_id(), organization_id=stack.organization_id, user_id=user_id
    )
    return stack.client.organizations.RemoveMember, request, "user_id"


@prepares("AddRepository")
async def _(stack: Stack) -> Prepared:
    request = repositories_pb2.AddRepositoryRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        remote_url=f"file://{make_remote(stack.remotes)}",
    )
    return stack.client.repositories.AddRepository, request, "full_name"


@prepares("DeleteRepository")
async def _(stack: Stack) -> Prepared:
    request = repositories_pb2.DeleteRepositoryRequest(
        request_id=request_id(), repository_id=await stack.add_repository()
    )
    return stack.client.repositories.DeleteRepository, request, ""


@prepares("SyncGithub")
async def _(stack: Stack) -> Prepared:
    slug = f"o{uuid.uuid4().hex[:12]}"
    organization_id = await stack.new_organization(slug)
    await stack.bind_github(slug, f"octo{uuid.uuid4().hex[:8]}")
    request = repositories_pb2.SyncGithubRequest(request_id=request_id(), organization_id=organization_id)
    return stack.client.repositories.SyncGithub, request, ""


@prepares("CreateTask")
async def _(stack: Stack) -> Prepared:
    request = tasks_pb2.CreateTaskRequest(
        request_id=request_id(), repository_id=await stack.add_repository(), text="say twice", hold_prompt=True
    )
    return stack.client.tasks.CreateTask, request, "text"


@prepares("RetryTask")
async def _(stack: Stack) -> Prepared:
    repository_id = await stack.add_repository(url="file:///nowhere/to/be/found.git")
    task = await stack.create_task(repository_id)
    await stack.until(task.id, tasks_pb2.TASK_STATUS_ERROR)
    return stack.client.tasks.RetryTask, tasks_pb2.RetryTaskRequest(request_id=request_id(), task_id=task.id), "model"


@prepares("ArchiveTask")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    return stack.client.tasks.ArchiveTask, tasks_pb2.ArchiveTaskRequest(request_id=request_id(), task_id=task.id), ""


@prepares("KillTask")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    return stack.client.tasks.KillTask, tasks_pb2.KillTaskRequest(request_id=request_id(), task_id=task.id), ""


@prepares("CreateSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, name="Second")
    return stack.client.sessions.CreateSession, request, "name"


@prepares("RenameSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.RenameSessionRequest(
        request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id, name="Other"
    )
    return stack.client.sessions.RenameSession, request, "name"


@prepares("CloseSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.CloseSessionRequest(request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id)
    return stack.client.sessions.CloseSession, request, "session_id"


@prepares("ReopenSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    session_id = task.sessions[0].id
    await stack.client.sessions.CloseSession(
        sessions_pb2.CloseSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    )
    request = sessions_pb2.ReopenSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    return stack.client.sessions.ReopenSession, request, "session_id"


@prepares("SendMessage")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.SendMessageRequest(
        request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id, text="say once"
    )
    return stack.client.sessions.SendMessage, request, "text"


@prepares("CancelTurn")
async def _(stack: Stack) -> Prepared:
    task = await _working(stack, "wait 30")
    request = sessions_pb2.CancelTurnRequest(request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id)
    return stack.client.sessions.CancelTurn, request, "session_id"


@prepares("AnswerPermission")
async def _(stack: Stack) -> Prepared:
    task = await _working(stack, "ask may I?")

    async def asked() -> str:
        entries = await stack.transcript(task)
        waiting = [one for one in entries if one.kind == sessions_pb2.TRANSCRIPT_ENTRY_KIND_PERMISSION]
        return f"{waiting[0].id} {waiting[0].options[0].id}" if waiting else ""

    entry_id, option_id = (await eventually(asked)).split()
    request = sessions_pb2.AnswerPermissionRequest(
        request_id=request_id(),
        task_id=task.id,
        session_id=task.sessions[0].id,
        entry_id=entry_id,
        option_id=option_id,
    )
    return stack.client.sessions.AnswerPermission, request, "option_id"


@prepares("UpdatePreferences")
async def _(stack: Stack) -> Prepared:
    client, _ = await stack.new_member()
    request = users_pb2.UpdatePreferencesRequest(request_id=request_id())
    request.preferences.default_agent = "mock"
    return client.users.UpdatePreferences, request, "preferences"


async def _working(stack: Stack, text: str) -> Task:
    task = await stack.ready_task()
    await stack.send(task, text)
    return task


def test_every_command_with_a_request_id_is_tried() -> None:
    assert set(PREPARE) == REPEATABLE


@pytest.mark.parametrize("method", sorted(PREPARE))
async def test_a_command_that_is_repeated_is_done_once(stack: Stack, method: str) -> None:  # F11
    call, request, field = await PREPARE[method](stack)

    at_once = await asyncio.gather(*(call(request) for _ in range(3)))
    later = await call(request)

    assert all(answer == at_once[0] for answer in at_once)
    assert later == at_once[0]
    if field:
        refused = await failure(call(_with_another_body(request, field)))
        assert refused.reason == "REQUEST_ID_REUSED"


def _with_another_body(request: Message, field: str) -> Message:
    other = type(request)()
    other.CopyFrom(request)
    if isinstance(other, organizations_pb2.UpdateOrganizationRequest):
        other.organization.settings.default_model = "another"
    elif isinstance(other, users_pb2.UpdatePreferencesRequest):
        other.preferences.default_model = "another"
    else:
        setattr(other, field, f"{getattr(request, field)}x")
    return other
