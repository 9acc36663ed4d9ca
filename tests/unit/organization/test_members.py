"""Who comes, changes and goes."""

import asyncio
import uuid
from typing import Any

import pytest
from branchline.v1 import organizations_pb2 as api
from branchline.v1 import users_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_MEMBER
from branchline.v1.history_pb2 import EVENT_KIND_MEMBER_REMOVED, EVENT_KIND_MEMBER_UPDATED, HistoryEvent
from branchline.v1.organizations_pb2 import Member, Organization
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_OWNER, ROLE_VIEWER, Role
from branchline.v1.users_pb2 import User
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED, CHANGE_TYPE_UPSERTED
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest

from services.organization.destinations import TO_HISTORY, TO_USER
from services.organization.members import MOST_MEMBERS, MOST_MEMBERSHIPS, member_id
from services.organization.organizations import ORGANIZATION_BYTES
from services.runtime.client import MESSAGE_LIMIT_BYTES
from services.runtime.database import Tx
from services.runtime.errors import FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted
from tests.unit.organization.conftest import Room, call_as

CONTEXT: Any = None


async def change(room: Room, organization_id: str, user_id: str, role: Role.ValueType) -> None:
    member = Member(organization_id=organization_id, user_id=user_id, role=role)
    request = api.UpdateMemberRequest(request_id=str(uuid.uuid4()), member=member)
    await room.organizations.UpdateMember(request, CONTEXT)


async def remove(room: Room, organization_id: str, user_id: str) -> api.RemoveMemberResponse:
    request = api.RemoveMemberRequest(request_id=str(uuid.uuid4()), organization_id=organization_id, user_id=user_id)
    return await room.organizations.RemoveMember(request, CONTEXT)


async def kinds(room: Room) -> list[int]:
    return [event.kind for event in await room.marks(TO_HISTORY, HistoryEvent)]


async def test_an_administrator_changes_roles_but_makes_and_unmakes_no_owner(room: Room) -> None:  # ORG-3
    organization = await room.found()
    await room.join(organization.id, "usr_a", ROLE_ADMIN)
    await room.join(organization.id, "usr_m", ROLE_MEMBER)
    call_as("usr_a", organization.id, ROLE_ADMIN)

    await change(room, organization.id, "usr_m", ROLE_VIEWER)

    for user_id, role in (("usr_m", ROLE_OWNER), ("usr_owner", ROLE_ADMIN)):
        with pytest.raises(PermissionDenied):
            await change(room, organization.id, user_id, role)
    with pytest.raises(PermissionDenied):
        await remove(room, organization.id, "usr_owner")
    held = await room.database.read(room.stores.members.find, organization.id, "usr_m")
    assert held is not None
    assert held.role == ROLE_VIEWER
    assert EVENT_KIND_MEMBER_UPDATED in await kinds(room)


async def test_the_last_owner_cannot_go_or_step_down(room: Room) -> None:  # ORG-3
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_OWNER)
    call_as("usr_owner", organization.id)

    await remove(room, organization.id, "usr_2")

    for attempt in (
        remove(room, organization.id, "usr_owner"),
        change(room, organization.id, "usr_owner", ROLE_ADMIN),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            await attempt
        assert refused.value.reason == "LAST_OWNER"


async def test_of_two_owners_who_leave_at_once_one_stays(room: Room) -> None:  # F26
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_OWNER)

    async def leave(user_id: str) -> None:
        call_as(user_id, organization.id)
        await remove(room, organization.id, user_id)

    outcomes = await asyncio.gather(leave("usr_owner"), leave("usr_2"), return_exceptions=True)

    assert sum(outcome is None for outcome in outcomes) == 1
    assert len(await room.member_ids(organization.id)) == 1


async def test_a_viewer_may_leave_and_takes_nobody_along(room: Room) -> None:  # ORG-3
    organization = await room.found()
    await room.join(organization.id, "usr_v", ROLE_VIEWER)
    call_as("usr_v", organization.id, ROLE_VIEWER)

    with pytest.raises(PermissionDenied):
        await remove(room, organization.id, "usr_owner")
    await remove(room, organization.id, "usr_v")

    assert await room.member_ids(organization.id) == {"usr_owner"}
    assert EVENT_KIND_MEMBER_REMOVED in await kinds(room)
    forget = await room.marks(TO_USER, ForgetTaskStatesRequest)
    assert forget == [ForgetTaskStatesRequest(organization_id=organization.id, user_id="usr_v")]


async def test_one_who_left_is_a_tombstone_to_watchers_and_may_come_back(room: Room) -> None:
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_MEMBER)
    index = room.stores.index
    (page,) = [page async for page in index.catch_up(organization.id, [ENTITY_KIND_MEMBER], None, "*", tail=True)]
    call_as("usr_owner", organization.id)

    await remove(room, organization.id, "usr_2")
    (gone,) = [page async for page in index.catch_up(organization.id, [ENTITY_KIND_MEMBER], page.position, "*")]
    await room.join(organization.id, "usr_2", ROLE_VIEWER)
    (back,) = [page async for page in index.catch_up(organization.id, [ENTITY_KIND_MEMBER], gone.position, "*")]

    name = member_id(organization.id, "usr_2")
    assert [(change.id, change.type) for change in gone.changes] == [(name, CHANGE_TYPE_DELETED)]
    assert [(change.id, change.type) for change in back.changes] == [(name, CHANGE_TYPE_UPSERTED)]
    assert back.changes[0].revision > gone.changes[0].revision


async def test_the_same_request_at_once_and_later_removes_once(room: Room) -> None:  # F11
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_MEMBER)
    call_as("usr_owner", organization.id)
    request = api.RemoveMemberRequest(request_id="r", organization_id=organization.id, user_id="usr_2")

    answers = await asyncio.gather(*(room.organizations.RemoveMember(request, CONTEXT) for _ in range(5)))
    answers.append(await room.organizations.RemoveMember(request, CONTEXT))

    assert all(answer == answers[0] for answer in answers)
    assert (await kinds(room)).count(EVENT_KIND_MEMBER_REMOVED) == 1


async def test_other_organizations_do_not_exist(room: Room) -> None:
    organization = await room.found()
    await room.found("other", owner="usr_o")

    with pytest.raises(NotFound):
        await remove(room, organization.id, "usr_owner")


async def test_a_person_is_drawn_into_no_more_organizations_than_a_call_can_carry(room: Room) -> None:
    victim = User(id="usr_v", display_name="n" * 128, email="v@example.com", revision=1)
    owner = User(id="usr_many", display_name="many", email="many@example.com", revision=1)
    await room.push((victim, False), (owner, False))

    def fill(tx: Tx) -> None:
        for number in range(MOST_MEMBERSHIPS):
            other = Organization(slug=f"other-{number}", display_name="n" * 128)
            room.stores.organizations.found(tx, other, owner)
            room.stores.members.join(tx, other.id, victim, ROLE_VIEWER)

    await room.database.write(fill)
    organization = await room.found()
    with pytest.raises(ResourceExhausted, match="at most"):
        await room.database.write(room.stores.members.join, organization.id, victim, ROLE_VIEWER)

    call_as("usr_v", "")
    listed = await room.users.GetCurrentUser(users_pb2.GetCurrentUserRequest(), CONTEXT)
    assert len(listed.memberships) == MOST_MEMBERSHIPS
    assert listed.ByteSize() < 1024 * 1024
    assert MOST_MEMBERSHIPS * ORGANIZATION_BYTES < MESSAGE_LIMIT_BYTES


async def test_an_organization_has_so_many_members(room: Room) -> None:
    organization = await room.found()

    def fill(tx: Tx) -> None:
        for number in range(MOST_MEMBERS - 1):
            user = User(id=f"usr_{number}", display_name="n" * 128, email=f"{'e' * 240}{number}@x.org", revision=1)
            room.stores.members.join(tx, organization.id, user, ROLE_VIEWER)

    await room.database.write(fill)
    with pytest.raises(ResourceExhausted, match="at most"):
        await room.join(organization.id, "usr_more", ROLE_VIEWER)

    listed = await room.organizations.ListMembers(api.ListMembersRequest(organization_id=organization.id), CONTEXT)
    assert listed.ByteSize() < MESSAGE_LIMIT_BYTES
