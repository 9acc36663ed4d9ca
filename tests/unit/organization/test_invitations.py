"""Invitations: one code makes one member; every code that is of no use is refused the same way."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from branchline.v1.errors_pb2 import ERROR_REASON_DATABASE_BUSY
from branchline.v1.organizations_pb2 import (
    AcceptInvitationRequest,
    DeleteInvitationRequest,
    InviteMemberRequest,
    ListInvitationsRequest,
    ListMembersRequest,
)
from branchline.v1.roles_pb2 import ROLE_MEMBER
from branchline.v1.users_pb2 import User
from branchline_internal.organization.v1.organization_pb2 import AuthenticateRequest
from branchline_internal.spine.v1.push_pb2 import PushRequest
from branchline_internal.user.v1 import user_pb2
from cryptography.fernet import Fernet
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import bindparam, select

from services.organization.invitations import Invitations
from services.organization.public_organizations import PublicOrganizationServicer
from services.runtime.clock import Clock
from services.runtime.database import Statement, open_database
from services.runtime.errors import (
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.runtime.principal import Principal, bind_principal
from services.runtime.secrets import token_hash
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.runtime.spine.tables import outbox
from services.user.accounts import Accounts
from services.user.cipher import Cipher
from services.user.drafts import Drafts
from services.user.keeping import Secrets
from services.user.servicer import UserServicer
from services.user.task_states import TaskStates
from tests.support.databases import holding, migrated
from tests.unit.organization.conftest import Calling, Room, call_as

CONTEXT: Any = Calling()
_PUSHED = Statement(select(outbox).where(outbox.c.destination == bindparam("to")).order_by(outbox.c.seq))


class Users:
    """The real user service over a database of its own, that pushes to the room before it answers."""

    def __init__(self, servicer: UserServicer, room: Room) -> None:
        self._servicer = servicer
        self._room = room

    async def CreateUser(self, request: user_pb2.CreateUserRequest) -> user_pb2.CreateUserResponse:
        answer = await self._servicer.CreateUser(request, CONTEXT)
        await self._push()
        return answer

    async def IssueToken(self, request: user_pb2.IssueTokenRequest) -> user_pb2.IssueTokenResponse:
        answer = await self._servicer.IssueToken(request, CONTEXT)
        await self._push()
        return answer

    async def _push(self) -> None:
        request = PushRequest()
        for row in await self._servicer.database.read(lambda tx: tx.rows(_PUSHED, {"to": COORDINATOR})):
            entry = request.entries.add(id=row.entity_id, revision=row.revision, deleted=row.deleted)
            entry.state.type_url, entry.state.value = row.type_url, row.payload
        assert await self._room.ingest.submit(request) == {}


@pytest.fixture
async def door(room: Room, tmp_path: Path) -> AsyncGenerator[PublicOrganizationServicer, None]:
    """Where people come in who are nobody yet."""
    database, clock = open_database(migrated("user", tmp_path)), Clock()
    await database.start()
    box = Outbox(database, clock)
    secrets = Secrets(box, clock, Cipher(Fernet.generate_key().decode()))
    servicer = UserServicer(database, Accounts(box, clock), TaskStates(box, clock), Drafts(box, clock), secrets)
    users: Any = Users(servicer, room)
    yield PublicOrganizationServicer(room.database, room.stores, room.commands, users)
    await database.close()


async def _invite(room: Room, organization_id: str, **given: Any) -> tuple[str, str]:
    request = InviteMemberRequest(organization_id=organization_id, email="New@example.com", role=ROLE_MEMBER, **given)
    answer = await room.organizations.InviteMember(request, CONTEXT)
    return answer.invitation.id, answer.code


async def test_a_code_works_once(room: Room) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    for user_id in ("usr_a", "usr_b"):
        await room.push((User(id=user_id, display_name=user_id, email=f"{user_id}@example.com", revision=1), False))

    async def accept(user_id: str) -> str:
        call_as(user_id, "")
        answer = await room.organizations.AcceptInvitation(AcceptInvitationRequest(code=code), CONTEXT)
        return answer.member.user_id

    outcomes = await asyncio.gather(accept("usr_a"), accept("usr_b"), return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, FailedPrecondition)]
    assert len(refused) == 1
    assert refused[0].reason == "INVITATION_INVALID"
    call_as("usr_owner", organization.id)
    members = await room.organizations.ListMembers(ListMembersRequest(organization_id=organization.id), CONTEXT)
    joined = [one for one in outcomes if isinstance(one, str)]
    assert {one.user_id for one in members.members} == {"usr_owner", *joined}
    left = await room.organizations.ListInvitations(ListInvitationsRequest(organization_id=organization.id), CONTEXT)
    assert not left.invitations


async def test_codes_of_no_use_look_alike(room: Room) -> None:
    organization = await room.found()
    invitation_id, withdrawn = await _invite(room, organization.id)
    withdraw = DeleteInvitationRequest(organization_id=organization.id, invitation_id=invitation_id)
    assert (await room.organizations.DeleteInvitation(withdraw, CONTEXT)).consistency_token
    said: set[tuple[str, str]] = set()
    for code in (withdrawn, "never made"):
        with pytest.raises(DomainError) as refusal:
            await room.organizations.AcceptInvitation(AcceptInvitationRequest(code=code), CONTEXT)
        said.add((refusal.value.reason, refusal.value.message))
    assert len(said) == 1


async def holder_of(room: Room, token: str) -> str:
    request = AuthenticateRequest(token_hash=token_hash(token))
    return (await room.internal.Authenticate(request, CONTEXT)).user.email


async def test_who_is_nobody_yet_becomes_a_member_and_gets_a_token(
    room: Room, door: PublicOrganizationServicer
) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    bind_principal(Principal())
    request_id = "3c59dc04-8e88-4024-bbe8-079a5c74d079"
    request = AcceptInvitationRequest(code=code, display_name="New One", request_id=request_id)

    answer = await door.AcceptInvitation(request, CONTEXT)
    repeated = await door.AcceptInvitation(request, CONTEXT)

    assert (answer.member.display_name, answer.member.email) == ("New One", "new@example.com")
    assert answer.organization.id == organization.id
    assert await holder_of(room, answer.secret) == "new@example.com"
    assert repeated == answer  # the secret too: it is the only way in
    assert answer.member.user_id in await room.member_ids(organization.id)
    with pytest.raises(FailedPrecondition):
        await door.AcceptInvitation(AcceptInvitationRequest(code=code, display_name="Another"), CONTEXT)


async def test_a_code_makes_one_person_however_many_try(room: Room, door: PublicOrganizationServicer) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    bind_principal(Principal())
    emails = [f"person{number}@example.com" for number in range(8)]
    requests = [AcceptInvitationRequest(code=code, display_name="New", email=email) for email in emails]

    outcomes = await asyncio.gather(*(door.AcceptInvitation(one, CONTEXT) for one in requests), return_exceptions=True)

    joined = [one for one in outcomes if not isinstance(one, BaseException)]
    refused = [one for one in outcomes if isinstance(one, FailedPrecondition)]
    assert (len(joined), len(refused)) == (1, 7)
    assert {one.reason for one in refused} == {"INVITATION_INVALID"}
    left = [email for email in emails if email != joined[0].member.email]
    for email in left:  # nobody's address was taken: each can still be invited
        call_as("usr_owner", organization.id)
        _, other = await _invite(room, organization.id)
        bind_principal(Principal())
        again = AcceptInvitationRequest(code=other, display_name="New", email=email)
        assert (await door.AcceptInvitation(again, CONTEXT)).secret


async def test_an_organization_that_is_full_makes_no_person(room: Room, door: PublicOrganizationServicer) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    bind_principal(Principal())
    request = AcceptInvitationRequest(code=code, display_name="New")

    with patch("services.organization.members.MOST_MEMBERS", 1), pytest.raises(ResourceExhausted):
        await door.AcceptInvitation(request, CONTEXT)
    assert await room.database.read(room.stores.people.of_email, "new@example.com") is None
    assert (await door.AcceptInvitation(request, CONTEXT)).secret


async def test_who_accepts_without_a_credential_says_a_name(room: Room, door: PublicOrganizationServicer) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    bind_principal(Principal())
    with pytest.raises(InvalidArgument, match="display_name"):
        await door.AcceptInvitation(AcceptInvitationRequest(code=code, display_name=" "), CONTEXT)
    assert (await door.AcceptInvitation(AcceptInvitationRequest(code=code, display_name="New"), CONTEXT)).secret


async def test_an_address_that_is_a_users_is_accepted_by_that_user_alone(
    room: Room, door: PublicOrganizationServicer
) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    for email in ("USR_OWNER@example.com", "usr_owner@example.com"):
        bind_principal(Principal())
        request = AcceptInvitationRequest(code=code, display_name="Thief", email=email)
        with pytest.raises(AlreadyExists) as taken:
            await door.AcceptInvitation(request, CONTEXT)
        assert taken.value.reason == "EMAIL_TAKEN"
    await room.push((User(id="usr_new", display_name="New", email="new@example.com", revision=1), False))
    with pytest.raises(AlreadyExists):
        await door.AcceptInvitation(AcceptInvitationRequest(code=code, display_name="Thief"), CONTEXT)

    call_as("usr_new", "")
    answer = await door.AcceptInvitation(AcceptInvitationRequest(code=code), CONTEXT)
    assert (answer.member.user_id, answer.secret) == ("usr_new", "")


async def test_an_invitation_ends_with_its_time(room: Room, door: PublicOrganizationServicer) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id, ttl=Duration(seconds=60))
    _, longer = await _invite(room, organization.id)
    later = Clock(now=lambda: room.clock.clock.now() + timedelta(seconds=61))
    expired = replace(room.stores.invitations, clock=later)

    with pytest.raises(FailedPrecondition) as refused:
        await room.database.read(expired.of_code, code)
    assert refused.value.reason == "INVITATION_INVALID"
    assert await room.database.read(expired.of_code, longer)
    await room.database.write(expired.expire)
    assert room.count("invitations") == 1


async def test_what_broke_off_after_the_person_was_made_is_gone_on_from(
    room: Room, door: PublicOrganizationServicer
) -> None:
    organization = await room.found()
    _, code = await _invite(room, organization.id)
    bind_principal(Principal())
    request = AcceptInvitationRequest(code=code, display_name="New")
    with (
        patch.object(Invitations, "accept", side_effect=Unavailable(ERROR_REASON_DATABASE_BUSY, "broke off")),
        pytest.raises(Unavailable),
    ):
        await door.AcceptInvitation(request, CONTEXT)

    answer = await door.AcceptInvitation(request, CONTEXT)
    assert await holder_of(room, answer.secret) == "new@example.com"
    assert await room.member_ids(organization.id) == {"usr_owner", answer.member.user_id}


async def test_the_code_is_told_again_to_who_repeats_and_kept_as_a_hash(room: Room) -> None:
    organization = await room.found()
    request_id = "6512bd43-d9ca-4e02-8d5a-3a1b9c7d2e10"
    _, code = await _invite(room, organization.id, request_id=request_id)
    _, repeated = await _invite(room, organization.id, request_id=request_id)
    assert code
    assert repeated == code
    assert holding(room.url, code) == []


async def test_the_invitations_of_an_organization_are_forgotten_in_steps(room: Room) -> None:
    organization = await room.found()
    for _ in range(5):
        await _invite(room, organization.id)
    forget = room.stores.invitations.forget_of
    assert [await room.database.write(forget, organization.id, 2) for _ in range(4)] == [2, 2, 1, 0]
