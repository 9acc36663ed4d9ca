"""What children push: nothing poisons an edge, and a batch is a handful of statements."""

from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_USER_TASK_STATE
from branchline.v1.history_pb2 import EVENT_KIND_AGENT_FINISHED, EVENT_KIND_TASK_CREATED, HistoryEvent
from branchline.v1.roles_pb2 import ROLE_MEMBER
from branchline.v1.tasks_pb2 import TaskSummary
from branchline.v1.users_pb2 import ApiToken, User, UserTaskState
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.spine.v1.push_pb2 import WatchSelection
from branchline_internal.user.v1.user_pb2 import ApiTokenState, ForgetTaskStatesRequest, MarkUnreadRequest
from google.protobuf.timestamp_pb2 import Timestamp

from services.organization.destinations import TO_HISTORY, TO_USER
from services.runtime.principal import Principal, bind_principal
from tests.unit.organization.conftest import Calling, Room, summary

CONTEXT: Any = Calling()


def token_of(name: str, *, expires: int) -> ApiTokenState:
    token = ApiToken(id=name, user_id="usr_1", revision=1, expire_time=Timestamp(seconds=expires))
    return ApiTokenState(api_token=token, token_hash=name.ljust(64, "0"))


async def authenticated(room: Room, name: str) -> str:
    request = organization_pb2.AuthenticateRequest(token_hash=name.ljust(64, "0"))
    return (await room.internal.Authenticate(request, CONTEXT)).user.id


async def test_a_token_that_ends_beyond_all_years_stops_no_other(room: Room) -> None:  # F9
    refused = await room.push(
        (User(id="usr_1", email="a@example.com", revision=1), False),
        (token_of("tok_poison", expires=2**63 - 1), False),
        (token_of("tok_good", expires=4_000_000_000), False),
    )

    assert refused == {}
    assert await authenticated(room, "tok_good") == "usr_1"
    assert await authenticated(room, "tok_poison") == "usr_1"


async def test_an_entry_that_is_nonsense_is_refused_alone(room: Room) -> None:  # F9
    refused = await room.push((summary("org_1", "repo_1", 1), False), (TaskSummary(id="task_x", revision=1), False))

    assert list(refused) == [1]
    assert await room.database.read(room.stores.tasks.route, "task_000001") == ("org_1", "repo_1")


async def test_events_go_to_history_and_news_to_the_members(room: Room) -> None:  # HIS-1, USR-6
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_MEMBER)
    told = HistoryEvent(id="evt_1", organization_id=organization.id, task_id="t", kind=EVENT_KIND_AGENT_FINISHED)
    quiet = HistoryEvent(id="evt_2", organization_id=organization.id, task_id="t", kind=EVENT_KIND_TASK_CREATED)

    await room.push((told, False), (quiet, False))

    assert [event.id for event in await room.marks(TO_HISTORY, HistoryEvent)][-2:] == ["evt_1", "evt_2"]
    (unread,) = await room.marks(TO_USER, MarkUnreadRequest)
    assert unread.event_id == "evt_1"
    assert set(unread.user_ids) == {"usr_owner", "usr_2"}


async def test_statements_do_not_grow_with_a_batch_of_events(room: Room) -> None:
    organization = await room.found()
    counts: list[int] = []

    for size in (5, 200):
        events = [
            HistoryEvent(id=f"evt_{size}_{n}", organization_id=organization.id, kind=EVENT_KIND_AGENT_FINISHED)
            for n in range(size)
        ]
        before = room.database.statements
        await room.push(*((event, False) for event in events))
        counts.append(room.database.statements - before)

    assert counts[0] == counts[1] <= 5


async def test_ones_own_state_is_shown_to_nobody_else(room: Room) -> None:  # USR-5, F30
    organization = await room.found()
    states = [
        UserTaskState(user_id=user, organization_id=organization.id, task_id="task_1", revision=1)
        for user in ("usr_1", "usr_2")
    ]
    await room.push(*((state, False) for state in states))
    bind_principal(Principal(service="gateway"))

    async def seen_by(viewer_id: str) -> set[str]:
        request = organization_pb2.WatchIndexRequest(
            organization_id=organization.id,
            selection=WatchSelection(viewer_id=viewer_id, until_synced=True),
        )
        frames = [answer.frame async for answer in room.internal.WatchIndex(request, CONTEXT)]
        changes = [change for frame in frames for change in frame.changes]
        return {change.viewer_id for change in changes if change.kind == ENTITY_KIND_USER_TASK_STATE}

    assert await seen_by("usr_1") == {"usr_1"}
    assert await seen_by("") == set()
    assert await seen_by("*") == {"usr_1", "usr_2"}


async def test_a_history_watch_shows_events_alone_and_the_other_all_else(room: Room) -> None:
    organization = await room.found()
    await room.push((HistoryEvent(id="evt_1", organization_id=organization.id, sequence=1), False))
    bind_principal(Principal(service="gateway"))
    seen: list[set[str]] = []

    for history in (True, False):
        request = organization_pb2.WatchIndexRequest(
            organization_id=organization.id, history=history, selection=WatchSelection(until_synced=True)
        )
        frames = [answer.frame async for answer in room.internal.WatchIndex(request, CONTEXT)]
        seen.append({change.id for frame in frames for change in frame.changes})

    assert seen == [{"evt_1"}, {organization.id, f"{organization.id}/usr_owner"}]


async def test_a_state_without_its_task_or_its_member_is_forgotten_again(room: Room) -> None:  # ORG-9
    organization = await room.found()
    await room.join(organization.id, "usr_2", ROLE_MEMBER)
    await room.push((summary(organization.id, "repo_1", 1), False), (summary(organization.id, "repo_1", 2), False))
    await room.push((summary(organization.id, "repo_1", 2, revision=2), True))
    states = [
        UserTaskState(user_id=user, organization_id=organization.id, task_id=task, revision=1)
        for user in ("usr_2", "usr_left")
        for task in ("task_000001", "task_000002")
    ]

    await room.push(*((state, False) for state in states))

    forgotten = [one for one in await room.marks(TO_USER, ForgetTaskStatesRequest) if one.user_id]
    assert {(one.user_id, one.task_id) for one in forgotten} == {
        ("usr_2", "task_000002"),
        ("usr_left", "task_000001"),
        ("usr_left", "task_000002"),
    }
    assert {one.organization_id for one in forgotten} == {organization.id}
