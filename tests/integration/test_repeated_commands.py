"""Every command is done once, however often its request comes: twice at the same moment, again later. API-3, C1."""

import asyncio
import hashlib
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from branchline.v1 import (
    blobs_pb2,
    organizations_pb2,
    processes_pb2,
    repositories_pb2,
    roles_pb2,
    secrets_pb2,
    sessions_pb2,
    tasks_pb2,
    users_pb2,
)
from branchline.v1.common_pb2 import Prompt
from branchline.v1.organizations_pb2 import Organization, OrganizationSettings
from branchline.v1.sessions_pb2 import QueuedMessage, Session
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import INPUT_REQUEST_STATE_PENDING, InputAnswer, InputRequest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from gateway.routes import PUBLIC
from tests.support.client import Client
from tests.support.stack import Stack, eventually, failure, make_remote, request_id

REPEATABLE = {method.name for method in PUBLIC.values() if "request_id" in method.input_type.fields_by_name}
SECRETS = {"InviteMember": "code", "AcceptInvitation": "secret", "CreateApiToken": "secret"}
"""What is told each time, though it is stored nowhere: who did not hear the first answer has no other way in."""

Prepared = tuple[Callable[[Any], Awaitable[Message]], Message, str]
"""The call, a request of it, and the path of the field that another body differs in."""

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
        organization=Organization(id=await stack.new_organization(), settings=OrganizationSettings(default_model="m")),
        update_mask=FieldMask(paths=["settings.default_model"]),
    )
    return stack.client.organizations.UpdateOrganization, request, "organization.settings.default_model"


@prepares("DeleteOrganization")
async def _(stack: Stack) -> Prepared:
    request = organizations_pb2.DeleteOrganizationRequest(
        request_id=request_id(), organization_id=await stack.new_organization()
    )
    return stack.client.organizations.DeleteOrganization, request, ""


@prepares("InviteMember")
async def _(stack: Stack) -> Prepared:
    return stack.client.organizations.InviteMember, _invitation(stack), "email"


@prepares("DeleteInvitation")
async def _(stack: Stack) -> Prepared:
    invited = await stack.client.organizations.InviteMember(_invitation(stack))
    request = organizations_pb2.DeleteInvitationRequest(
        request_id=request_id(), organization_id=stack.organization_id, invitation_id=invited.invitation.id
    )
    return stack.client.organizations.DeleteInvitation, request, "invitation_id"


@prepares("AcceptInvitation")
async def _(stack: Stack) -> Prepared:
    invited = await stack.client.organizations.InviteMember(_invitation(stack))
    request = organizations_pb2.AcceptInvitationRequest(
        request_id=request_id(), code=invited.code, display_name="Twice", email=invited.invitation.email
    )
    return Client(stack.address).organizations.AcceptInvitation, request, "display_name"


@prepares("UpdateMember")
async def _(stack: Stack) -> Prepared:
    _, user_id = await stack.new_member()
    member = organizations_pb2.Member(
        organization_id=stack.organization_id, user_id=user_id, role=roles_pb2.ROLE_VIEWER
    )
    request = organizations_pb2.UpdateMemberRequest(
        request_id=request_id(), member=member, update_mask=FieldMask(paths=["role"])
    )
    return stack.client.organizations.UpdateMember, request, "member.user_id"


@prepares("RemoveMember")
async def _(stack: Stack) -> Prepared:
    _, user_id = await stack.new_member()
    request = organizations_pb2.RemoveMemberRequest(
        request_id=request_id(), organization_id=stack.organization_id, user_id=user_id
    )
    return stack.client.organizations.RemoveMember, request, "user_id"


@prepares("CreateRepository")
async def _(stack: Stack) -> Prepared:
    request = repositories_pb2.CreateRepositoryRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        remote_url=f"file://{make_remote(stack.remotes)}",
    )
    return stack.client.repositories.CreateRepository, request, "display_name"


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
        request_id=request_id(),
        repository_id=await stack.add_repository(),
        prompt=Prompt(text="say twice"),
        hold_prompt=True,
    )
    return stack.client.tasks.CreateTask, request, "prompt.text"


@prepares("UpdateTask")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = tasks_pb2.UpdateTaskRequest(
        request_id=request_id(), task=Task(id=task.id, title="Twice"), update_mask=FieldMask(paths=["title"])
    )
    return stack.client.tasks.UpdateTask, request, "task.title"


@prepares("RetryProvisioning")
async def _(stack: Stack) -> Prepared:
    repository_id = await stack.add_repository(url="file:///nowhere/to/be/found.git")
    task = await stack.create_task(repository_id)
    await stack.until(task.id, state=tasks_pb2.TASK_STATE_FAILED)
    request = tasks_pb2.RetryProvisioningRequest(request_id=request_id(), task_id=task.id)
    return stack.client.tasks.RetryProvisioning, request, "session.model"


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
    request = sessions_pb2.CreateSessionRequest(request_id=request_id(), task_id=task.id, display_name="Second")
    return stack.client.sessions.CreateSession, request, "display_name"


@prepares("UpdateSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    session = Session(id=(await stack.session(task.id)).id, task_id=task.id, display_name="Other")
    request = sessions_pb2.UpdateSessionRequest(
        request_id=request_id(), session=session, update_mask=FieldMask(paths=["display_name"])
    )
    return stack.client.sessions.UpdateSession, request, "session.display_name"


@prepares("CloseSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.CloseSessionRequest(
        request_id=request_id(), task_id=task.id, session_id=(await stack.session(task.id)).id
    )
    return stack.client.sessions.CloseSession, request, "session_id"


@prepares("ReopenSession")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    session_id = (await stack.session(task.id)).id
    await stack.client.sessions.CloseSession(
        sessions_pb2.CloseSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    )
    request = sessions_pb2.ReopenSessionRequest(request_id=request_id(), task_id=task.id, session_id=session_id)
    return stack.client.sessions.ReopenSession, request, "session_id"


@prepares("SendMessage")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    request = sessions_pb2.SendMessageRequest(
        request_id=request_id(),
        task_id=task.id,
        session_id=(await stack.session(task.id)).id,
        prompt=Prompt(text="say once"),
    )
    return stack.client.sessions.SendMessage, request, "prompt.text"


@prepares("RetryTurn")
async def _(stack: Stack) -> Prepared:
    task = await _working(stack, "die")
    await stack.until(task.id, activity=tasks_pb2.TASK_ACTIVITY_FAILED)
    session = await stack.session(task.id)
    request = sessions_pb2.RetryTurnRequest(
        request_id=request_id(), task_id=task.id, session_id=session.id, turn=session.turn
    )
    return stack.client.sessions.RetryTurn, request, "session_id"


@prepares("CancelTurn")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    sent = (await stack.send(task, "wait 30")).entry
    request = sessions_pb2.CancelTurnRequest(
        request_id=request_id(), task_id=task.id, session_id=sent.session_id, turn=sent.turn
    )
    return stack.client.sessions.CancelTurn, request, "session_id"


@prepares("UpdateQueuedMessage")
async def _(stack: Stack) -> Prepared:
    waiting = await _queued(stack)
    changed = QueuedMessage(id=waiting.id, task_id=waiting.task_id, prompt=Prompt(text="say twice"))
    request = sessions_pb2.UpdateQueuedMessageRequest(
        request_id=request_id(), queued_message=changed, update_mask=FieldMask(paths=["prompt"])
    )
    return stack.client.sessions.UpdateQueuedMessage, request, "queued_message.prompt.text"


@prepares("DeleteQueuedMessage")
async def _(stack: Stack) -> Prepared:
    waiting = await _queued(stack)
    request = sessions_pb2.DeleteQueuedMessageRequest(
        request_id=request_id(), task_id=waiting.task_id, queued_message_id=waiting.id
    )
    return stack.client.sessions.DeleteQueuedMessage, request, "queued_message_id"


@prepares("AnswerInputRequest")
async def _(stack: Stack) -> Prepared:
    task = await _working(stack, "ask may I?")

    async def look() -> list[InputRequest]:
        listing = sessions_pb2.ListInputRequestsRequest(
            organization_id=stack.organization_id, task_ids=[task.id], states=[INPUT_REQUEST_STATE_PENDING]
        )
        return list((await stack.client.sessions.ListInputRequests(listing)).input_requests)

    [asked] = await eventually(look)
    request = sessions_pb2.AnswerInputRequestRequest(
        request_id=request_id(),
        task_id=task.id,
        input_request_id=asked.id,
        answer=InputAnswer(option_id=asked.permission.options[0].id),
    )
    return stack.client.sessions.AnswerInputRequest, request, "answer.option_id"


@prepares("StartProcess")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    spec = processes_pb2.ProcessSpec(command=["true"])
    request = processes_pb2.StartProcessRequest(request_id=request_id(), task_id=task.id, spec=spec)
    return stack.client.processes.StartProcess, request, "spec.directory"


@prepares("SignalProcess")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    spec = processes_pb2.ProcessSpec(command=["sleep", "60"])
    started = await stack.client.processes.StartProcess(
        processes_pb2.StartProcessRequest(request_id=request_id(), task_id=task.id, spec=spec)
    )
    request = processes_pb2.SignalProcessRequest(
        request_id=request_id(), task_id=task.id, process_id=started.process.id, signal=processes_pb2.SIGNAL_TERM
    )
    return stack.client.processes.SignalProcess, request, "process_id"


@prepares("CreateBlob")
async def _(stack: Stack) -> Prepared:
    request = blobs_pb2.CreateBlobRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        display_name="twice.txt",
        size_bytes=5,
        sha256=hashlib.sha256(b"twice").hexdigest(),
    )
    return stack.client.blobs.CreateBlob, request, "display_name"


@prepares("UpdateUser")
async def _(stack: Stack) -> Prepared:
    client, _ = await stack.new_member()
    user = users_pb2.User(preferences=users_pb2.UserPreferences(default_model="m"))
    request = users_pb2.UpdateUserRequest(
        request_id=request_id(), user=user, update_mask=FieldMask(paths=["preferences.default_model"])
    )
    return client.users.UpdateUser, request, "user.preferences.default_model"


@prepares("CreateApiToken")
async def _(stack: Stack) -> Prepared:
    request = users_pb2.CreateApiTokenRequest(request_id=request_id(), display_name="twice")
    return stack.client.users.CreateApiToken, request, "display_name"


@prepares("RevokeApiToken")
async def _(stack: Stack) -> Prepared:
    made = await stack.client.users.CreateApiToken(users_pb2.CreateApiTokenRequest(display_name="short"))
    request = users_pb2.RevokeApiTokenRequest(request_id=request_id(), api_token_id=made.api_token.id)
    return stack.client.users.RevokeApiToken, request, "api_token_id"


@prepares("UpdateUserTaskState")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    state = users_pb2.UserTaskState(task_id=task.id, open_session_id=(await stack.session(task.id)).id, unread=True)
    request = users_pb2.UpdateUserTaskStateRequest(
        request_id=request_id(), user_task_state=state, update_mask=FieldMask(paths=["unread", "open_session_id"])
    )
    return stack.client.users.UpdateUserTaskState, request, "user_task_state.open_session_id"


@prepares("UpdateDraft")
async def _(stack: Stack) -> Prepared:
    task = await stack.ready_task()
    draft = users_pb2.Draft(task_id=task.id, prompt=Prompt(text="half"))
    request = users_pb2.UpdateDraftRequest(request_id=request_id(), draft=draft)
    return stack.client.users.UpdateDraft, request, "draft.prompt.text"


@prepares("CreateSecret")
async def _(stack: Stack) -> Prepared:
    return stack.client.secrets.CreateSecret, _secret(), "secret.description"


@prepares("UpdateSecret")
async def _(stack: Stack) -> Prepared:
    made = await stack.client.secrets.CreateSecret(_secret())
    request = secrets_pb2.UpdateSecretRequest(
        request_id=request_id(),
        secret=secrets_pb2.Secret(id=made.secret.id, description="other"),
        update_mask=FieldMask(paths=["description"]),
    )
    return stack.client.secrets.UpdateSecret, request, "secret.description"


@prepares("DeleteSecret")
async def _(stack: Stack) -> Prepared:
    made = await stack.client.secrets.CreateSecret(_secret())
    request = secrets_pb2.DeleteSecretRequest(request_id=request_id(), secret_id=made.secret.id)
    return stack.client.secrets.DeleteSecret, request, "secret_id"


def _invitation(stack: Stack) -> organizations_pb2.InviteMemberRequest:
    return organizations_pb2.InviteMemberRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        email=f"{uuid.uuid4().hex}@example.com",
        role=roles_pb2.ROLE_VIEWER,
    )


def _secret() -> secrets_pb2.CreateSecretRequest:
    credential = secrets_pb2.GitCredential(host=f"{uuid.uuid4().hex}.invalid", username="someone")
    return secrets_pb2.CreateSecretRequest(
        request_id=request_id(), secret=secrets_pb2.Secret(git_credential=credential), value=b"hidden"
    )


async def _working(stack: Stack, text: str) -> Task:
    task = await stack.ready_task()
    await stack.send(task, text)
    return task


async def _queued(stack: Stack) -> QueuedMessage:
    task = await _working(stack, "wait 30")
    return (await stack.send(task, "say later")).queued_message


def test_every_command_with_a_request_id_is_tried() -> None:
    assert set(PREPARE) == REPEATABLE


@pytest.mark.parametrize("method", sorted(PREPARE))
async def test_a_command_that_is_repeated_is_done_once(stack: Stack, method: str) -> None:  # F11
    call, request, path = await PREPARE[method](stack)

    answers = [*await asyncio.gather(*(call(request) for _ in range(3))), await call(request)]

    assert method not in SECRETS or getattr(answers[0], SECRETS[method])
    assert all(answer == answers[0] for answer in answers)
    if path:
        refused = await failure(call(_with_another(request, path)))
        assert refused.reason == "REQUEST_ID_REUSED"


def _with_another(request: Message, path: str) -> Message:
    """Return the request with another text at a path."""
    other = type(request)()
    other.CopyFrom(request)
    message: Any = other
    *within, last = path.split(".")
    for name in within:
        message = getattr(message, name)
    setattr(message, last, f"{getattr(message, last)}x")
    return other
