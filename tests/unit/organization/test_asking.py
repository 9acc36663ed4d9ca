"""What waits for people, over all tasks of an organization; and what the organization knows of secrets."""

from datetime import timedelta
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_INPUT_REQUEST
from branchline.v1.secrets_pb2 import GitCredential, ListSecretsRequest, Secret
from branchline.v1.sessions_pb2 import ListInputRequestsRequest
from branchline.v1.transcripts_pb2 import (
    INPUT_REQUEST_STATE_ANSWERED,
    INPUT_REQUEST_STATE_PENDING,
    InputRequest,
    InputRequestState,
)
from branchline.v1.watches_pb2 import CHANGE_TYPE_DELETED
from google.protobuf.timestamp_pb2 import Timestamp

from services.organization.public_reads import PublicSecretReader, PublicSessionReader
from tests.unit.organization.conftest import Calling, Room, call_as, summary

CONTEXT: Any = Calling()
PENDING, ANSWERED = INPUT_REQUEST_STATE_PENDING, INPUT_REQUEST_STATE_ANSWERED


def asked(
    organization_id: str, number: int, state: InputRequestState.ValueType = PENDING, *, task: int = 1, revision: int = 1
) -> InputRequest:
    return InputRequest(
        id=f"inp_{number:03}",
        organization_id=organization_id,
        task_id=f"task_{task:06}",
        session_id="ses_1",
        state=state,
        create_time=Timestamp(seconds=1_700_000_000 - number),
        revision=revision,
    )


async def listed(room: Room, organization_id: str, **given: Any) -> list[str]:
    """Return the ids of all pages."""
    found: list[str] = []
    token = ""
    while True:
        request = ListInputRequestsRequest(organization_id=organization_id, page_size=2, page_token=token, **given)
        answer = await PublicSessionReader(room.database, room.stores).ListInputRequests(request, CONTEXT)
        found += [one.id for one in answer.input_requests]
        token = answer.next_page_token
        if not token:
            return found


async def test_what_waits_is_listed_oldest_first_until_it_is_answered(room: Room) -> None:
    organization, other = await room.found(), await room.found("other")
    for number in range(5):
        await room.push((asked(organization.id, number, task=number % 2), False))
    await room.push((asked(other.id, 9), False), (asked(organization.id, 3, ANSWERED, revision=2), False))

    assert await listed(room, organization.id) == ["inp_004", "inp_002", "inp_001", "inp_000"]
    assert await listed(room, organization.id, task_ids=["task_000001"]) == ["inp_001"]
    assert await listed(room, organization.id, task_ids=["task_000001", "task_000000"]) == [
        "inp_004",
        "inp_002",
        "inp_001",
        "inp_000",
    ]
    assert await listed(room, organization.id, states=[ANSWERED]) == ["inp_003"]
    assert len(await listed(room, organization.id, states=[ANSWERED, PENDING])) == 5


async def test_a_late_state_does_not_make_an_answered_request_wait_again(room: Room) -> None:
    organization = await room.found()
    await room.push((asked(organization.id, 1, ANSWERED, revision=3), False))
    await room.push((asked(organization.id, 1, revision=2), False))
    assert await listed(room, organization.id) == []


async def test_what_waits_goes_with_its_task_and_watchers_see_it_go(room: Room) -> None:
    organization = await room.found()
    await room.push((summary(organization.id, "repo_1", 1), False), (asked(organization.id, 1), False))
    index = room.stores.index
    kinds = [ENTITY_KIND_INPUT_REQUEST]
    (page,) = [one async for one in index.catch_up(organization.id, kinds, None, "*", tail=True)]

    await room.push((summary(organization.id, "repo_1", 1, revision=2), True))

    assert await listed(room, organization.id) == []
    pages = index.catch_up(organization.id, kinds, page.position, "*")
    changes = [change async for one in pages for change in one.changes]
    assert [(change.id, change.type) for change in changes] == [("inp_001", CHANGE_TYPE_DELETED)]


async def secrets_of(room: Room, user_id: str) -> list[str]:
    call_as(user_id, "")
    answer = await PublicSecretReader(room.database, room.stores).ListSecrets(ListSecretsRequest(), CONTEXT)
    return [one.id for one in answer.secrets]


async def test_secrets_are_listed_for_their_user_alone_and_leave_no_trace(room: Room) -> None:
    for number, user_id in enumerate(("usr_1", "usr_1", "usr_2")):
        credential = GitCredential(host=f"{number}.test", username="me")
        await room.push((Secret(id=f"sec_{number}", user_id=user_id, git_credential=credential, revision=1), False))
    assert await secrets_of(room, "usr_1") == ["sec_0", "sec_1"]
    assert await secrets_of(room, "usr_2") == ["sec_2"]

    await room.push((Secret(id="sec_0", user_id="usr_1", revision=2), True))
    await room.push((Secret(id="sec_0", user_id="usr_1", revision=1), False))  # late
    assert await secrets_of(room, "usr_1") == ["sec_1"]
    await room.database.write(room.stores.people.prune)
    assert room.count("secrets") == 3
    room.clock.added = timedelta(days=2)
    await room.database.write(room.stores.people.prune)
    assert room.count("secrets") == 2
