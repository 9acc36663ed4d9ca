"""Who changes something on what they know of it changes it once; who knows less is told what is there."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from branchline.v1 import organizations_pb2, roles_pb2, secrets_pb2, sessions_pb2, tasks_pb2, users_pb2
from branchline.v1.common_pb2 import Prompt

from tests.support.stack import Stack, failure_of, request_id

NAMES = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Edited:
    """Something that people change: as it stands, and what gives it another value."""

    held: Any
    change: Callable[[Any, str], Awaitable[Any]]
    """Give it a value, based on an etag; answer it as it then stands."""
    values: Sequence[Any] = NAMES


async def an_organization(stack: Stack) -> Edited:
    organization_id = await stack.new_organization()
    request = organizations_pb2.GetOrganizationRequest(organization_id=organization_id)

    async def change(name: str, etag: str) -> organizations_pb2.Organization:
        organization = organizations_pb2.Organization(id=organization_id, display_name=name, etag=etag)
        request = organizations_pb2.UpdateOrganizationRequest(request_id=request_id(), organization=organization)
        return (await stack.client.organizations.UpdateOrganization(request)).organization

    return Edited((await stack.client.organizations.GetOrganization(request)).organization, change)


async def a_member(stack: Stack) -> Edited:
    organization_id = await stack.new_organization()
    other, user_id = await stack.new_member(organization_id=organization_id)
    await other.close()
    request = organizations_pb2.ListMembersRequest(organization_id=organization_id)
    members = (await stack.client.organizations.ListMembers(request)).members

    async def change(role: roles_pb2.Role.ValueType, etag: str) -> organizations_pb2.Member:
        member = organizations_pb2.Member(organization_id=organization_id, user_id=user_id, role=role, etag=etag)
        request = organizations_pb2.UpdateMemberRequest(request_id=request_id(), member=member)
        return (await stack.client.organizations.UpdateMember(request)).member

    held = next(member for member in members if member.user_id == user_id)
    return Edited(held, change, (roles_pb2.ROLE_VIEWER, roles_pb2.ROLE_ADMIN, roles_pb2.ROLE_VIEWER))


async def a_user(stack: Stack) -> Edited:
    client, _ = await stack.new_member()

    async def change(name: str, etag: str) -> users_pb2.User:
        request = users_pb2.UpdateUserRequest(
            request_id=request_id(), user=users_pb2.User(display_name=name, etag=etag)
        )
        return (await client.users.UpdateUser(request)).user

    return Edited((await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())).user, change)


async def a_secret(stack: Stack) -> Edited:
    client, _ = await stack.new_member()
    credential = secrets_pb2.GitCredential(host="git.example.com", username="someone")
    request = secrets_pb2.CreateSecretRequest(
        request_id=request_id(), secret=secrets_pb2.Secret(git_credential=credential), value=b"hush"
    )
    held = (await client.secrets.CreateSecret(request)).secret

    async def change(words: str, etag: str) -> secrets_pb2.Secret:
        secret = secrets_pb2.Secret(id=held.id, description=words, etag=etag)
        request = secrets_pb2.UpdateSecretRequest(request_id=request_id(), secret=secret)
        return (await client.secrets.UpdateSecret(request)).secret

    return Edited(held, change)


async def a_secrets_value(stack: Stack) -> Edited:
    client, _ = await stack.new_member()
    credential = secrets_pb2.GitCredential(host="git.example.com", username="someone")
    request = secrets_pb2.CreateSecretRequest(
        request_id=request_id(), secret=secrets_pb2.Secret(git_credential=credential), value=b"hush"
    )
    held = (await client.secrets.CreateSecret(request)).secret

    async def change(value: str, etag: str) -> secrets_pb2.Secret:
        secret = secrets_pb2.Secret(id=held.id, etag=etag)
        request = secrets_pb2.UpdateSecretRequest(request_id=request_id(), secret=secret, value=value.encode())
        return (await client.secrets.UpdateSecret(request)).secret

    return Edited(held, change)


async def a_task(stack: Stack) -> Edited:
    held = await stack.create_task(await stack.add_repository(), hold_prompt=True)

    async def change(title: str, etag: str) -> tasks_pb2.Task:
        task = tasks_pb2.Task(id=held.id, title=title, etag=etag)
        request = tasks_pb2.UpdateTaskRequest(request_id=request_id(), task=task)
        return (await stack.client.tasks.UpdateTask(request)).task

    return Edited(held, change)


async def a_session(stack: Stack) -> Edited:
    held = await stack.session((await stack.ready_task()).id)

    async def change(name: str, etag: str) -> sessions_pb2.Session:
        session = sessions_pb2.Session(id=held.id, task_id=held.task_id, display_name=name, etag=etag)
        request = sessions_pb2.UpdateSessionRequest(request_id=request_id(), session=session)
        return (await stack.client.sessions.UpdateSession(request)).session

    return Edited(held, change)


async def a_queued_message(stack: Stack) -> Edited:
    task = await stack.ready_task()
    await stack.send(task, "wait 60")
    held = (await stack.send(task, "say waits")).queued_message

    async def change(text: str, etag: str) -> sessions_pb2.QueuedMessage:
        message = sessions_pb2.QueuedMessage(id=held.id, task_id=task.id, prompt=Prompt(text=text), etag=etag)
        request = sessions_pb2.UpdateQueuedMessageRequest(request_id=request_id(), queued_message=message)
        return (await stack.client.sessions.UpdateQueuedMessage(request)).queued_message

    return Edited(held, change)


@pytest.mark.parametrize(
    "make",
    [an_organization, a_member, a_user, a_secret, a_secrets_value, a_task, a_session, a_queued_message],
    ids=lambda make: make.__name__,
)
async def test_of_many_who_change_it_on_what_they_know_one_does(
    stack: Stack, make: Callable[[Stack], Awaitable[Edited]]
) -> None:
    edited = await make(stack)

    outcomes = await asyncio.gather(
        *(edited.change(value, edited.held.etag) for value in edited.values), return_exceptions=True
    )

    changed = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    refused = [failure_of(outcome) for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(changed) == 1
    assert len(refused) == len(edited.values) - 1
    assert {(one.code, one.reason) for one in refused} == {(grpc.StatusCode.ABORTED, "ETAG_MISMATCH")}
    assert {one.metadata["etag"] for one in refused} == {changed[0].etag}
    assert changed[0].etag not in ("", edited.held.etag)

    informed = await edited.change(edited.values[-1], refused[0].metadata["etag"])
    blind = await edited.change(edited.values[-2], "")
    assert len({edited.held.etag, informed.etag, blind.etag}) == 3
